"""Packed attention inputs for the tests, and the dense masked attention that they are compared with."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from hacl_megatron.batch import SegmentLengths
from hacl_megatron.platform.attention import Branches, PackedSegments

LENGTHS = {
    "odd": (7, 1, 33, 2, 1, 20),
    "one": (24,),
    "all of length 1": (1, 1, 1, 1),
}


def borders(lengths: tuple[int, ...], device: str = "cpu") -> PackedSegments:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return PackedSegments(
        qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths), lengths=lengths, query_lengths=lengths,
    )  # fmt: skip


READ = {"odd": (3, 1, 33, 0, 1, 6), "one": (5,), "all of length 1": (1, 0, 0, 1)}
"""Rows at the end of each segment of `LENGTHS` that ask."""


def rows_at_the_ends(lengths: tuple[int, ...], read: tuple[int, ...]) -> Tensor:
    ends = itertools.accumulate(lengths)
    return torch.cat([torch.arange(end - count, end) for end, count in zip(ends, read, strict=True)])


def with_read_rows(segments: PackedSegments, rows: Tensor, read: tuple[int, ...]) -> PackedSegments:
    read_borders = torch.tensor([0, *read]).cumsum(0).to(rows.device, torch.int32)
    return replace(segments, read_rows=rows, read_lengths=read, read_borders=read_borders)


def branches_of(contexts: dict[tuple[int, ...], range], device: str = "cpu") -> Branches:
    """Branches, each as its own rows and the rows of the prefix that it shares."""
    rows = [row for own in contexts for row in own]
    context_rows = [row for own, prefix in contexts.items() for row in (*prefix, *own)]
    sizes = tuple(map(len, contexts))
    lengths = tuple(len(own) + len(prefix) for own, prefix in contexts.items())
    int64 = (torch.tensor(values, device=device) for values in (rows, context_rows))
    int32 = (torch.tensor(values, device=device, dtype=torch.int32) for values in (sizes, lengths))
    return Branches.of(*int64, *int32, SegmentLengths(segments=(), read=(), branches=lengths, branch_sizes=sizes))


def allow_branches(allowed: Tensor, contexts: dict[tuple[int, ...], range]) -> Tensor:
    """`allowed` [T, T] with the branches' rows seeing the prefixes too."""
    for own, prefix in contexts.items():
        allowed[own[0] : own[-1] + 1, prefix.start : prefix.stop] = True
    return allowed


def draw(
    rows: int, heads: int, groups: int, width: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """Queries [rows, heads, width], keys and values [rows, groups, width] that take a gradient."""
    generator = torch.Generator().manual_seed(rows * 100 + heads)
    shapes = ((rows, heads, width), (rows, groups, width), (rows, groups, width))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v over all rows at once, where `allowed` [T, T] is true. q [T, h, d], k and v [T, g, d]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def causal_within_segments(lengths: tuple[int, ...]) -> Tensor:
    """bool [T, T]: row q may see row k when k is of its segment and not behind it."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row = torch.arange(sum(lengths))
    return (segment[:, None] == segment[None]) & (row[:, None] >= row[None])


def with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of `tensors` for a fixed, uneven gradient of the output."""
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]
