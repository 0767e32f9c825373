"""What a checkpoint holds beside the weights, and how a run comes back from it.

Everything here is the same on all ranks or sharded by megatron-core, so that a run resumes at any layout: weights,
optimiser, schedule, position in the data, counters, and the random states (restored at the same layout alone,
where they make the resumed run bitwise equal).
"""

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.dist_checkpointing.mapping import ShardedObject

from hacl_megatron.checkpoint.run import extra_states
from hacl_megatron.checkpoint.run.load import (
    COMMON_FILE,
    load_checkpoint,
    load_common_state,
    state_metadata,
    stored_keys,
)
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.random_state import random_states, set_random_states
from hacl_megatron.training.optimizer.schedule import (
    RunLength,
    groups_kept,
    load_optimizer,
    load_schedule,
    optimizer_parts,
    without_groups,
)
from hacl_megatron.training.optimizer.shards import ShardsToLoad, shards_to_save
from hacl_megatron.training.trainee import Trainee


@dataclass
class Progress:
    """How far a run has come. Plain values, the same on every rank."""

    iteration: int = 0
    """Optimiser steps done, skipped ones included."""
    drawn_samples: int = 0
    """Samples drawn from the data so far."""
    bad_samples: int = 0
    """Of these, unusable ones (`bad_samples.jsonl`)."""
    untrained_samples: int = 0
    """Of these, usable ones that train nothing: no target token and no pair (`bad_samples.jsonl`, in a class of their
    own)."""
    untrained_kinds: dict[str, int] = field(default_factory=dict)
    """How many of these there are of each kind, the reason as `EncodedSample.untrained` has it."""
    targetless_steps: int | None = 0
    """Steps without a target token or a pair since the run began; None once a step had one."""
    twinless_steps: int | None = 0
    """Steps with a likelihood objective and without a twin to compare, likewise."""
    uncompared_twins: int = 0
    """Twins of the samples drawn that gave a likelihood objective nothing (`bad_samples.jsonl`, likewise)."""
    tokenization_mismatches: int = 0
    """Dialogues whose labels were all ignored by LLaVA's mismatch rule."""
    truncated_dialogues: int = 0
    """Dialogues cut at `--model-max-length`."""
    skipped_steps: int = 0
    """Steps not applied because loss or gradients were not finite."""
    consecutive_skips: int = 0
    samples_a_step: float | None = None
    """`RunLength.samples_a_step`."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Where a run stands when its loop begins, and how far it is to go."""

    progress: Progress
    data_state: dict[str, Any]
    """Of the sampler; {} at the start of a run."""
    num_samples: int
    """Samples of an epoch."""
    length: RunLength
    changes: tuple[str, ...] = ()
    """Lines on what is not as in the run that is resumed."""


