"""Attention over packed segments: one module, flash-attn's varlen kernel on a GPU and SDPA per segment elsewhere.

Shape legend: T packed rows, Q rows of them that ask (all, or in the last layer those that are read), B images, L rows
an image, h query heads, g key-value heads (both of this tensor-parallel rank), d width of a head.

Rows of different segments never see each other, except that a branch (`PackedBatch.branch_rows`) sees the prefix that
it shares with a dialogue. Memory grows with the sum of the squared segment lengths at worst (SDPA) or with T (flash),
never with T squared.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.batch import PackedBatch, RowShare, SegmentLengths
from hacl_megatron.platform.accelerators import attention_kernel
from hacl_megatron.platform.context_parallel.attention import attend_over_ranks
from hacl_megatron.platform.cpu.kernels import has_segment_attention, rotate, segment_attention


@dataclass
class PackedSegments(PackedSeqParams):
    """Segment borders on their way through megatron-core's layers to `PackedAttention`.

    Queries of a segment are its last rows (all of them, but in the last layer), so causal means aligned at the end:
    the last query sees the whole segment. This is what flash kernels do with fewer queries than keys.

    `qkv_format` stays "sbhd", although the rows are packed: megatron-core then leaves the [T, 1, heads, d] layout
    alone and rotates each row by the `rotary_pos_emb` row that the model picked for it, so positions are
    explicit. With "thd" it would derive them from `cu_seqlens`, with a copy to the host in every layer.
    """

    query_lengths: tuple[int, ...] = ()
    """Queries of each segment, on the host, so that a loop over segments needs no synchronisation."""
    lengths: tuple[int, ...] = ()
    """Rows of each segment, on the host."""
    read_rows: Tensor | None = None
    """int64: rows that the last layer is to compute, ascending (`PackedBatch.read_rows`); None: all."""
    read_lengths: tuple[int, ...] = ()
    """How many of them each segment has, on the host."""
    read_borders: Tensor | None = None
    """int32 [S + 1]: borders of the segments among them."""
    query_rows: Tensor | None = None
    """int64: rows that the queries stand on; None: all."""
    branches: "Branches | None" = None
    """None where no image shares a prefix."""
    share: RowShare | None = None
    """Where the queries are a context-parallel rank's: the segments are its pieces, over keys and values of all ranks,
    branches among them."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines [T, 1, d / 2] for attention that rotates queries and keys itself, as it does on the CPU; None:
    megatron-core's layers have rotated them."""

    def of_read_rows(self) -> "PackedSegments":
        """The same segments, with the read rows for queries."""
        if self.read_rows is None:
            return self
        branches = self.branches
        if branches is not None:
            branches = replace(branches, queries=torch.searchsorted(self.read_rows, branches.queries))
        return replace(
            self,
            cu_seqlens_q=self.read_borders,
            max_seqlen_q=max(self.read_lengths),
            query_lengths=self.read_lengths,
            query_rows=self.read_rows,
            branches=branches,
        )


@dataclass(frozen=True)
class Branches:
    """Segments that attend to another segment's first rows and, causally, to their own (see `hacl_megatron.batch`)."""

    queries: Tensor
    """int64 [n]: places of all branches' rows among the queries."""
    context_rows: Tensor
    """int64 [sum of lengths]: packed rows that each branch's last row sees, branch after branch."""
    segments: PackedSegments
    """Each branch's rows over its part of `context_rows`, at whose end they stand; the same in every layer."""

    @classmethod
    def of(
        cls, rows: Tensor, context_rows: Tensor, sizes: Tensor, lengths: Tensor, on_host: SegmentLengths
    ) -> "Branches":
        """From the fields of a pack (`branch_rows`, `branch_context_rows`, `branch_sizes`, `branch_lengths`)."""
        segments = PackedSegments(
            cu_seqlens_q=_borders(sizes),
            cu_seqlens_kv=_borders(lengths),
            max_seqlen_q=max(on_host.branch_sizes),
            max_seqlen_kv=max(on_host.branches),
            query_lengths=on_host.branch_sizes,
            lengths=on_host.branches,
        )
        return cls(rows, context_rows, segments)


def packed_segments(batch: PackedBatch, lengths: SegmentLengths, *, read_rows_only: bool = True) -> PackedSegments:
    """Borders of a pack on the model's device and the same lengths on the host, as one record.

    With `read_rows_only` the last layer runs for `batch.read_rows` alone. Of a rank's share, pieces are the segments.
    """
    if batch.share is not None:
        return _segments_of_share(batch.share, read_rows_only)
    longest = max(lengths.segments)
    branches = None
    if lengths.branches:
        tensors = batch.branch_rows, batch.branch_context_rows, batch.branch_sizes, batch.branch_lengths
        branches = Branches.of(*tensors, lengths)
    return PackedSegments(
        qkv_format="sbhd", cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest, max_seqlen_kv=longest, lengths=lengths.segments, query_lengths=lengths.segments,
        read_rows=batch.read_rows if read_rows_only else None, read_lengths=lengths.read,
        read_borders=_borders(batch.read_lengths), branches=branches,
    )  # fmt: skip


