"""Runs the trainer inside gloo ranks, on tiny real data, and reads back what it left on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hacl_megatron.train import run
from tests.distributed import run_distributed
from tests.tiny import write_tiny_data, write_tiny_llava


def make_inputs(folder: Path, *, samples: int = 48, **model) -> Path:
    """A tiny LLaVA, data, and one YAML per stage in `folder`: 8 samples a step, mixed batches, one micro-batch."""
    write_tiny_llava(folder / "llava", **model)
    data = write_tiny_data(folder / "data", n=samples)
    common = {
        "pretrained-checkpoint": str(folder / "llava"),
        "image-folder": str(data["images"]),
        "global-batch-size": 8,
        "train-iters": 5,
        "lr": 1e-3,
        "model-max-length": 256,
        "max-bad-fraction": 1.0,
        "num-workers": 1,
        "make-vocab-size-divisible-by": 4,
    }
    stages = {
        "pretrain": {"data-path": [str(data["pretrain"])], "version": "plain", "freeze-LM": True},
        "finetune": {
            "data-path": [str(data["finetune"])],
            "contrastive-data-path": [str(data["contrastive"])],
            "version": "v1",
        },
    }
    for name, flags in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **flags}))
    return folder


def layout_flags(layout: str) -> tuple[int, list[str]]:
    """`tp2-pp2` -> (4 processes, flags); parts are tpN, ppN, dpN, sp, and first1 for one layer on the first stage."""
    sizes = {"tp": 1, "pp": 1, "dp": 1}
    flags = []
    for part in layout.split("-"):
        if part == "sp":
            flags.append("--sequence-parallel")
        elif part.startswith("first"):
            flags += ["--decoder-first-pipeline-num-layers", part.removeprefix("first")]
        else:
            sizes[part[:2]] = int(part[2:])
    flags += ["--tensor-model-parallel-size", str(sizes["tp"]), "--pipeline-model-parallel-size", str(sizes["pp"])]
    flags += ["--micro-batch-size", str(8 // sizes["dp"])]
    return sizes["tp"] * sizes["pp"] * sizes["dp"], flags


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        run(command)


def train(commands: Sequence[Sequence[str]], processes: int) -> None:
    """Run several trainings one after another on the same `processes` gloo ranks."""
    run_distributed(_run_all, processes, commands)


def metrics(save: Path) -> list[dict[str, float]]:
    """`metrics.jsonl`, one dictionary an iteration."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def weights(save: Path) -> dict[str, torch.Tensor]:
    """The model's weights (whole, whatever the layout was) in the newest checkpoint of `save`."""
    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    reader = FileSystemReader(str(save / f"iter_{iteration:07d}"))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    load(tensors, storage_reader=reader)
    return tensors
