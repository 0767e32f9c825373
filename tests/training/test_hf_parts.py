"""A tiny MiniGPT-4-like model, SigLIP and DINOv2 towers in training: the same losses at every layout, resuming, files.

All run parts of transformers (`model.hf_parts`), which tensor-parallel ranks have whole; these share the images out.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from hacl_megatron.assemble.start_from import resolve_architecture
from hacl_megatron.checkpoint.run.integrity import FROZEN_FOLDER
from hacl_megatron.config.lora import is_lora
from hacl_megatron.config.run import RunConfig, parse_run_config, to_yaml
from tests.distributed import run_distributed
from tests.model.hf_architecture import architecture
from tests.tiny import tiny_blip2_config, tiny_dinov2_config, tiny_llava_config, tiny_siglip_config
from tests.training.gradient_cases import SAMPLES, Case, read, record
from tests.training.runs import (
    LOSSES,
    assert_same_run,
    latest_checkpoint,
    layout_flags,
    make_hf_inputs,
    metrics,
    train,
    weights,
)

TRAINED = ["--freeze-ViT", "false", "--freeze-qformer", "false"]
RUNS = {
    "stage 1": ("minigpt4", "pretrain", []),  # MiniGPT-4's: the projection trains, and HACL's heads
    "all trained": ("minigpt4", "finetune", TRAINED),
    "q-former alone": ("minigpt4", "pretrain", ["--freeze-qformer", "false"]),
    "siglip": ("siglip", "finetune", TRAINED[:2]),
    "dinov2": ("dinov2", "finetune", [*TRAINED[:2], "--lora-rank", "2"]),
}
LAYOUTS = {"tp2-sp": [], "pp2-first1": [], "dp2": ["--use-distributed-optimizer", "--overlap-grad-reduce"]}
STEPS = ("stage 1", "all trained", "siglip", "dinov2")
COMPARED = (*LOSSES, "temperature", "hallucination margin", "grad-norm")
CASES = [Case("own", "image", micro_batches=4), Case("all", "prompt", micro_batches=4)]
ONE_BY_ONE = Case("all", "prompt", micro_batches=SAMPLES)
"""Micro-batches of one image, or of none: fewer than there are ranks."""
UNEVEN = {"pretrain": Case("all", "prompt", tokens=700), "finetune": Case("all", "prompt", tokens=900)}
"""Micro-batches of three images, or of five."""
SHARED = {
    "tp2": ("q-former alone", "all trained", "siglip"), "tp2-sp": RUNS, "tp2-pp2-sp": ("all trained",),
    "cp2-tp2": ("all trained", "siglip"),
}  # fmt: skip
"""Layouts and runs whose tensor-parallel ranks share images out."""
GRADIENTS = [(run, layout) for run in RUNS for layout in ("tp1", *LAYOUTS, "cp2")]
GRADIENTS += [(run, layout) for layout, runs in SHARED.items() for run in runs if layout not in LAYOUTS]
RESUMED = (("stage 1", "tp2-sp", "pp2-first1"), ("dinov2", "pp2-first1", "tp2-sp"))


def command(folder: Path, run: str, layout: str, save: str, *extra: str) -> list[str]:
    model, stage, flags = RUNS[run]
    config = ["--config", str(folder / model / f"{stage}.yaml"), "--save", str(folder / save)]
    return [*config, *layout_flags(layout)[1], *flags, *LAYOUTS.get(layout, []), *extra]


def cases(layout: str, stage: str) -> list[Case]:
    if layout == "tp2":
        return [ONE_BY_ONE, UNEVEN[stage]]
    # One micro-batch in one process is the reference.
    return [*CASES, *(Case(case.hallucination_negatives, case.context) for case in CASES if layout == "tp1")]


def record_all(folder: str, layouts: Iterable[str]) -> None:
    for layout in layouts:
        _, flags = layout_flags(layout, samples=SAMPLES)
        for run, (model, stage, trained) in RUNS.items():
            if (run, layout) not in GRADIENTS:
                continue
            record(
                f"{folder}/{model}", f"{layout} {run}", [*flags, *trained, "--global-batch-size", str(SAMPLES)],
                stage, cases(layout, stage),
            )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf-parts")
    siglip, dinov2 = tiny_llava_config(), tiny_llava_config()
    siglip.vision_config = tiny_siglip_config()
    dinov2.vision_config = tiny_dinov2_config(image=42, registers=3, swiglu=True)
    for name, config in (("minigpt4", tiny_blip2_config()), ("siglip", siglip), ("dinov2", dinov2)):
        make_hf_inputs(root / name, config)
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """Every run of this file."""
    train([command(folder, run, "tp1", f"{run}-tp1") for run in STEPS], 1)
    many = [command(folder, run, layout, f"{run}-{layout}") for run in STEPS for layout in LAYOUTS]
    for run, source, target in RESUMED:
        cut = str(folder / f"cut-{source}")
        many.append(command(folder, run, source, f"cut-{source}", "--exit-interval", "2"))
        many.append(command(folder, run, target, f"resumed-{target}", "--load", cut))
    train(many, 2)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", STEPS)
def test_same_losses_and_weights_as_one_process(finished: Path, run: str, layout: str) -> None:
    assert_same_run(finished / f"{run}-tp1", finished / f"{run}-{layout}", COMPARED)


def test_what_trains_moves_and_nothing_else(finished: Path) -> None:
    parts = {
        "vision_tower.": ("all trained", "siglip", "dinov2"), "connector.query_tokens": ("all trained",),
        "connector.qformer.": ("all trained",), "connector.projection.": ("stage 1", "all trained"),
        "connector.0.": ("siglip", "dinov2"), "language_model.": ("all trained", "siglip"), "heads.": STEPS,
    }  # fmt: skip
    for run in STEPS:
        before, after = weights(finished / RUNS[run][0] / "start"), weights(finished / f"{run}-tp1")
        added = [name for name in after if name not in before]
        assert before.keys() <= after.keys() and all(map(is_lora, added)) and bool(added) == (run == "dinov2")
        for part, moving in parts.items():
            names = [name for name in before if name.startswith(part)]
            moved = [name for name in names if not torch.equal(before[name], after[name])]
            assert bool(moved) == (run in moving and bool(names)), (run, part, moved)
            if moved and part != "language_model.":  # some of its rows are never seen
                still = set(names) - set(moved)
                assert all(name.endswith(("key.bias", "k_proj.bias")) for name in still), still


def test_frozen_parts_are_written_once(finished: Path) -> None:
    """Tower, Q-Former and LLM of stage 1 lie in SAVE/frozen, to which the iterations refer."""
    save = finished / "cut-tp2-sp"
    (frozen,) = (save / FROZEN_FOLDER).iterdir()
    size = {
        name: sum(file.stat().st_size for file in where.glob("*.distcp"))
        for name, where in (("frozen", frozen), ("iteration", latest_checkpoint(save)))
    }
    held = weights(save)
    trained = sum(t.nbytes for name, t in held.items() if name.startswith(("connector.projection.", "heads.")))
    rest = sum(t.nbytes for t in held.values()) - trained
    assert rest <= size["frozen"] < 1.5 * rest
    assert 3 * trained <= size["iteration"] < 3 * trained + 200_000, "weights and two moments"


@pytest.mark.parametrize(("run", "source", "target"), RESUMED)
def test_resumed_at_another_layout(finished: Path, run: str, source: str, target: str) -> None:
    whole, found = metrics(finished / f"{run}-tp1"), metrics(finished / f"resumed-{target}")
    assert [row["iteration"] for row in found] == [3, 4, 5]
    for expected, row in zip(whole[2:], found, strict=True):
        for tag in COMPARED:
            assert math.isclose(expected[tag], row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, expected, row)


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Path:
    run_distributed(record_all, 1, str(folder), ["tp1"])
    for size in (2, 4):
        layouts = dict.fromkeys(layout for _, layout in GRADIENTS if layout_flags(layout)[0] == size)
        run_distributed(record_all, size, str(folder), [*layouts])
    return folder


@pytest.mark.parametrize(("run", "layout"), GRADIENTS)
def test_gradients_are_those_of_one_process_and_one_micro_batch(recorded: Path, run: str, layout: str) -> None:
    """With gradient caching: the pass ahead and the main one share what is constant, tower features or query states.
    Ranks share the images out: fails where a trained tower's gradients are not summed over all rows (cp2), or those of
    tower, Q-Former and connector not over all images, or twice (tp2)."""
    model, stage, _ = RUNS[run]
    for case in cases(layout, stage):
        reference = Case(case.hallucination_negatives, case.context)
        expected = read(recorded / model, stage, f"tp1 {run}", 1, reference)
        found = read(recorded / model, stage, f"{layout} {run}", layout_flags(layout)[0], case)
        assert found["num_micro_batches"] == case.micro_batches or case.tokens
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            size = gradient.norm()
            if name.endswith(("key.bias", "k_proj.bias")):  # shifts all scores alike: all rounding
                size = expected["gradients"][name.replace(".bias", ".weight")].norm()
            difference = float((found["gradients"][name] - gradient).norm() / size.clamp_min(1e-12))
            assert difference <= 1e-4, (case.name(), name, difference)


@pytest.mark.parametrize(("run", "layout"), [(run, layout) for layout, runs in SHARED.items() for run in runs])
def test_each_rank_runs_the_tower_for_its_part_of_the_images(recorded: Path, run: str, layout: str) -> None:
    """Fails where a rank runs another's images too, or one rank most of them; or where the data have no uneven, no
    single and no missing images."""
    model, stage, _ = RUNS[run]
    ranks = math.prod(int(part[2:]) for part in layout.split("-") if part[:2] in ("tp", "cp"))
    for case in cases(layout, stage):
        found = read(recorded / model, stage, f"{layout} {run}", layout_flags(layout)[0], case)
        per_call = [*zip(*(views for views in found["views"] if views), strict=True)]  # on the first stage
        # A trained tower has run ahead too, for micro-batches with pairs.
        for images, views in zip(found["images"], per_call[-len(found["images"]) :], strict=True):
            blank = views.count(1) - images if images < ranks else 0  # whoever has no image runs a blank one
            assert len(views) == ranks and sum(views) == images + blank and max(views) <= max(1, -(-images // ranks))
    if layout == "tp2":
        alone, uneven = (
            read(recorded / model, stage, f"tp2 {run}", 2, case)["images"] for case in cases(layout, stage)
        )
        assert any(number % 2 and number > 2 for number in uneven), uneven
        assert 1 in alone and (0 in alone or stage == "pretrain"), alone


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vision-backend", "megatron"], ["--vision-backend is megatron", "is hf's", "leave the flag out"]),
        (["--mm-projector-type", "qformer"], ["--mm-projector-type is qformer", "is mlp2x_gelu"]),
        (["--vision-backend", "hf", "--mm-projector-type", "mlp2x_gelu"], []),
    ],
)
def test_a_checkpoint_keeps_its_backend_and_connector(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    """Its parameters have the backend's names."""
    clip = architecture(tiny_llava_config())
    (tmp_path / "run_config.yaml").write_text(to_yaml(RunConfig(architecture=clip)))
    config = parse_run_config(["--pretrained-checkpoint", str(tmp_path), "--train-iters", "1", *flags])
    if not words:
        assert resolve_architecture(config, None) == clip
        return
    with pytest.raises(ValueError) as refusal:
        resolve_architecture(config, None)
    assert all(word in str(refusal.value) for word in words), refusal.value
