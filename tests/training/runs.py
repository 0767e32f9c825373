"""Runs the trainer inside gloo ranks, on tiny real data, and reads back what it left on disk."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import Blip2Config, LlavaConfig

from hacl_megatron.train import run
from tests.distributed import leave_groups, run_distributed
from tests.model.hf_architecture import architecture
from tests.tiny import image_token_id, sentencepiece_model, tiny_tokenizer, write_tiny_llava
from tests.tiny_data import write_tiny_data

LOSSES = ("lm loss", "contrastive loss i2t", "contrastive loss t2i")


def make_inputs(folder: Path, *, samples: int = 48, **model) -> Path:
    """A tiny LLaVA, data, and one YAML per stage in `folder`: 8 samples a step, mixed batches, one micro-batch."""
    write_tiny_llava(folder / "llava", **model)
    return _write_stages(folder, samples, {"pretrained-checkpoint": str(folder / "llava")})


def make_hf_inputs(folder: Path, config: Blip2Config | LlavaConfig, *, samples: int = 48) -> Path:
    """The same for a model with parts of transformers, which starts from random weights in a checkpoint of ours.

    The random weights of a LLaMA depend on the layout, so a run whose rate moves nothing saves those of one process.
    """
    given = write_hf_stages(folder, config, samples=samples)
    start = ["--config", str(folder / "pretrain.yaml"), "--save", str(folder / "start"), "--lr", "1e-30"]
    train([[*start, "--train-iters", "1", *layout_flags("tp1")[1]]], 1)
    del given["model"]
    return _write_stages(folder, samples, {**given, "pretrained-checkpoint": str(folder / "start")})


def write_hf_stages(folder: Path, config: Blip2Config | LlavaConfig, *, samples: int = 48) -> dict[str, Any]:
    """Data and one YAML per stage for random weights of such a model; returns what both files have beside flags."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(config.text_config.vocab_size).save_pretrained(folder / "tokenizer")
    shutil.copy(sentencepiece_model(image_token_id(config.text_config.vocab_size)), folder / "tokenizer")
    given = {
        "tokenizer": str(folder / "tokenizer"),
        "image-aspect-ratio": "stretch",
        "transformer": {"init_method_std": 0.1},
        "model": asdict(architecture(config)),
    }
    _write_stages(folder, samples, given)
    return given


