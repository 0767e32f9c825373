"""Hands each micro-batch from the rank that loaded it to the ranks that share its model replica.

One rank of a replica (rank 0 of its tensor- and context-parallel ones, on the first pipeline stage) reads and decodes;
the others receive. So an image is decoded once a replica, and all ranks agree on which samples were unusable.

    host     sizes, lengths and whatever stays on the host, of all packs of the step in one message
    device   all other integers of all packs in one tensor; pixels to the ranks of the first stage alone

Nothing is read back from the device, and no copy to it is waited for. Where context-parallel ranks share the rows of a
pack, the other integers go by way of the hosts too, which take each rank's share out (`row_shares`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hacl_megatron.assemble.row_shares import share_of_rows
from hacl_megatron.batch import HOST_FIELDS, MicroBatch, PackedBatch, RowShare, SegmentLengths
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.device import to_device
from hacl_megatron.platform.host_groups import broadcast_integers

_INT32_FIELDS = ("cu_seqlens", "read_lengths", "branch_lengths", "branch_sizes")
_FLOAT_FIELDS = {"reference_likelihoods": torch.float64, "pooled_weights": torch.float32}
"""They travel among the integers, bit for bit."""
_BY_FOUR = ("pooled_rows", "pooled_weights")
"""Fields of two dimensions, [n, 4]."""
_SCALAR_FIELDS = tuple(item.name for item in fields(PackedBatch) if item.type is int)
_DEVICE_FIELDS = tuple(
    item.name
    for item in fields(PackedBatch)
    if item.type is Tensor and item.name != "pixel_values" and item.name not in HOST_FIELDS
)

_SHARE_FIELDS = tuple(item.name for item in fields(RowShare) if item.type is Tensor)


def exchange_step(
    micro_batches: Sequence[MicroBatch] | None, module: HaclModel, device: torch.device
) -> list[MicroBatch]:
    """The source's micro-batches, on `device`, on every rank of the replica of `module`.

    The source is rank 0 of it; it is rank 0 of its tensor-parallel group too. Other ranks pass None. Ranks without a
    vision tower get `pixel_values` on the meta device: the shape without the pixels.
    """
    groups = module.groups
    packs = None
    if micro_batches is not None:
        packs = [pack for batch in micro_batches for pack in (batch.main, batch.ahead) if pack is not None]
    if groups.replica.size() == 1 and device.type == "cpu":
        moved = iter([pack.to(device) for pack in packs])
        return [MicroBatch(main=next(moved), ahead=batch.ahead and next(moved)) for batch in micro_batches]

    told = None if packs is None else torch.cat([_header(micro_batches), *map(_facts, packs)])
    if groups.replica.size() > 1:
        told = broadcast_integers(told, groups.replica_host)
    rest = _Reader(told)
    num_micro_batches, has_ahead = rest.numbers(2)
    facts = [_PackFacts.read(rest) for _ in range(num_micro_batches * (1 + has_ahead))]

    is_shared = groups.cp.size() > 1
    integers = _send_integers(packs, facts, module, device)
    received = [
        PackedBatch(
            **of_pack,
            **fact.on_host,
            **fact.scalars,
            lengths=fact.lengths,
            pixel_values=_send_pixels(None if packs is None else packs[index].pixel_values, fact, module, device),
        )
        for index, (of_pack, fact) in enumerate(zip(integers, facts, strict=True))
    ]
    if is_shared:
        received = [_on_device(replace(pack, share=share_of_rows(pack, groups.cp)), device) for pack in received]
    if not has_ahead:
        return [MicroBatch(main=main) for main in received]
    return [MicroBatch(main=main, ahead=ahead) for main, ahead in zip(received[::2], received[1::2], strict=True)]


def _header(micro_batches: Sequence[MicroBatch]) -> Tensor:
    return torch.tensor([len(micro_batches), micro_batches[0].ahead is not None])


def _facts(pack: PackedBatch) -> Tensor:
    """int64 [n]: what every host is told of a pack."""
    sizes = [getattr(pack, name).numel() for name in _DEVICE_FIELDS + HOST_FIELDS]
    scalars = [getattr(pack, name) for name in _SCALAR_FIELDS]
    values = [getattr(pack, name).long() for name in HOST_FIELDS + _INT32_FIELDS]
    return torch.cat([torch.tensor([*sizes, *scalars, pack.num_images]), *values])


class _Reader:
    """Takes a tensor apart from its beginning on."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> Tensor:
        self._at += count
        return self._values[self._at - count : self._at]

    def numbers(self, count: int) -> list[int]:
        return self.take(count).tolist()


