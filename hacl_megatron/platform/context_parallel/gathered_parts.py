"""Images shared out over tensor-parallel ranks, and what each rank has made of its own, on every rank.

    forward    own rows ── all-gather ──→ all rows
    backward   own rows' gradient ←─ cut out, nothing is sent ── gradient of all rows

The layers behind have the same gradient of all rows on every tensor-parallel rank (their products' input gradients are
summed over the ranks, under sequence parallelism gathered), so none of it is to be added up.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


def own_part(total: int, group: ProcessGroup) -> slice:
    """Which of `total` things in a row are this rank's: as many as any other's, or one more or less."""
    return _part(total, group.size(), group.rank())


def gathered_parts(own: Tensor, total: int, group: ProcessGroup) -> Tensor:
    """Own rows [n, ...], those of `own_part`, -> all ranks' [total, ...].

    The gradient that comes back must be the same on all ranks.
    """
    return _GatheredParts.apply(own, total, group)


def _part(total: int, ranks: int, rank: int) -> slice:
    return slice(total * rank // ranks, total * (rank + 1) // ranks)


class _GatheredParts(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, total: int, group: ProcessGroup) -> Tensor:
        ranks = group.size()
        ctx.own = own_part(total, group)
        if not total:
            return own.clone()
        most = -(-total // ranks)
        piece = own.contiguous()
        if len(own) < most:
            piece = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        everyone = own.new_empty(ranks * most, *own.shape[1:])
        dist.all_gather_into_tensor(everyone, piece, group=group)
        if total == ranks * most:
            return everyone
        parts = (_part(total, ranks, rank) for rank in range(ranks))
        sizes = [part.stop - part.start for part in parts]
        return torch.cat([rows[:size] for rows, size in zip(everyone.split(most), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.own], None, None
