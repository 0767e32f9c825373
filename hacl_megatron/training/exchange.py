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

from hacl_megatron.batch import PackedBatch

_INTEGER_FIELDS = [item.name for item in fields(PackedBatch) if item.type is Tensor and item.name != "pixel_values"]
_SCALAR_FIELDS = [item.name for item in fields(PackedBatch) if item.type is int]


def exchange_batch(
    batch: PackedBatch | None,
    *,
    model_parallel_group: dist.ProcessGroup,
    tensor_parallel_group: dist.ProcessGroup,
    holds_vision_tower: bool,
    image_size: int,
    device: torch.device,
) -> PackedBatch:
    """The source's `batch`, on `device`, on every rank of the model-parallel group.

    The source is rank 0 of `model_parallel_group`; it is rank 0 of its `tensor_parallel_group` too. Other ranks pass
    None. Ranks without a vision tower get `pixel_values` on the meta device: the shape without the pixels.
    """
    if model_parallel_group.size() == 1:
        assert batch is not None
        return batch.to(device)
    source = dist.get_global_rank(model_parallel_group, 0)
    header = torch.zeros(len(_INTEGER_FIELDS) + len(_SCALAR_FIELDS) + 1, dtype=torch.int64, device=device)
    if batch is not None:
        sizes = [getattr(batch, name).numel() for name in _INTEGER_FIELDS]
        scalars = [getattr(batch, name) for name in _SCALAR_FIELDS]
        header.copy_(torch.tensor([*sizes, *scalars, batch.num_images]))
    dist.broadcast(header, source, group=model_parallel_group)
    *numbers, num_images = header.tolist()
    sizes, scalars = numbers[: len(_INTEGER_FIELDS)], numbers[len(_INTEGER_FIELDS) :]

    flat = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    if batch is not None:
        flat.copy_(torch.cat([getattr(batch, name).long() for name in _INTEGER_FIELDS]))
    dist.broadcast(flat, source, group=model_parallel_group)
    integers = dict(zip(_INTEGER_FIELDS, flat.split(sizes), strict=True))
    integers["cu_seqlens"] = integers["cu_seqlens"].int()

    pixels_device = device if holds_vision_tower else torch.device("meta")
    pixels = torch.empty(num_images, 3, image_size, image_size, device=pixels_device)
    if holds_vision_tower:
        if batch is not None:
            pixels.copy_(batch.pixel_values)
        if tensor_parallel_group.size() > 1:
            dist.broadcast(pixels, dist.get_global_rank(tensor_parallel_group, 0), group=tensor_parallel_group)
    return PackedBatch(**integers, **dict(zip(_SCALAR_FIELDS, scalars, strict=True)), pixel_values=pixels)


def segment_lengths(batch: PackedBatch) -> tuple[int, ...]:
    """Lengths of the batch's segments on the host; call it while the batch is still there or pay one copy."""
    return tuple(batch.cu_seqlens.diff().tolist())


def global_sums(values: Sequence[float], *, group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Element-wise sums of `values` over `group`, in float64, as host numbers."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.tolist()
