"""Hands each micro-batch from the rank that loaded it to the ranks that share its model replica.

One rank of a replica (tensor-parallel rank 0 of the first pipeline stage) reads and decodes; the others receive. So an
image is decoded once a replica, and all ranks agree on which samples were unusable. All integer fields travel as one
tensor; pixels go to the tensor-parallel ranks of the first stage alone.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from hacl_megatron.batch import MicroBatch, PackedBatch
from hacl_megatron.model.hacl import HaclModel

_INTEGER_FIELDS = [item.name for item in fields(PackedBatch) if item.type is Tensor and item.name != "pixel_values"]
_INT32_FIELDS = ("cu_seqlens", "read_lengths", "branch_lengths")
_SCALAR_FIELDS = [item.name for item in fields(PackedBatch) if item.type is int]


def exchange_step(
    micro_batches: Sequence[MicroBatch] | None, module: HaclModel, device: torch.device
) -> list[MicroBatch]:
    """The source's micro-batches, on `device`, on every rank of the model-parallel group of `module`.

    The source is rank 0 of that group; it is rank 0 of its tensor-parallel group too. Other ranks pass None. Ranks
    without a vision tower get `pixel_values` on the meta device: the shape without the pixels.
    """
    group = module.groups.mp
    header = torch.zeros(2, dtype=torch.int64, device=device)
    if micro_batches is not None:
        header.copy_(torch.tensor([len(micro_batches), micro_batches[0].ahead is not None]))
    if group.size() > 1:
        dist.broadcast(header, dist.get_global_rank(group, 0), group=group)
    num_micro_batches, has_ahead = header.tolist()
    received = []
    for index in range(num_micro_batches):
        batch = micro_batches[index] if micro_batches is not None else None
        main = _exchange_pack(batch.main if batch is not None else None, module, device)
        ahead = _exchange_pack(batch.ahead if batch is not None else None, module, device) if has_ahead else None
        received.append(MicroBatch(main=main, ahead=ahead))
    return received


def _exchange_pack(batch: PackedBatch | None, module: HaclModel, device: torch.device) -> PackedBatch:
    group, tp_group = module.groups.mp, module.groups.tp
    if group.size() == 1:
        assert batch is not None
        return batch.to(device)
    source = dist.get_global_rank(group, 0)
    header = torch.zeros(len(_INTEGER_FIELDS) + len(_SCALAR_FIELDS) + 1, dtype=torch.int64, device=device)
    if batch is not None:
        sizes = [getattr(batch, name).numel() for name in _INTEGER_FIELDS]
        scalars = [getattr(batch, name) for name in _SCALAR_FIELDS]
        header.copy_(torch.tensor([*sizes, *scalars, batch.num_images]))
    dist.broadcast(header, source, group=group)
    *numbers, num_images = header.tolist()
    sizes, scalars = numbers[: len(_INTEGER_FIELDS)], numbers[len(_INTEGER_FIELDS) :]

    flat = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    if batch is not None:
        flat.copy_(torch.cat([getattr(batch, name).long() for name in _INTEGER_FIELDS]))
    dist.broadcast(flat, source, group=group)
    integers = dict(zip(_INTEGER_FIELDS, flat.split(sizes), strict=True))
    for name in _INT32_FIELDS:
        integers[name] = integers[name].int()

    pixels_device = device if module.pre_process else torch.device("meta")
    pixels = torch.empty(num_images, 3, module.image_size, module.image_size, device=pixels_device)
    if module.pre_process and num_images:
        if batch is not None:
            pixels.copy_(batch.pixel_values)
        if tp_group.size() > 1:
            dist.broadcast(pixels, dist.get_global_rank(tp_group, 0), group=tp_group)
    return PackedBatch(**integers, **dict(zip(_SCALAR_FIELDS, scalars, strict=True)), pixel_values=pixels)


def global_sums(values: Sequence[float], *, group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Element-wise sums of `values` over `group`, in float64, as host numbers."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.tolist()
