"""Attention of one of two context-parallel ranks, whose collectives this process stands in for."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from hacl_megatron.assemble.row_shares import cut_into_pieces
from hacl_megatron.platform.attention import PackedSegments
from hacl_megatron.platform.context_parallel import attention
from tests.platform.segment_cases import borders

LENGTHS = (310, 1, 120, 33)
"""An even number of rows in all."""


def first_ranks_attention(kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[str]]:
    """Rows of the pack that the first of two ranks has, its attention [Q', h, d] over all of `k` and `v` [T, g, d],
    gradients of the sum of its squares to its queries and all keys and values, and the collectives it took."""
    pieces = cut_into_pieces(LENGTHS, [0] * len(LENGTHS), 2)
    rows = [torch.cat([torch.arange(p.begin, p.end) for p in pieces if p.rank == rank]) for rank in (0, 1)]
    order = torch.cat(rows)  # as gathered rows stand
    starts = borders(LENGTHS).cu_seqlens_q.tolist()
    own = [piece for piece in pieces if piece.rank == 0]
    contexts = [torch.arange(starts[piece.segment], piece.end) for piece in own]
    sizes, seen = tuple(piece.rows for piece in own), tuple(map(len, contexts))
    queries, keys = borders(sizes, q.device), borders(seen, q.device)
    segments = PackedSegments(
        cu_seqlens_q=queries.cu_seqlens_q, cu_seqlens_kv=keys.cu_seqlens_q, max_seqlen_q=max(sizes),
        max_seqlen_kv=max(seen), lengths=seen, query_lengths=sizes,
    )  # fmt: skip
    context_rows = order.argsort()[torch.cat(contexts)].to(q.device)
    mine, others = (part.to(q.device) for part in rows)
    of_others = torch.cat([k[others], v[others]]).detach()
    calls, whole = [], []

    def gather(everyone: Tensor, one: Tensor, group) -> None:
        calls.append("gather")
        everyone.copy_(torch.cat([one, of_others]))

    def scatter(one: Tensor, everyone: Tensor, op, group) -> None:
        calls.append("scatter")
        whole.append(everyone.clone())
        one.copy_(everyone[: len(one)])

    given = [part[mine].detach().requires_grad_() for part in (q, k, v)]
    with mock.patch.object(attention, "_all_gather", gather), mock.patch.object(attention, "_reduce_scatter", scatter):
        attend = partial(kernel, segments=segments, scale=None)
        out = attention.attend_over_ranks(attend, *given, context_rows, SimpleNamespace(size=lambda: 2))
        calls.append("forward is done")
        out.to(torch.promote_types(out.dtype, torch.float32)).square().sum().backward()
    dk, dv = (torch.empty_like(k) for _ in range(2))
    for rank, here in enumerate((mine, others)):
        for place, target in enumerate((dk, dv)):
            target[here] = whole[0].unflatten(0, (2, 2, -1))[rank, place]
    return mine, out.detach(), [given[0].grad, dk, dv], calls