def _segments_of_share(share: RowShare, read_rows_only: bool) -> PackedSegments:
    on_host = share.on_host
    return PackedSegments(
        qkv_format="sbhd", cu_seqlens_q=_borders(share.sizes), cu_seqlens_kv=_borders(share.lengths),
        max_seqlen_q=max(on_host.sizes), max_seqlen_kv=max(on_host.lengths), lengths=on_host.lengths,
        query_lengths=on_host.sizes, read_rows=share.read_rows if read_rows_only else None, read_lengths=on_host.reads,
        read_borders=_borders(share.reads), share=share,
    )  # fmt: skip


def _borders(lengths: Tensor) -> Tensor:
    """int32 [n] -> int32 [n + 1], on the lengths' device and without waiting for it."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def rotates_itself(device: torch.device) -> bool:
    """Whether `PackedAttention` rotates on `device`; elsewhere megatron-core's layers do."""
    return device.type == "cpu"


def sdpa_per_segment(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, scale: float | None) -> Tensor:
    """Causal attention, one SDPA call per segment. q [Q, h, d], k and v [T, g, d]; returns [Q, h, d]."""
    if has_segment_attention(q, k):
        return segment_attention(q, k, v, segments.query_lengths, segments.lengths, scale)
    q_parts, k_parts, v_parts = q.split(segments.query_lengths), k.split(segments.lengths), v.split(segments.lengths)
    outputs = []
    for q_, k_, v_ in zip(q_parts, k_parts, v_parts, strict=True):
        queries, rows = q_.shape[0], k_.shape[0]
        if queries == 0:
            continue
        mask = None
        if 1 < queries < rows:  # SDPA's own causal mask is aligned at the start
            mask = torch.ones(queries, rows, dtype=torch.bool, device=q.device).tril(rows - queries)
        out = F.scaled_dot_product_attention(
            q_.transpose(0, 1).unsqueeze(0),
            k_.transpose(0, 1).unsqueeze(0),
            v_.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=1 < queries == rows,  # one query sees its whole segment
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _attend_to_branches(
    kernel: Callable, out: Tensor, q: Tensor, k: Tensor, v: Tensor, branches: Branches, scale: float | None
) -> Tensor:
    """`out` [Q, h, d] with the branches' rows replaced by their attention over their context rows."""
    branch_out = kernel(
        q.index_select(0, branches.queries),
        k.index_select(0, branches.context_rows),
        v.index_select(0, branches.context_rows),
        branches.segments,
        scale,
    )
    return out.index_copy(0, branches.queries, branch_out)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, scale: float | None, kernel: Callable | None = None
) -> Tensor:
    """The same by flash-attn's `flash_attn_varlen_func` (or a `kernel` of that signature)."""
    if kernel is None:
        from flash_attn import flash_attn_varlen_func as kernel
    return kernel(
        q,
        k,
        v,
        segments.cu_seqlens_q,
        segments.cu_seqlens_kv,
        segments.max_seqlen_q,
        segments.max_seqlen_kv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
    )


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, scale: float | None, kernel: Callable | None = None
) -> Tensor:
    """The same by `varlen_attn`, the flash kernel inside torch (>= 2.10), for machines without the flash-attn package.

    Its signature grew: 2.10 takes `is_causal` and no scale, 2.11 a window of (-1, 0) for causal and a scale, later
    releases grouped queries too. `kernel` may be any of them.
    """
    if kernel is None:
        from torch.nn.attention.varlen import varlen_attn as kernel
    names = _parameter_names(kernel)
    options: dict = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "scale" in names:
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    arguments = (q, k, v, segments.cu_seqlens_q, segments.cu_seqlens_kv, segments.max_seqlen_q, segments.max_seqlen_kv)
    return kernel(*arguments, **options)


@cache
def _parameter_names(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_KERNELS = {"sdpa": sdpa_per_segment, "flash_attn": flash_varlen, "torch_varlen": torch_varlen}


class PackedAttention(torch.nn.Module):
    """megatron-core's `core_attention` for both towers of this model.

    With `packed_seq_params` (the LLaMA): causal within each segment, q [Q, 1, h, d], k and v [T, 1, g, d],
    returns [Q, 1, h * d]. Without (the vision tower): all rows of an image see each other, q [L, B, h, d],
    returns [L, B, h * d].
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection=None,
        **_unused,
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None, "segments say what a row sees"
        if packed_seq_params is None:
            out = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), scale=self.softmax_scale
            )
            return out.permute(2, 0, 1, 3).flatten(2)
        kernel = _KERNELS[attention_kernel(query.device, query.dtype)]
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq_params.rotary is not None:
            cos, sin = (angles.to(query.dtype) for angles in packed_seq_params.rotary)
            read = packed_seq_params.query_rows
            asking = (cos, sin) if read is None else (cos.index_select(0, read), sin.index_select(0, read))
            query, key = rotate(query, *asking), rotate(key, cos, sin)
        qkv, share = (query, key, value), packed_seq_params.share
        if share is not None:
            own = partial(kernel, segments=packed_seq_params, scale=self.softmax_scale)
            out = attend_over_ranks(own, *qkv, share.context_rows, share.group)
        else:
            out = kernel(*qkv, packed_seq_params, self.softmax_scale)
        branches = packed_seq_params.branches
        if branches is not None:
            out = _attend_to_branches(kernel, out, *qkv, branches, self.softmax_scale)
        return out.flatten(1).unsqueeze(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: there are no parameters."""
        return {}
