"""Attention over packed segments: one module, flash-attn's varlen kernel on a GPU and SDPA per segment elsewhere.

Shape legend: T packed rows, B images, L rows an image, h query heads, g key-value heads (both of this
tensor-parallel rank), d width of a head.

Rows of different segments never see each other. Memory grows with the sum of the squared segment lengths at
worst (SDPA) or with T (flash), never with T squared.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.platform.accelerators import attention_kernel


@dataclass
class PackedSegments(PackedSeqParams):
    """Segment borders on their way through megatron-core's layers to `PackedAttention`.

    `qkv_format` stays "sbhd", although the rows are packed: megatron-core then leaves the [T, 1, heads, d] layout
    alone and rotates each row by the `rotary_pos_emb` row that the model picked for it, so positions are
    explicit. With "thd" it would derive them from `cu_seqlens`, with a copy to the host in every layer.
    """

    lengths: tuple[int, ...] = ()
    """Segment lengths on the host, so that a loop over segments needs no synchronisation."""


def packed_segments(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedSegments:
    """Borders int32 [S + 1] on the model's device and the same lengths on the host, as one record."""
    longest = max(lengths)
    return PackedSegments(
        qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest, max_seqlen_kv=longest, lengths=lengths,
    )  # fmt: skip


def sdpa_per_segment(q: Tensor, k: Tensor, v: Tensor, segments: PackedSegments, scale: float | None) -> Tensor:
    """Causal attention, one SDPA call per segment. q [T, h, d], k and v [T, g, d]; returns [T, h, d]."""
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for q_, k_, v_ in zip(q.split(segments.lengths), k.split(segments.lengths), v.split(segments.lengths), strict=True):
        out = F.scaled_dot_product_attention(
            q_.transpose(0, 1).unsqueeze(0),
            k_.transpose(0, 1).unsqueeze(0),
            v_.transpose(0, 1).unsqueeze(0),
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


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

    With `packed_seq_params` (the LLaMA): causal within each segment, q [T, 1, h, d], k and v [T, 1, g, d],
    returns [T, 1, h * d]. Without (the vision tower): all rows of an image see each other, q [L, B, h, d],
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
        out = kernel(query.squeeze(1), key.squeeze(1), value.squeeze(1), packed_seq_params, self.softmax_scale)
        return out.flatten(1).unsqueeze(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: there are no parameters."""
        return {}
