"""The distributed optimiser's state in a checkpoint: each rank writes and reads its own shard, as rectangles.

megatron-core's optimiser holds, on each data-parallel rank, a run of consecutive values of each parameter: fp32 master
weights and two moments. A run is a few rectangles of the parameter, and a rectangle has a place in the global tensor.
So nothing is gathered, no rank holds more than its own 12 bytes a value, and every layout finds what it needs. The
names are those of megatron-core's `fully_reshardable` format, whose checkpoints are read too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from hacl_megatron.checkpoint.run.local_parts import flat_blocks

_STATES = ("param", "exp_avg", "exp_avg_sq")


def shards_to_save(parts: list[MegatronOptimizer], weights: dict[str, Any]) -> dict[str, ShardedTensor]:
    """This rank's shard of the optimisers' state; the tensors are the optimiser's own wherever they are fp32.

    Args:
        parts: megatron-core's optimisers; those that are not distributed have nothing here.
        weights: sharded state dict of the model.
    """
    places = _places(weights)
    return {
        name: sharded
        for part, parameter, start, stop in _runs(parts)
        for state, values in _states(part, parameter).items()
        for name, sharded in _rectangles(places[parameter], state, values, start, stop)
    }


class ShardsToLoad:
    """Memory for this rank's shard: `wanted` is what to load, and `take_over` puts what was loaded in its place."""

    def __init__(self, parts: list[MegatronOptimizer], weights: dict[str, Any]) -> None:
        self.wanted: dict[str, ShardedTensor] = {}
        self._loaded: list[tuple[DistributedOptimizer, torch.nn.Parameter, dict[str, Tensor]]] = []
        places = _places(weights)
        for part, parameter, start, stop in _runs(parts):
            tensors = {state: torch.empty(stop - start) for state in _STATES}
            self._loaded.append((part, parameter, tensors))
            for state, values in tensors.items():
                self.wanted |= dict(_rectangles(places[parameter], state, values, start, stop))

    @torch.no_grad()
    def take_over(self) -> None:
        """Copy the loaded values into the optimisers."""
        for part, parameter, tensors in self._loaded:
            device = parameter.device
            part._set_main_param_and_optimizer_states(parameter, {k: v.to(device) for k, v in tensors.items()})


def _runs(parts: list[MegatronOptimizer]) -> Iterator[tuple[DistributedOptimizer, torch.nn.Parameter, int, int]]:
    """(optimiser, parameter, first value, last value + 1) of everything that this rank updates."""
    for part in parts:
        if not isinstance(part, DistributedOptimizer):
            continue
        for buckets_by_dtype in part.gbuf_ranges:
            for buckets in buckets_by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield part, parameter, ranges["param"].start, ranges["param"].end


def _states(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    tensors = part._get_main_param_and_optimizer_states(parameter)
    return {state: tensors[state].detach().float().view(-1) for state in _STATES}


def _places(weights: dict[str, Any]) -> dict[torch.nn.Parameter, ShardedTensor | ShardedTensorFactory]:
    return {
        sharded.data: sharded
        for sharded in nested_values(weights)
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory)
    }


def _rectangles(
    place: ShardedTensor | ShardedTensorFactory, state: str, values: Tensor, start: int, stop: int
) -> Iterator[tuple[str, ShardedTensor]]:
    """Values `start` to `stop` of a parameter, as rectangles of the global tensor of one state."""
    main = not any(place.replica_id[:-1])  # whose values are the same on several tensor-parallel ranks, one rank writes
    for piece in _pieces(place):
        # A piece is a run of the parameter's values: all of them, or the gate's or the up projection's.
        first = piece.data.storage_offset()
        sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        begin, end = max(start, first), min(stop, first + piece.data.numel())
        for offsets, block, position in flat_blocks(sizes, begin - first, end - first):
            at = begin - start + position
            rectangle = values[at : at + torch.Size(block).numel()].view(block)
            where = tuple(a + b for a, b in zip(piece.global_offset, offsets, strict=True))
            key = f"optimizer.state.{state}.{piece.key}"
            yield (
                f"{key}@{'.'.join(map(str, where))}",
                ShardedTensor(
                    key,
                    rectangle,
                    rectangle.dtype,
                    block,
                    tuple(piece.global_shape),
                    where,
                    axis_fragmentations=None,
                    replica_id=0 if main else 1,
                    allow_shape_mismatch=piece.allow_shape_mismatch,
                ),
            )


def _pieces(place: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """What a parameter is in the checkpoint, on memory-less tensors that only know which part of it they are."""
    shape = torch.empty(place.data.shape, dtype=place.data.dtype, device="meta")
    if isinstance(place, ShardedTensor):
        return [replace(place, data=shape)]
    pieces = list(nested_values(replace(place, data=shape).build()))
    assert all(piece.data.is_contiguous() for piece in pieces), place.key
    return pieces