@dataclass(frozen=True, kw_only=True)
class _PackFacts:
    """What `_facts` told."""

    sizes: dict[str, int]
    """Elements of each field that goes to the device."""
    on_host: dict[str, Tensor]
    scalars: dict[str, int]
    num_images: int
    lengths: SegmentLengths

    @classmethod
    def read(cls, told: _Reader) -> "_PackFacts":
        sizes = dict(zip(_DEVICE_FIELDS, told.numbers(len(_DEVICE_FIELDS)), strict=True))
        sizes_on_host = told.numbers(len(HOST_FIELDS))
        scalars = dict(zip(_SCALAR_FIELDS, told.numbers(len(_SCALAR_FIELDS)), strict=True))
        (num_images,) = told.numbers(1)
        on_host = {name: told.take(size) for name, size in zip(HOST_FIELDS, sizes_on_host, strict=True)}
        lengths = SegmentLengths.of_tensors(*(told.take(sizes[name]) for name in _INT32_FIELDS))
        return cls(sizes=sizes, on_host=on_host, scalars=scalars, num_images=num_images, lengths=lengths)


def _send_integers(
    packs: Sequence[PackedBatch] | None, facts: Sequence[_PackFacts], module: HaclModel, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Each pack's integer fields on the device of every rank; with context-parallel ranks on its host."""
    groups, sizes = module.groups, [size for fact in facts for size in fact.sizes.values()]
    flat = None
    if packs is not None:
        flat = torch.cat([_as_integers(pack, name) for pack in packs for name in _DEVICE_FIELDS])
    if groups.cp.size() > 1:
        flat = broadcast_integers(flat, groups.replica_host)
    else:
        flat = torch.empty(sum(sizes), dtype=torch.int64, device=device) if flat is None else to_device(flat, device)
        if groups.mp.size() > 1:
            dist.broadcast(flat, dist.get_global_rank(groups.mp, 0), group=groups.mp)
    parts = iter(flat.split(sizes))
    for _ in facts:
        fields_of_pack = dict(zip(_DEVICE_FIELDS, parts, strict=False))
        yield {name: _from_integers(name, part) for name, part in fields_of_pack.items()}


def _as_integers(pack: PackedBatch, name: str) -> Tensor:
    values = getattr(pack, name).flatten()
    return values.double().view(torch.int64) if name in _FLOAT_FIELDS else values.long()


def _from_integers(name: str, part: Tensor) -> Tensor:
    if name in _FLOAT_FIELDS:
        part = part.view(torch.float64).to(_FLOAT_FIELDS[name])
    elif name in _INT32_FIELDS:
        part = part.int()
    return part.view(-1, 4) if name in _BY_FOUR else part


def _on_device(pack: PackedBatch, device: torch.device) -> PackedBatch:
    """A pack and its share, whose integers are on the host, with those on `device` that the model needs there."""

    def moved(record: PackedBatch | RowShare, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: to_device(getattr(record, name), device) for name in names}

    share = replace(pack.share, **moved(pack.share, _SHARE_FIELDS))
    return replace(pack, share=share, **moved(pack, _DEVICE_FIELDS))


def _send_pixels(pixels: Tensor | None, facts: _PackFacts, module: HaclModel, device: torch.device) -> Tensor:
    """A pack's pixels on the ranks with a vision tower; their shape elsewhere."""
    shape, groups = (facts.num_images, 3, module.image_size, module.image_size), module.groups
    group = groups.tp_cp if groups.cp.size() > 1 else groups.tp
    if not module.pre_process:
        return torch.empty(shape, device="meta")
    pixels = torch.empty(shape, device=device) if pixels is None else to_device(pixels, device)
    if group.size() > 1 and facts.num_images:
        dist.broadcast(pixels, dist.get_global_rank(group, 0), group=group)
    return pixels
