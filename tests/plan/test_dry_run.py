"""`--dry-run`: a cluster's configuration is built or refused on this machine, and its buffers are as planned."""

import contextlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from hacl_megatron.assemble.parameters import stage_parameters
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import parse_run_config
from hacl_megatron.plan.state import state_bytes
from hacl_megatron.train import run
from tests.distributed import context
from tests.model.hf_architecture import json_clean, tower
from tests.plan.example_plans import EXAMPLES, seventy_billion
from tests.warm import run_warm

BACKBONES = EXAMPLES.with_name("backbones")
FINETUNE, PRETRAIN_13B = str(EXAMPLES / "finetune_7b.yaml"), str(EXAMPLES / "pretrain_13b.yaml")
TP8_PP4 = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4", "--sequence-parallel"]
TP4_PP4 = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4", "--sequence-parallel"]


def apart(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a process of its own: a dry run changes what torch's names mean."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def outputs(commands: Sequence[Sequence[str]]) -> list[str]:
    """What each `--dry-run` prints, or its error behind `ValueError: `."""
    found = []
    for command in commands:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                run([*command, "--dry-run"])
            found.append(printed.getvalue())
        except ValueError as error:
            found.append(f"ValueError: {error}")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    values = yaml.safe_load(Path(FINETUNE).read_text())
    written = {
        "70b": seventy_billion(),
        "minigpt4": minigpt4(values),
        "no-model": {key: value for key, value in values.items() if key != "model"},
        "recompute": {**values, "transformer": {"recompute_granularity": "full"}},
    }
    for name, content in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def minigpt4(values: dict[str, Any]) -> dict[str, Any]:
    """MiniGPT-4 7B, stage 1: a LLaMA of the 7B's sizes behind the tower and Q-Former that BLIP-2 published."""
    vision, qformer = transformers.Blip2VisionConfig(), transformers.Blip2QFormerConfig()
    model = {
        **values["model"],
        "vision": asdict(tower(vision)),
        "image": {"size": 224},
        "projector_type": "qformer",
        "vision_select_layer": -1,
        "qformer": {"num_query_tokens": 32, "hidden_size": 768, "hf": json_clean(qformer)},
    }
    return {**values, "freeze-LM": True, "model": model}


CASES: dict[str, tuple[list[str], list[str]]] = {
    "13B": (
        ["--config", PRETRAIN_13B, "--world-size", "1024", *TP4_PP4, "--micro-batch-size", "4"],
        ["4 x 4 x 64 = 1024", "  0 ", " 256 ", " 768 ", "31,467,520", "13,109,761", "would train: connector, heads",
         "--vision-parallel share is chosen: by the plan", "290,909,184"],
    ),
    "one rank": (
        ["--config", PRETRAIN_13B, "--world-size", "64", *TP4_PP4, "--dry-run-rank", "30"],
        [" 30 ", "would train: nothing on this rank"],
    ),
    "13B as it is": (
        ["--config", PRETRAIN_13B, "--world-size", "1024"],
        ["4 x 1 x 256 = 1024", "256 samples a step", "8,192 rows", "fits h200-141g, h100-80g, a100-80g, a100-40g"],
    ),
    "70B": (
        ["--config", "FOLDER/70b.yaml", "--world-size", "1024", *TP8_PP4, "--micro-batch-size", "1"],
        ["8 x 4 x 32 = 1024", " 256 ", " 768 ", "75,513,856", "33,558,529", "fits h200-141g, h100-80g"],
    ),
    "70B on one node": (
        ["--config", "FOLDER/70b.yaml", "--world-size", "8"],
        ["would train: connector, LLM, heads", "warning: ", "tools/plan_run.py --suggest"],
    ),
    "MiniGPT-4": (  # tower and Q-Former as many as transformers counts, and 768 x 4096 + 4096 of the projection
        ["--config", "FOLDER/minigpt4.yaml", "--world-size", "8", "--pipeline-model-parallel-size", "2"],
        ["985,952,256", "108,312,064", "3,149,824 ", "would train: connector, heads", "fits"],
    ),
    "Qwen2.5 7B": (  # a quarter of 28 layers, split over 4 ranks behind 152,064 rows; SigLIP whole on each
        ["--config", str(BACKBONES / "qwen2_5_7b.yaml"), "--world-size", "1024", *TP4_PP4, "--micro-batch-size", "1"],
        ["4 x 4 x 64 = 1024", "397,745,440", "544,138,112", "407,888,768", "would train: connector, LLM, heads"],
    ),
    "Llama 3.1 8B": (
        ["--config", str(BACKBONES / "llama3_1_8b.yaml"), "--world-size", "1024", *TP4_PP4, "--micro-batch-size", "1"],
        ["4 x 4 x 64 = 1024", "73,730,304", "567,607,296", "436,273,152", "would train: connector, LLM, heads", "fits"],
    ),
    "context": (  # at the last rank, whose replica is the last to be made
        ["--config", FINETUNE, "--world-size", "16", "--tensor-model-parallel-size", "2", "--dry-run-rank", "15",
         "--context-parallel-size", "4"],
        ["tensor x pipeline x data x context parallel 2 x 1 x 2 x 4 = 16", "3,369,340,928", "fits"],
    ),
    "replicas": (
        ["--config", FINETUNE, "--world-size", "12", "--context-parallel-size", "8"],
        ["ValueError", "12 processes cannot be divided", "8 context-parallel ranks", "start a multiple of 8"],
    ),
    "heads": (
        ["--config", FINETUNE, "--world-size", "48", "--tensor-model-parallel-size", "3", "--micro-batch-size", "8"],
        ["ValueError", "num_attention_heads 32 cannot be shared by 3"],
    ),
    "layers": (
        ["--config", FINETUNE, "--world-size", "40", "--pipeline-model-parallel-size", "5"],
        ["ValueError", "32 layers cannot be shared by 5 pipeline stages"],
    ),
    "batch": (
        ["--config", FINETUNE, "--world-size", "1024"],
        ["ValueError", "--global-batch-size 128 is no multiple", "expected a multiple of 8192"],
    ),
    "rank": (
        ["--config", FINETUNE, "--world-size", "8", "--dry-run-rank", "8"],
        ["ValueError", "--dry-run-rank is 8, expected less than --world-size 8"],
    ),
    "sizes": (["--config", "FOLDER/no-model.yaml", "--world-size", "8"], ["ValueError", "no such folder", "`model:`"]),
    "megatron-core's own": (
        ["--config", "FOLDER/recompute.yaml", "--world-size", "8"],
        ["ValueError", "rank 0 cannot be built: transformer: megatron-core refuses", "recompute_method"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(files: Path) -> dict[str, str]:
    commands = [[word.replace("FOLDER", str(files)) for word in command] for command, _ in CASES.values()]
    return dict(zip(CASES, apart(outputs, commands), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_a_dry_run_says(said, name):
    for words in CASES[name][1]:
        assert words in said[name], said[name]
    if "ValueError" in said[name]:
        assert "\n" not in said[name] and "; " in said[name]


def test_world_size_is_for_dry_runs_alone():
    for flag in ("--world-size", "--dry-run-rank"):
        with pytest.raises(ValueError, match=f"{flag} is given without --dry-run; "):
            run(["--config", FINETUNE, flag, "8"])


def test_a_refused_dry_run_ends_with_one_line_and_a_status():
    command = ["-m", "hacl_megatron.train", "--config", FINETUNE, "--dry-run", "--world-size", "3"]
    command += ["--tensor-model-parallel-size", "2"]
    done = run_warm(command)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "hacl_megatron: error: " in line]
    assert "3 processes cannot be divided" in line and "Traceback" not in done.stderr


def built_and_planned(cases: Sequence[tuple[Sequence[str], int]]) -> list[dict[str, Any]]:
    """Parameters and state of one rank as megatron-core builds them on meta tensors, and as they are planned."""
    from hacl_megatron.assemble.module import build_module
    from hacl_megatron.assemble.processes import initialize_parallelism
    from hacl_megatron.plan.dry_run import META, _as_rank, prepare_device
    from hacl_megatron.training.trainee import build_trainee
    from tests.plan.plan_cases import described, state_of

    found = []
    for arguments, rank in cases:
        config = parse_run_config(arguments)
        layout = check_flags(config, config.training.world_size, files=False)
        prepare_device(META)
        with _as_rank(rank, layout.world_size):
            groups = initialize_parallelism(config, layout)
            module = build_module(config, groups, META)
            trainee = build_trainee(module, config, 10)
            planned = stage_parameters(config, groups.pp.rank())
            found.append(
                {
                    "parameters": described(module),
                    "planned parameters": [(p.name, p.shape, p.trained, p.bytes_each) for p in planned],
                    "state": state_of(trainee),
                    "planned": state_bytes(
                        planned, config, layout, stage=groups.pp.rank(), dp_rank=groups.dp_cp.rank()
                    ),
                }
            )  # fmt: skip
    return found


def test_state_is_exact_at_the_sizes_of_a_cluster(files: Path):
    """megatron-core's own buffers for 7B and 70B at 96 to 1,024 ranks: many buckets, padding, slices of parameters."""
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather"]
    # 12 replicas: 128 divides no multiple of 12 that is not a multiple of 384, so buckets are padded.
    uneven = ["--config", FINETUNE, "--world-size", "96", "--tensor-model-parallel-size", "8"]
    uneven += ["--micro-batch-size", "1", "--global-batch-size", "120"]
    seventy = ["--config", str(files / "70b.yaml"), "--world-size", "1024", "--tensor-model-parallel-size", "8"]
    seventy += ["--pipeline-model-parallel-size", "4", "--micro-batch-size", "1"]
    cases = [
        (["--config", FINETUNE, "--world-size", "8"], 0),
        ([*uneven, *overlap], 0),
        ([*uneven, *overlap], 95),
        ([*uneven, "--bf16", "false", "--freeze-ViT", "false"], 8),
        ([*seventy, *overlap], 3),
        ([*seventy, *overlap], 1023),
        ([*seventy, *overlap, "--context-parallel-size", "2"], 1023),
    ]
    for (arguments, rank), found in zip(cases, apart(built_and_planned, cases), strict=True):
        assert found["planned parameters"] == found["parameters"], (arguments, rank)
        assert found["planned"] == found["state"], (arguments, rank)
