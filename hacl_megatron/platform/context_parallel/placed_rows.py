"""What each context-parallel rank has made of its own rows, in its place on every rank.

own rows' numbers ── all-reduce, forward and backward ──→ the pack's
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


class _PlacedRows(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, total: int, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        ctx.group = group
        whole = own.new_zeros(total, *own.shape[1:]).index_copy_(0, places, own)
        if total:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        # It may come transposed on one rank alone, and all-reduce adds memory up as it lies.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        if len(gradient):
            dist.all_reduce(gradient, group=ctx.group)
        return gradient.index_select(0, places), None, None, None


def placed_rows(own: Tensor, places: Tensor, total: int, group: ProcessGroup) -> Tensor:
    """Own rows [n, ...] at `places` of [total, ...], each of which one rank has; the whole on every rank.

    Gradients are summed over ranks: whoever makes the same of it on every rank takes 1 / ranks of that.
    """
    return _PlacedRows.apply(own, places, total, group)