def _write_stages(folder: Path, samples: int, given: dict[str, Any]) -> Path:
    data = write_tiny_data(folder / "data", n=samples)
    common = {
        **given,
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


def layout_flags(layout: str, *, samples: int = 8) -> tuple[int, list[str]]:
    """`tp2-pp2` -> (4 processes, flags); parts are tpN, ppN, dpN, cpN, sp, dist (distributed optimiser) and first1 for
    one layer on the first stage, share or split (`--vision-parallel`). One micro-batch of `samples` over all ranks."""
    sizes = {"tp": 1, "pp": 1, "dp": 1, "cp": 1}
    flags = []
    for part in layout.split("-"):
        if part == "sp":
            flags.append("--sequence-parallel")
        elif part == "dist":
            flags.append("--use-distributed-optimizer")
        elif part in ("share", "split"):
            flags += ["--vision-parallel", part]
        elif part.startswith("first"):
            flags += ["--decoder-first-pipeline-num-layers", part.removeprefix("first")]
        else:
            sizes[part[:2]] = int(part[2:])
    flags += ["--tensor-model-parallel-size", str(sizes["tp"]), "--pipeline-model-parallel-size", str(sizes["pp"])]
    flags += ["--context-parallel-size", str(sizes["cp"])] * (sizes["cp"] > 1)
    flags += ["--micro-batch-size", str(samples // sizes["dp"])]
    return math.prod(sizes.values()), flags


def _run_all(commands: Sequence[Sequence[str] | Callable[[], None]]) -> None:
    for command in commands:
        command() if callable(command) else run(command)
        leave_groups()


def train(commands: Sequence[Sequence[str] | Callable[[], None]], processes: int) -> None:
    """Run several trainings one after another on the same `processes` gloo ranks.

    A command is a list of flags, or a module-level function (or a `partial` of one) that runs a training itself.
    """
    run_distributed(_run_all, processes, commands)


def run_with_signal(command: Sequence[str], *, iteration: int, rank: int, number: int = signal.SIGTERM) -> None:
    """Train, and let `rank` get a signal while it reports `iteration`, as a scheduler or a user would send it."""
    from hacl_megatron.training.loop import Trainer

    report = Trainer._report

    def report_and_signal(self: Trainer, *arguments: Any) -> None:
        report(self, *arguments)
        if self.progress.iteration == iteration and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), number)

    with mock.patch.object(Trainer, "_report", report_and_signal):
        run(command)


def signalled(command: Sequence[str], **when: int) -> Callable[[], None]:
    """`run_with_signal` as a command for `train`."""
    return partial(run_with_signal, command, **when)


def run_refused(command: Sequence[str], words: Sequence[str]) -> None:
    """Train, and see it refused in one line that holds `words`."""
    with pytest.raises(ValueError) as refusal:
        run(command)
    parallel_state.destroy_model_parallel()
    line = str(refusal.value)
    assert "\n" not in line, line
    assert all(word in line for word in words), line


def refused(command: Sequence[str], *words: str) -> Callable[[], None]:
    """`run_refused` as a command for `train`."""
    return partial(run_refused, command, words)


def metrics(save: Path) -> list[dict[str, float]]:
    """`metrics.jsonl`, one dictionary an iteration."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def latest_checkpoint(save: Path) -> Path:
    """Folder of the checkpoint that `save` names as its newest."""
    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    return save / f"iter_{iteration:07d}"


def tensors(save: Path) -> dict[str, torch.Tensor]:
    """All tensors (weights and optimiser state, whole whatever the layout was) in the newest checkpoint of `save`."""
    reader = FileSystemReader(str(latest_checkpoint(save)))
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def weights(save: Path) -> dict[str, torch.Tensor]:
    """The model's weights in the newest checkpoint of `save`."""
    return {name: tensor for name, tensor in tensors(save).items() if not name.startswith("optimizer.")}


def common_state(save: Path) -> dict[str, Any]:
    """What the newest checkpoint of `save` holds beside tensors: counters, schedule, parameter groups, data state."""
    return load_common_state_dict(str(latest_checkpoint(save)))


def assert_same_run(expected: Path, found: Path, tags: Sequence[str]) -> None:
    """Two whole runs of 5 steps give the same metrics and weights, but for rounding."""
    one_run, other_run = metrics(expected), metrics(found)
    assert len(one_run) == len(other_run) == 5
    for one, many in zip(one_run, other_run, strict=True):
        for tag in tags:
            assert math.isclose(one[tag], many[tag], rel_tol=1e-4, abs_tol=1e-6), (one["iteration"], tag, one, many)

    one, many = weights(expected), weights(found)
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        # Adam's first steps are lr * sign(gradient): an entry whose gradient is all rounding may go either way, by
        # up to 2 * lr a step. So entries may differ by a few lr = 1e-3, but hardly any do: one, or one in a hundred.
        difference = (tensor - many[name]).abs()
        assert difference.max() <= 6e-3, name
        # Those of keys shift all scores alike: all of their gradient is rounding.
        if name.endswith((".key.bias", ".k_proj.bias")) or (name.startswith("vision_tower.") and "qkv.bias" in name):
            continue
        different = int((difference > 2e-5).sum())
        assert different <= max(1, 0.01 * tensor.numel()), (name, different)


def assert_same_state(expected: Path, found: Path) -> None:
    """The newest checkpoints of two runs hold bitwise equal tensors and equal counters, groups and schedules."""
    one, other = tensors(expected), tensors(found)
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer.") for name in one)
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different, different
    assert common_state(expected) == common_state(found)
