"""Variable-length attention with the exact signatures of the kernels that exist on CUDA alone, computed densely.

Copied parameter lists, so that a call that the real function would refuse is refused here:

    flash_attn_varlen_func  flash_attn/flash_attn_interface.py of flash-attn v2.8.3 (the same in 2.8.4)
    varlen_attn_2_10        torch/nn/attention/varlen.py of torch 2.10.0
    varlen_attn_2_11        the same file of torch 2.11.0
    varlen_attn_2_13        the same file of torch 2.13.0 (2.12's documentation has the same list)
"""

import torch
from torch import Tensor

from tests.platform.segment_cases import dense_attention


def _compute(q, k, v, cu_q, cu_k, max_q, max_k, *, causal: bool, scale: float | None, grouped: bool) -> Tensor:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    queries, keys = cu_q.diff(), cu_k.diff()
    assert max_q == queries.max() and max_k == keys.max() and isinstance(max_q, int) and isinstance(max_k, int)
    assert int(cu_q[0]) == int(cu_k[0]) == 0 and int(cu_q[-1]) == q.shape[0] and int(cu_k[-1]) == k.shape[0]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert grouped or q.shape[1] == k.shape[1], "this kernel takes one key-value head per query head"
    segments = torch.arange(len(keys))
    allowed = segments.repeat_interleave(queries)[:, None] == segments.repeat_interleave(keys)[None]
    if causal:  # "aligned to the bottom right corner": a segment's last query sees its last key
        from_end_q = cu_q[1:].repeat_interleave(queries) - torch.arange(q.shape[0])
        from_end_k = cu_k[1:].repeat_interleave(keys) - torch.arange(k.shape[0])
        allowed &= from_end_k[None] >= from_end_q[:, None]
    return dense_attention(q, k, v, allowed, scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
    assert not return_attn_probs and block_table is None
    return _compute(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, scale=softmax_scale,
        grouped=True,
    )  # fmt: skip


def varlen_attn_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):  # fmt: skip
    assert return_aux is None
    return _compute(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal, scale=None, grouped=False
    )  # fmt: skip


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    assert return_aux is None and window_size in ((-1, -1), (-1, 0)), window_size  # a list would not count as causal
    return _compute(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0), scale=scale, grouped=False
    )  # fmt: skip


def varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert return_aux is None and window_size in ((-1, -1), (-1, 0)), window_size
    assert seqused_k is None and block_table is None
    return _compute(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0), scale=scale,
        grouped=enable_gqa,
    )  # fmt: skip
