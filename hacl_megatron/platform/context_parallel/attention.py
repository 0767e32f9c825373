"""Attention of own queries over the keys and values of all context-parallel ranks.

    own keys and values ── all-gather ──→ every rank's; own queries attend by any of `platform.attention`'s kernels
    their gradients   ←─ reduce-scatter ──

For the backward pass own queries, keys and values are kept alone: it gathers and attends once more, whatever a kernel
would have kept, so memory falls with the ranks and every rank takes part in the same collectives. The price is a second
forward pass of attention itself.

Shape legend: T' own rows, Q' own rows that ask, T = ranks x T', g key-value heads, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

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

    All ranks of `group` call it, and all of them run backward through it: `kernel` runs once more then.

    Args:
        kernel: takes the queries and keys and values [n, g, d] of `context_rows`; draws no random numbers.
        context_rows: int64 [n]: which of the T rows, those of the group's first rank first; any number of times.
    """

    def gather_and_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel(query, *_Gather.apply(key, value, context_rows, group))

    # The value is a view into the projection of all three: a copy lets go of the rest.
    return checkpoint(gather_and_attend, query, key, value.contiguous(), use_reentrant=False, preserve_rng_state=False)


class _Gather(torch.autograd.Function):
    """Own keys and values [T', g, d] -> every rank's, those of the context rows [n, g, d]."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, context_rows: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        # That something is saved here is what makes even a rank whose kernel saves nothing gather once more.
        ctx.save_for_backward(context_rows)
        ctx.group = group
        own = torch.cat((key, value))
        everyone = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
        _all_gather(everyone, own, group=group)
        keys, values = _places(context_rows, key.shape[0])
        ctx.own_shape = own.shape
        return everyone.index_select(0, keys), everyone.index_select(0, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (context_rows,) = ctx.saved_tensors
        twice, *one_row = ctx.own_shape
        everyone = gradients[0].new_zeros(ctx.group.size() * twice, *one_row)
        for places, gradient in zip(_places(context_rows, twice // 2), gradients, strict=True):
            everyone.index_add_(0, places, gradient)
        summed = everyone.new_empty(twice, *one_row)
        _reduce_scatter(summed, everyone, op=dist.ReduceOp.SUM, group=ctx.group)
        return *summed.chunk(2), None, None


def _places(context_rows: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where the context rows' keys and values are among [ranks x 2 x `rows`, g, d]."""
    keys = context_rows + context_rows // rows * rows
    return keys, keys + rows
