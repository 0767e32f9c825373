"""Attention of own queries over the keys and values of all context-parallel ranks.

    own keys and values ── all-gather ──→ every rank's; own queries attend by any of `platform.attention`'s kernels
    their gradients   ←─ reduce-scatter ──

For the backward pass own keys and values are kept alone, and gathered once more: memory falls with the ranks.

Shape legend: T' own rows, Q' own rows that ask, T = ranks x T', g key-value heads, d width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both and warns about the old names, which are all that earlier releases have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def attend_over_ranks(
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_rows: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """`kernel` over own queries and every rank's keys and values. query [Q', h, d], key and value [T', g, d].

    All ranks of `group` call it, and all of them run backward through it.

    Args:
        kernel: takes the queries and keys and values [n, g, d] of `context_rows`.
        context_rows: int64 [n]: which of the T rows, those of the group's first rank first; any number of times.
    """
    rows = _ContextRows(context_rows, group)
    keys, values = _Gather.apply(key, value, rows)
    if not keys.requires_grad:
        return kernel(query, keys, values)
    rows.gathered = (keys.detach(), values.detach())
    with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
        out = kernel(query, keys, values)
    rows.gathered = None
    return out


@dataclass(eq=False)
class _ContextRows:
    """Gathered keys and values of one call, and how to have them once more."""

    context_rows: Tensor
    group: ProcessGroup
    own: Tensor | None = None
    """[2, T', g, d]: own keys and values."""
    gathered: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """Keys and values [n, g, d], while the kernel runs forward or backward."""

    def gather(self) -> tuple[Tensor, Tensor]:
        own = self.own.flatten(0, 1)
        everyone = own.new_empty(self.group.size() * own.shape[0], *own.shape[1:])
        _all_gather(everyone, own, group=self.group)
        keys, values = self.places()
        return everyone.index_select(0, keys), everyone.index_select(0, values)

    def places(self) -> tuple[Tensor, Tensor]:
        """Where the context rows' keys and values are among [ranks x 2 x T', g, d]."""
        rows = self.own.shape[1]
        keys = self.context_rows + self.context_rows // rows * rows
        return keys, keys + rows

    def pack(self, saved: Tensor) -> Any:
        """Of what autograd keeps, views of gathered keys and values as their place alone."""
        for index, whole in enumerate(self.gathered):
            if saved.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                return index, saved.shape, saved.stride(), saved.storage_offset()
        return saved

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.gathered is None:
            self.gathered = self.gather()
        index, *place = kept
        return self.gathered[index].as_strided(*place)


class _Gather(torch.autograd.Function):
    """Own keys and values [T', g, d] -> every rank's, those of the context rows [n, g, d]."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, rows: _ContextRows) -> tuple[Tensor, Tensor]:
        ctx.rows = rows
        rows.own = torch.stack((key, value))
        return rows.gather()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = ctx.rows
        rows.gathered = None  # the kernel's backward pass is over
        summed = torch.empty_like(rows.own)
        everyone = summed.new_zeros(rows.group.size() * summed.flatten(0, 1).shape[0], *summed.shape[2:])
        for places, gradient in zip(rows.places(), gradients, strict=True):
            everyone.index_add_(0, places, gradient)
        _reduce_scatter(summed.flatten(0, 1), everyone, op=dist.ReduceOp.SUM, group=rows.group)
        return summed[0], summed[1], None
