"""Whole runs of a small model on one GPU, by the trainer's own entry, against the same run in fp32 on the CPU.

The same data in the same order, so that losses can be compared step by step. What a run uses (Transformer Engine,
flash-attn, or megatron-core's layers and torch's kernel) is what is installed: `tests/gpu/run.sh` runs this with and
without. `HACL_REHEARSE=1` runs both sides on the CPU, to see that the script itself is in order.
"""

import gzip
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from hacl_megatron.platform.accelerators import layer_library
from tests.distributed import run_distributed
from tests.tiny_data import swap_twins
from tests.training.runs import latest_checkpoint, make_inputs, metrics

REHEARSED = bool(os.environ.get("HACL_REHEARSE")) and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSED else "cuda"
pytestmark = pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="needs a CUDA device")

STEPS = 6 if REHEARSED else 20
COMMON = ["--train-iters", str(STEPS), "--micro-batch-size", "4", "--lr-warmup-fraction", "0", "--lr", "2e-4"]
LORA = ["--lora-rank", "8", "--freeze-LM", "false"]
WIDTHS = dict(hidden=256, heads=4, groups=4, ffn=512, layers=4, vision_hidden=128, vision_heads=2)
"""What FP8's products and flash kernels take: multiples of 32, heads of 64."""
FAMILIES = {
    "qwen2": dict(family="qwen2", groups=2),  # biases of queries, keys and values
    "qwen3": dict(family="qwen3", groups=2, head_dim=128, tie=True),  # norms of queries and keys, wider heads
}
PREFERENCES = ("dpo", "mdpo", "phrase")
LOSSES = ("lm loss", "contrastive loss i2t", "contrastive loss t2i", "preference loss")


def run_each(commands: Sequence[Sequence[str] | Callable[[], None]], requested: str) -> None:
    """Trainings one after another in this process, each with a process group of its own."""
    from hacl_megatron.train import run

    torch.distributed.destroy_process_group()  # the gloo group that `run_distributed` made
    for command in commands:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # which say that a launcher has made a group; each training makes its own
        run([*command, "--device", requested])
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:0")


def command(folder: Path, stage: str, save: str, *extra: str) -> list[str]:
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *COMMON, *extra]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, others in FAMILIES.items():
        make_inputs(folder / name, **(WIDTHS | others))
    swap_twins(make_inputs(folder, **WIDTHS) / "data")
    return folder


def others(folder: Path, name: str, *flags: str) -> list[list[str]]:
    """The likelihood objectives, and the other families."""
    return [
        *(command(folder, "finetune", f"{name}-{loss}", "--preference-loss", loss, *flags) for loss in PREFERENCES),
        *(command(folder / family, "finetune", f"../{name}-{family}", *flags) for family in FAMILIES),
    ]


