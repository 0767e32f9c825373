"""Extra states: what a layer saves beside its tensors, and what a run that resumes makes of another run's.

megatron-core's linear layers save an empty one each, Transformer Engine's linear layers and norms too; so a checkpoint
lacks some of those that the model has, or holds some that it has not, whenever the one was made with Transformer Engine
and the other is not, or by another version of either. Only FP8 with delayed scaling puts something in: each linear
layer's scales and the largest values of its last steps, pickled into a tensor of bytes.
"""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from hacl_megatron.checkpoint.run.stored.pickles import check_scales, safe_storage

SUFFIX = "_extra_state"


def without_absent(weights: dict[str, Any], stored: Set[str]) -> dict[str, Any]:
    """A model's sharded state dict without the extra states that are not among the keys of a checkpoint."""

    def is_absent(name: str, part: Any) -> bool:
        return name.endswith(SUFFIX) and isinstance(part, ShardedObject) and part.unique_key not in stored

    return {name: part for name, part in weights.items() if not is_absent(name, part)}


def take_out_scales(weights: dict[str, Any], *, used: bool) -> str | None:
    """Leave FP8 scales out of a loaded state dict where they are of no use; a line for the user on what is unexpected.

    Args:
        weights: by names of the module; changed in place.
        used: whether the run computes in FP8 with delayed scaling.

    Raises:
        ValueError: the scales are used, and something else than Transformer Engine pickled them.
    """
    scales = [name for name, value in weights.items() if name.endswith(SUFFIX) and holds_scales(value)]
    if used:
        for name in scales:
            check_scales(weights[name], name)
        return None if scales else "the checkpoint holds no FP8 scales: delayed scaling starts with fresh ones"
    for name in scales:
        weights[name] = None
    return "the checkpoint's FP8 scales are left out: this run does not use delayed scaling" if scales else None


def holds_scales(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


@contextmanager
def pickled_scales_allowed() -> Iterator[None]:
    """Inside, Transformer Engine (from 2.20 on) loads the scales that it pickled; else it refuses every one.

    It gets none that `take_out_scales` has not looked through. torch's storages in them are read by its safe reader.
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with mock.patch.object(torch.storage, "_load_from_bytes", safe_storage):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