def run_state(trainee: Trainee, progress: Progress, data_state: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict of the whole run, for saving."""
    weights = trainee.module.sharded_state_dict(metadata=state_metadata())
    if trainee.optimizer.config.use_distributed_optimizer:
        optimizer = {
            "optimizer": trainee.optimizer.state_dict(),
            "optimizer_shards": shards_to_save(optimizer_parts(trainee.optimizer), weights),
        }
    else:
        optimizer = {
            "optimizer": trainee.optimizer.sharded_state_dict(weights, is_loading=False, metadata=state_metadata())
        }
    return {
        "model": weights,
        **optimizer,
        "scheduler": trainee.scheduler.state_dict(),
        "progress": asdict(progress),
        "data_state": data_state,
        "layout": _layout(trainee),
        "optimizer_kind": _optimizer_kind(trainee),
        "random_states": _sharded_random_states(trainee),
        "has_queue": trainee.has_queue,
        **_sharded_queue(trainee),
    }


def saved_progress(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Counters and data position of a checkpoint, without its tensors; ValueError when it holds weights alone."""
    common = load_common_state(folder)
    if "progress" not in common:
        raise ValueError(
            f"--load {folder} holds converted weights and no run to resume: give it as --pretrained-checkpoint"
        )
    counters, fresh = _held(common, "progress", dict, folder), asdict(Progress())
    for key, value in counters.items():
        kind = dict if isinstance(fresh.get(key), dict) else int | float | None
        if key not in fresh or not isinstance(value, kind):
            raise ValueError(
                f"{folder / COMMON_FILE}: `progress` has {key!r:.40} with {value!r:.40}, expected {', '.join(fresh)}, "
                "as this version counts; the checkpoint is damaged, or of another version: load another iter_* folder"
            )
    return Progress(**counters), _held(common, "data_state", dict, folder)


def restore_run(trainee: Trainee, folder: Path, length: RunLength) -> list[str]:
    """Load weights, optimiser, schedule, queue of negatives and, at the same layout, random states from a checkpoint.

    A run that goes on with a queue where there was none starts it empty. Layers' extra states that the checkpoint lacks
    start fresh, and what it has beside this model's is passed over.

    Returns:
        Lines for the user: on FP8 scales that were not there or are of no use, on a learning rate that jumps.

    Raises:
        ValueError: the checkpoint is damaged, of another model, or its optimiser state of another kind.
    """
    common = load_common_state(folder)
    saved_kind, kind = _held(common, "optimizer_kind", list, folder), _optimizer_kind(trainee)
    if saved_kind != kind:
        flags = ("--use-distributed-optimizer", "--bf16")
        found, here = (
            ", ".join(f"{flag} {str(value).lower()}" for flag, value in zip(flags, values, strict=False))
            for values in (saved_kind, kind)
        )
        raise ValueError(
            f"checkpoint {folder} was saved with {found}, this run has {here}: optimiser state does not convert; "
            "resume with the flags it was saved with, or take the weights alone with --pretrained-checkpoint"
        )
    for key in ("optimizer", "scheduler"):
        _held(common, key, dict | list, folder)
    same_layout = _held(common, "layout", list, folder) == _layout(trainee)
    weights = trainee.module.sharded_state_dict(metadata=state_metadata())
    shards = None
    with groups_kept(trainee.optimizer):
        if trainee.optimizer.config.use_distributed_optimizer:
            shards = ShardsToLoad(optimizer_parts(trainee.optimizer), weights)
            wanted = {"optimizer_shards": shards.wanted}
        else:
            optimizer = trainee.optimizer.sharded_state_dict(weights, is_loading=True, metadata=state_metadata())
            wanted = {"optimizer": without_groups(optimizer)}
        wanted["model"] = extra_states.without_absent(weights, stored_keys(folder))
        if same_layout:
            wanted["random_states"] = _sharded_random_states(trainee)
        if common.get("has_queue"):
            wanted |= _sharded_queue(trainee)
        state = load_checkpoint(wanted, folder)
        note = _load_weights(trainee.module, state["model"])
        load_optimizer(trainee.optimizer, state["optimizer"])
        if shards is not None:
            shards.take_over()
    if "queue" in state:
        trainee.queue.load_state_dict(state["queue"])
    # After the groups, so that the schedule computes each one's rate.
    jump = load_schedule(trainee.scheduler, state["scheduler"], length)
    if same_layout:
        _restore_random_states(state["random_states"])
    return [line for line in (note, jump) if line is not None]


def _held(common: dict[str, Any], key: str, kind: Any, folder: Path) -> Any:
    """What a checkpoint holds under a key beside its tensors."""
    if not isinstance(common.get(key), kind):
        raise ValueError(
            f"{folder / COMMON_FILE}: found {common.get(key)!r:.60} for `{key}`, expected what a run saves there; the "
            "checkpoint is damaged: load another iter_* folder"
        )
    return common[key]


def _load_weights(module: HaclModel, weights: dict[str, Any]) -> str | None:
    config = module.config
    note = extra_states.take_out_scales(weights, used=bool(config.fp8) and config.fp8_recipe == "delayed")
    with extra_states.pickled_scales_allowed():
        found = module.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(extra_states.SUFFIX)]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
    return note


def _layout(trainee: Trainee) -> list[int]:
    groups = trainee.groups
    context = [groups.cp.size()] if groups.cp.size() > 1 else []  # as checkpoints without it have been
    return [groups.tp.size(), groups.pp.size(), groups.dp.size(), *context]


def _optimizer_kind(trainee: Trainee) -> list[bool]:
    """What decides which tensors megatron-core's optimisers save: distributed or not, master weights or not."""
    config = trainee.optimizer.config
    return [config.use_distributed_optimizer, config.bf16]


def _sharded_random_states(trainee: Trainee) -> ShardedObject:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        **random_states(),
    }
    groups = trainee.groups
    axes = (groups.pp, groups.tp, groups.dp_cp)
    sizes, ranks = tuple(axis.size() for axis in axes), tuple(axis.rank() for axis in axes)
    return ShardedObject("random_states", states, sizes, ranks)


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    set_random_states(states)


def _sharded_queue(trainee: Trainee) -> dict[str, Any]:
    """The queue of negatives, the same on all ranks of the last stage: as one object, since its length varies."""
    queue, groups = trainee.queue, trainee.groups
    if queue is None:
        return {}
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    return {"queue": ShardedObject("queue", queue.state_dict(), (1,), (0,), replica_id=replica)}
