"""Which rank writes what: together the data-parallel ranks write each part once, and each about as many bytes."""

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from hacl_megatron.checkpoint.run.local_parts import frozen_keys, local_parts
from hacl_megatron.checkpoint.run.part_files import Part

SIZES = {"a": 600, "b": 500, "c": 400, "d": 300, "e": 200, "f": 100, "g": 100}


def state(replica: int, tensor_rank: int = 0) -> dict[str, Any]:
    """What a data-parallel rank of a model without tensor or pipeline parallelism holds."""

    def alike(key: str, size: int, *offsets: tuple[int, int, int]) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key, torch.full((size,), float(size)), *offsets, replica_id=(0, tensor_rank, replica)
        )

    return {
        **{key: alike(key, size) for key, size in SIZES.items()},
        "halves": [alike("halves", 250, (0, half, 2)) for half in (0, 1)],
        "alone": ShardedTensor.from_rank_offsets("alone", torch.ones(7), replica_id=replica),
        "shard": ShardedTensor.from_rank_offsets("shard", torch.full([5], float(replica)), (0, replica, 3)),
        "object": ShardedObject("object", {"held": 1}, (1,), (0,), replica_id=(0, 0, replica)),
        "step": 5,
    }


def place(part: Part) -> tuple[str, tuple[int, ...]]:
    return part.key, part.offsets


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_together_the_replicas_write_everything_once(num_replicas: int) -> None:
    """Catches ranks that write what is another's, which only three or more of them tell from their own turn."""
    written = [local_parts(state(r), replica=r, num_replicas=num_replicas)[0] for r in range(num_replicas)]
    everything = [place(part) for parts in written for part in parts]
    assert len(everything) == len(set(everything))
    shards = {("shard", (5 * replica,)) for replica in range(num_replicas)}
    expected = {*((key, (0,)) for key in SIZES), ("halves", (0,)), ("halves", (250,)), ("alone", (0,)), *shards}
    assert {one for one in everything if not one[0].startswith("object")} == expected
    assert sum(key.startswith("object") for key, _ in everything) == 1
    for replica, parts in enumerate(written):
        assert [part.values.tolist() for part in parts if part.key == "shard"] == [[float(replica)] * 5]
        whole = [part for part in parts if part.key in SIZES]
        assert all(part.global_shape == (SIZES[part.key],) for part in whole)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_each_writes_about_as_many_bytes(num_replicas: int) -> None:
    loads = []
    for replica in range(num_replicas):
        parts, common = local_parts(state(replica), replica=replica, num_replicas=num_replicas)
        loads.append(sum(part.values.nbytes for part in parts if part.key in {*SIZES, "halves"}))
        assert common == {"step": 5}
    assert max(loads) - min(loads) <= 4 * 100, "the smallest part"


def test_what_another_tensor_rank_holds_alike_is_left_to_the_first() -> None:
    parts, _ = local_parts(state(0, tensor_rank=1), replica=0, num_replicas=2)
    assert {part.key for part in parts if isinstance(part.values, torch.Tensor)} == {"alone", "shard"}


def test_parts_are_views_of_as_many_dims_as_their_tensor() -> None:
    """Layer 3 of 4, each [2, 3], stacked: a rectangle [1, 2, 3]."""
    values = torch.arange(6.0).view(2, 3)
    stacked = ShardedTensor.from_rank_offsets("layers", values, (0, 3, 4), prepend_axis_num=1)
    ((part,), common) = local_parts({"layers": stacked})
    assert (part.offsets, part.global_shape, tuple(part.values.shape)) == ((3, 0, 0), (4, 2, 3), (1, 2, 3))
    assert part.values.data_ptr() == values.data_ptr() and common == {}


def test_a_key_is_frozen_where_nothing_of_it_trains() -> None:
    """A stacked key with a layer that trains is none; a buffer or a queue, which changes, is none either."""

    def sharded(key: str, *, trains: bool, buffer: bool = False, layer: int = 0) -> ShardedTensor:
        values = torch.zeros(2) if buffer else torch.nn.Parameter(torch.zeros(2), requires_grad=trains)
        return ShardedTensor.from_rank_offsets(key, values, (0, layer, 2), prepend_axis_num=1)

    weights = {
        "tower": sharded("tower", trains=False),
        "connector": sharded("connector", trains=True),
        "buffer": sharded("buffer", trains=False, buffer=True),
        "layers.0": sharded("layers", trains=False),
        "layers.1": sharded("layers", trains=True, layer=1),
        "object": ShardedObject("object", None, (1,), (0,)),
    }
    assert frozen_keys(weights) == {"tower"}
