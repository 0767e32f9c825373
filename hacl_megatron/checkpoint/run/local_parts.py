"""What one rank contributes to a checkpoint: a sharded state dict of megatron-core -> the parts that this rank writes.

A part is a rectangle of a global tensor, or an object. What data-parallel ranks hold alike is divided among them, so
that all of them write; what each holds of its own (the shards of a distributed optimiser) it writes itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from hacl_megatron.checkpoint.run.part_files import Part, serialized


def local_parts(state: dict[str, Any], *, replica: int = 0, num_replicas: int = 1) -> tuple[list[Part], dict[str, Any]]:
    """The parts that this rank writes, and what is neither tensor nor sharded object (the same on all ranks).

    Tensors are not copied.

    Args:
        state: fresh, for megatron-core changes it in place.
        replica: this rank's among the `num_replicas` data-parallel (and context-parallel) ranks, which hold the same.
    """
    sharded_state, common = save_preprocess(state, validate_access_integrity=False)
    own: list[Part] = []
    alike: list[ShardedTensor] = []
    for sharded in nested_values(sharded_state):
        replica_id = sharded.replica_id
        if isinstance(sharded, ShardedObject):
            if is_main_replica(replica_id):
                # A list of one, as megatron-core stores it.
                own.append(Part(key=sharded.unique_key, values=serialized([sharded.data])))
        elif num_replicas > 1 and isinstance(replica_id, tuple):
            if not any(replica_id[:-1]):  # the last coordinate is the data-parallel rank
                alike.append(sharded)
        elif is_main_replica(replica_id):
            own.append(_part(sharded))
    # The same list on every data-parallel rank, and so the same division.
    written = [0] * num_replicas
    for sharded in sorted(alike, key=lambda s: (-s.data.nbytes, s.key, s.global_offset)):
        writer = written.index(min(written))
        written[writer] += sharded.data.nbytes
        if writer == replica:
            own.append(_part(sharded))
    return own, common


def frozen_keys(weights: dict[str, Any]) -> frozenset[str]:
    """Keys of the model's sharded state dict under which this rank holds nothing but parameters that do not train."""
    frozen: set[str] = set()
    trained: set[str] = set()
    for sharded in nested_values(weights):
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            is_frozen = isinstance(sharded.data, torch.nn.Parameter) and not sharded.data.requires_grad
            (frozen if is_frozen else trained).add(sharded.key)
    return frozenset(frozen - trained)


def flat_blocks(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Rectangles that elements `start` to `stop` (not included) of a row-major tensor make up, in order.

    Yields (offsets, sizes, first element counted from `start`), at most 2 x dims - 1 times: for [4, 3] and 2..10 these
    are ((0, 2), (1, 1), 0), ((1, 0), (2, 3), 1) and ((3, 0), (1, 1), 7).
    """
    if start >= stop:
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # inside one row
        yield from _row(shape, start // inner, start % inner, stop - start // inner * inner, 0)
        return
    yield from _row(shape, first - 1, start - (first - 1) * inner, inner, 0) if start < first * inner else ()
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * inner - start
    yield from _row(shape, last, 0, stop - last * inner, last * inner - start) if last * inner < stop else ()


def _row(shape, row: int, start: int, stop: int, shift: int):
    for offsets, sizes, position in flat_blocks(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes), position + shift


def _part(sharded: ShardedTensor) -> Part:
    sizes = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
    return Part(
        key=sharded.key,
        values=sharded.data.detach().view(sizes),
        offsets=tuple(sharded.global_offset),
        global_shape=tuple(sharded.global_shape),
    )
