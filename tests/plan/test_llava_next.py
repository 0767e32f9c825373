"""examples/llava_next: plans of pictures in tiles, rows by their size."""

from dataclasses import replace
from pathlib import Path

import pytest

from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import parse_run_config
from hacl_megatron.plan.planner import make_plan
from hacl_megatron.plan.workload import assumed_samples, views_and_rows
from hacl_megatron.platform.hardware import Cluster
from tests.tool_runs import run_tool

FOLDER = Path(__file__).parents[2] / "examples" / "llava_next"


@pytest.mark.parametrize(
    ("name", "views", "rows"), [("pretrain_qwen2_7b", 1, 576), ("qwen2_7b", 5, 2340), ("onevision_qwen2_7b", 5, 2929)]
)
def test_examples_fit_and_count_the_rows_of_a_picture(name: str, views: int, rows: int) -> None:
    """Of 640 x 480: two by two tiles, padded above and below: NeXT keeps 36 lines of 48 + 1, OneVision 40 of 54 + 1."""
    config = parse_run_config(["--config", str(FOLDER / f"{name}.yaml")])
    layout = check_flags(config, 8, files=False)
    check_architecture(config, layout)
    samples = assumed_samples(config)
    assert views_and_rows(config, samples) == (views, rows)
    plan = make_plan(config, layout, Cluster(gpu_name="a100-80g", gpus_per_node=8), samples)
    assert plan.fits and plan.memory > 15 * 2**30
    seen = plan.samples_per_micro_batch * samples.image_share * views
    assert plan.micro_batch.main.images == pytest.approx(seen)


def test_more_and_larger_pictures_take_more(capfd: pytest.CaptureFixture[str]) -> None:
    """Fails where the tool drops either flag. In four passes, one of recomputing, a view is 2.65 TFLOP, a row 52.3
    GFLOP: a SigLIP of 26 layers of 15.2 M weights and scores over 729 rows, a connector of 17 M; 6.53 G weights of a
    Qwen2."""

    def rows(*flags: str) -> str:
        command = ("--config", FOLDER / "onevision_qwen2_7b.yaml", "--gpu", "a100-80g", *flags)
        assert run_tool("plan_run", *command) == 0
        (said,) = capfd.readouterr().out.split("assumed of the data")[1:]
        return said

    usual = rows()
    assert "an image of 640 x 480 pixels (5 views, 2,929 rows)" in usual
    assert "a view costs the tower as much as 50.6 rows the language model" in usual
    assert "an image of 2000 x 900 pixels (19 views, " in rows("--image-size", "2000x900")
    assert "3 images of 640 x 480 pixels (1 views, 730 rows)" in rows("--images-per-sample", "3")


def test_the_readme_has_the_plans_numbers_of_a_long_record() -> None:
    """Catches a plan in which context-parallel ranks have whole packs, images or gathered rows for good."""
    text = (FOLDER / "README.md").read_text()
    long = ["--model-max-length", "32768", "--micro-batch-tokens", "32768", "--context-parallel-size"]
    found, seconds = [], []
    for ranks in ("1", "4"):
        config = parse_run_config(["--config", str(FOLDER / "qwen2_7b.yaml"), *long, ranks])
        layout = check_flags(config, 8, files=False)
        samples = replace(assumed_samples(config), images_per_sample=11)
        plan = make_plan(config, layout, Cluster(gpu_name="a100-80g", gpus_per_node=8), samples)
        memory = plan.stages[0].memory
        found.append((memory.activations + memory.logits + memory.working) / 2**30)
        seconds.append(plan.time.total)
    assert f"Of packs of {plan.micro_batch.main.rows:,.0f} rows" in text
    assert f"take {found[1]:.1f} GiB a GPU, without the flag\n{found[0]:.1f} GiB" in text
    assert f"a step {seconds[1] / seconds[0] - 1:.0%} longer".replace("%", " %") in text