def with_transformer(folder: Path, stage: str, **fields: object) -> str:
    """A YAML like `stage`'s with these fields in its `transformer:` section; its name."""
    values = yaml.safe_load((folder / f"{stage}.yaml").read_text())
    name = "-".join((stage, *fields))
    values["transformer"] = fields
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return name


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """All runs: the CPU's in fp32 and in bf16, the GPU's beside them, each kind in a process of its own."""
    prompt, bf16 = ["--contrastive-image-context", "prompt"], ["--bf16"]
    on_cpu = [
        [
            command(inputs, "finetune", f"cpu{name}", *flags),
            command(inputs, "finetune", f"cpu{name}-prompt", *prompt, *flags),
            command(inputs, "pretrain", f"cpu{name}-pretrain", *flags),
            command(inputs, "finetune", f"cpu{name}-lora", *LORA, *flags),
            *others(inputs, f"cpu{name}", *flags),
        ]
        for name, flags in (("", []), ("16", bf16))
    ]
    saves = ["--save-interval", str(STEPS // 2), "--async-save"]
    profile = ["--profile-step-start", str(STEPS - 4), "--profile-step-end", str(STEPS - 2)]
    on_gpu = [
        command(inputs, "finetune", "fp32"),
        command(inputs, "finetune", "bf16", *bf16, *profile),
        command(inputs, "finetune", "bf16-prompt", *bf16, *prompt),
        command(inputs, "pretrain", "bf16-pretrain", *bf16),
        command(inputs, "finetune", "bf16-lora", *bf16, *LORA),
        *others(inputs, "bf16", *bf16),
        command(inputs, "finetune", "resumed", *bf16, *saves, "--exit-interval", str(STEPS // 2)),
        command(inputs, "finetune", "resumed", *bf16, *saves, "--load", str(inputs / "resumed")),
    ]
    has_te = not REHEARSED and layer_library(torch.device("cuda"), torch.bfloat16) == "transformer_engine"
    if has_te and torch.cuda.get_device_capability() >= (8, 9):
        eight = with_transformer(inputs, "finetune", fp8="hybrid")
        on_gpu += [command(inputs, eight, "fp8", *bf16), command(inputs, eight, "fp8-lora", *bf16, *LORA)]
    thirds = [commands[begin::3] for commands in on_cpu for begin in range(3)]
    runs = [(on_gpu, DEVICE), *((commands, "cpu") for commands in thirds)]
    with ThreadPoolExecutor() as pool:  # the CPU's take longest, and the GPU need not wait for them
        list(pool.map(lambda run: run_distributed(partial(run_each, *run), 1), runs))
    return inputs


def largest_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Of the three losses over all steps, relative to the larger of the loss and 1."""
    assert len(one) == len(other) == STEPS
    found = 0.0
    for a, b in zip(one, other, strict=True):
        for tag in LOSSES:
            assert (tag in a) == (tag in b), (tag, a["iteration"])
            if tag in a:
                assert math.isfinite(b[tag]), (tag, b)
                found = max(found, abs(a[tag] - b[tag]) / max(1.0, abs(a[tag])))
    return found


def test_fp32_losses_are_those_of_the_cpu(finished: Path) -> None:
    """TF32 products, 10 bits of mantissa, would be off by 1e-3 and more."""
    assert largest_difference(metrics(finished / "cpu"), metrics(finished / "fp32")) <= 1e-4


@pytest.mark.parametrize("kind", ["", "-prompt", "-pretrain", "-lora", *(f"-{it}" for it in (*PREFERENCES, *FAMILIES))])
def test_bf16_losses_follow_those_of_the_cpu_in_fp32(finished: Path, kind: str) -> None:
    """Not further off than bf16 on the CPU is, by a factor of 3: the noise of 20 steps in that precision."""
    exact = metrics(finished / f"cpu{kind}")
    noise = largest_difference(exact, metrics(finished / f"cpu16{kind}"))
    difference = largest_difference(exact, metrics(finished / f"bf16{kind}"))
    assert difference <= 3 * noise + 0.01, (difference, noise)
    assert difference > 1e-5, "that was not bfloat16"


def test_dpo_begins_at_log_2_by_scores_of_other_packs(finished: Path) -> None:
    """The scores were made at the run's start, in packs of their own: bf16's noise of a sum over an answer is left."""
    assert metrics(finished / "bf16-dpo")[0]["preference loss"] == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize(("on_cpu", "on_gpu"), [("cpu", "fp8"), ("cpu-lora", "fp8-lora")])
def test_fp8_losses_follow_those_of_the_cpu_in_fp32(finished: Path, on_cpu: str, on_gpu: str) -> None:
    if not (finished / on_gpu).exists():
        pytest.skip("FP8 needs Transformer Engine and a GPU from Ada or Hopper on")
    eight, bf16 = metrics(finished / on_gpu), metrics(finished / on_gpu.replace("fp8", "bf16"))
    assert largest_difference(metrics(finished / on_cpu), eight) <= 0.25
    assert largest_difference(bf16, eight) > 1e-4, "that was not FP8"


def test_a_run_saved_in_the_background_goes_on_where_it_was(finished: Path) -> None:
    """To what flash-attn's backward pass, which adds in any order, leaves."""
    whole, resumed = metrics(finished / "bf16"), metrics(finished / "resumed")
    half = STEPS // 2
    assert largest_difference(whole[:half] * 2, resumed[:half] * 2) <= 0.02
    assert largest_difference(whole, resumed) <= 0.03
    assert latest_checkpoint(finished / "resumed").name == f"iter_{STEPS:07d}"


def test_a_profiled_window_shows_kernels_of_the_gpu(finished: Path) -> None:
    if REHEARSED:
        pytest.skip("no kernels on a CPU")
    (trace,) = (finished / "bf16" / "tensorboard" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) > 100


def test_the_gpus_memory_and_speed_are_logged(finished: Path) -> None:
    if REHEARSED:
        pytest.skip("no GPU")
    last = metrics(finished / "bf16")[-1]
    assert last["mem-max-allocated-bytes"] > 1e6 and last["model-tflops-per-gpu"] > 0
