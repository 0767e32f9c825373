"""Packed attention against dense attention under a mask, on the CPU and through the call of every GPU kernel."""

import importlib.util
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hacl_megatron.platform import attention
from hacl_megatron.platform.accelerators import has_torch_varlen
from hacl_megatron.platform.attention import PackedAttention, flash_varlen, sdpa_per_segment, torch_varlen
from tests.platform import varlen_signatures
from tests.platform.segment_cases import (
    LENGTHS,
    READ,
    allow_branches,
    borders,
    branches_of,
    causal_within_segments,
    dense_attention,
    draw,
    rows_at_the_ends,
    with_gradients,
    with_read_rows,
)

HEADS = {"multi-head": (4, 4), "grouped": (6, 2)}
CLOSE = dict(rtol=1e-12, atol=1e-12)  # everything runs in float64
KERNELS = {
    "sdpa": sdpa_per_segment,
    "flash_attn": lambda *a: flash_varlen(*a, kernel=varlen_signatures.flash_attn_varlen_func),
    "torch 2.10": lambda *a: torch_varlen(*a, kernel=varlen_signatures.varlen_attn_2_10),
    "torch 2.11": lambda *a: torch_varlen(*a, kernel=varlen_signatures.varlen_attn_2_11),
    "torch 2.13": lambda *a: torch_varlen(*a, kernel=varlen_signatures.varlen_attn_2_13),
}


def packed_attention(scale: float | None = None) -> PackedAttention:
    """As megatron-core's `SelfAttention` builds it."""
    return PackedAttention(
        config=SimpleNamespace(), layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self",
        cp_comm_type=None, softmax_scale=scale, pg_collection=None,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients_are_those_of_masked_dense_attention(kernel, heads, lengths, scale):
    lengths = LENGTHS[lengths]
    tensors = draw(sum(lengths), *HEADS[heads], width=8)
    ours = with_gradients(lambda q, k, v: KERNELS[kernel](q, k, v, borders(lengths), scale), tensors)
    allowed = causal_within_segments(lengths)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed, scale), tensors)
    for ours_, dense_ in zip(ours, dense, strict=True):
        torch.testing.assert_close(ours_, dense_, **CLOSE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", READ)
def test_queries_from_the_ends_of_segments_alone(kernel, heads, lengths):
    """The last layer's: what they get, and what they give back to keys and values, is what dense attention has."""
    read, lengths = READ[lengths], LENGTHS[lengths]
    rows = rows_at_the_ends(lengths, read)
    segments = with_read_rows(borders(lengths), rows, read).of_read_rows()
    tensors = draw(sum(lengths), *HEADS[heads], width=8)
    ours = with_gradients(lambda q, k, v: KERNELS[kernel](q[rows], k, v, segments, None), tensors)
    allowed = causal_within_segments(lengths)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed)[rows], tensors)
    for ours_, dense_ in zip(ours, dense, strict=True):
        torch.testing.assert_close(ours_, dense_, **CLOSE)


BRANCHES = {
    "of one row": {(7,): range(5), (43,): range(8, 20)},
    "of many rows": {(7,): range(3), (41, 42): range(8, 20), tuple(range(44, 64)): range(8, 9)},
}
"""Segments of the odd lengths, and which rows of an earlier one they share: an image's EOS, rejected answers."""


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("last_layer", [False, True])
@pytest.mark.parametrize("contexts", BRANCHES.values(), ids=BRANCHES)
def test_branches_see_the_prefix_that_they_share_and_themselves(contexts, kernel, last_layer, monkeypatch):
    lengths, read = LENGTHS["odd"], (3, 1, 33, 2, 1, 20)
    segments = replace(borders(lengths), branches=branches_of(contexts))
    allowed = allow_branches(causal_within_segments(lengths), contexts)
    rows = torch.arange(sum(lengths))
    if last_layer:
        rows = rows_at_the_ends(lengths, read)
        segments = with_read_rows(segments, rows, read).of_read_rows()
    monkeypatch.setitem(attention._KERNELS, "sdpa", KERNELS[kernel])
    tensors = draw(sum(lengths), 6, 2, width=8)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = q[rows].unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        return packed_attention()(*inputs, packed_seq_params=segments).reshape(len(rows), 6, 8)

    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed)[rows], tensors)
    for ours_, dense_ in zip(with_gradients(ours, tensors), dense, strict=True):
        torch.testing.assert_close(ours_, dense_, **CLOSE)


def test_indices_and_borders_are_made_once_a_pack():
    """They are the same in every layer: on a GPU each would be a launch a layer."""
    segments = replace(borders(LENGTHS["odd"]), branches=branches_of(BRANCHES["of one row"]))
    tensors = [tensor.unsqueeze(1) for tensor in draw(sum(LENGTHS["odd"]), 6, 2, width=8)]
    with _Produced() as produced:
        packed_attention()(*tensors, packed_seq_params=segments)
    assert not produced.dtypes & {torch.int32, torch.int64}, produced.dtypes


@pytest.mark.parametrize("heads", HEADS)
def test_module_takes_megatrons_layout(heads):
    lengths, (h, g) = LENGTHS["odd"], HEADS[heads]
    rows = sum(lengths)
    # megatron-core splits q, k and v off one projection, so they are views with gaps between the rows.
    mixed = draw(rows, g, 1, (h // g + 2) * 8)[0]
    q, k, v = mixed.split([h // g * 8, 8, 8], dim=-1)
    q, k, v = q.reshape(rows, 1, h, 8), k.unsqueeze(1), v.unsqueeze(1)
    out = packed_attention(0.3)(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=borders(lengths))
    dense = dense_attention(q.squeeze(1), k.squeeze(1), v.squeeze(1), causal_within_segments(lengths), 0.3)
    assert out.shape == (rows, 1, h * 8)
    torch.testing.assert_close(out, dense.reshape(rows, 1, h * 8), **CLOSE)


def test_rows_of_an_image_all_see_each_other():
    images, rows, h, d = 3, 10, 4, 8
    q, k, v = (tensor.reshape(rows, images, h, d) for tensor in draw(rows, images * h, images * h, d))
    out = packed_attention()(q, k, v)
    assert out.shape == (rows, images, h * d)
    for image in range(images):
        dense = dense_attention(q[:, image], k[:, image], v[:, image], torch.ones(rows, rows, dtype=torch.bool))
        torch.testing.assert_close(out[:, image], dense.flatten(1), **CLOSE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_segments_do_not_see_each_other(kernel):
    lengths = LENGTHS["odd"]
    q, k, v = draw(sum(lengths), 6, 2, 8)
    segments = borders(lengths)
    before = KERNELS[kernel](q, k, v, segments, None)
    start, stop = int(segments.cu_seqlens_q[2]), int(segments.cu_seqlens_q[3])
    gradients = torch.autograd.grad(before[start:stop].square().sum(), (q, k, v), retain_graph=True)
    for gradient in gradients:  # exactly nothing outside the segment
        assert gradient[:start].eq(0).all() and gradient[stop:].eq(0).all() and gradient[start:stop].ne(0).any()
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[start:stop] = 1e4
    after = KERNELS[kernel](q, k, v, segments, None)
    torch.testing.assert_close(after[:start], before[:start], rtol=0, atol=1e-15)
    torch.testing.assert_close(after[stop:], before[stop:], rtol=0, atol=1e-15)
    assert not torch.allclose(after[start:stop], before[start:stop])


PUBLISHED = {
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None)",
    "varlen_attn_2_10": "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None)",
    "varlen_attn_2_11": "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
    "window_size=(-1, -1))",
    "varlen_attn_2_13": "(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
    "window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None)",
}
"""Signatures without annotations; files and versions stand at the head of `varlen_signatures`."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_stand_ins_have_the_published_signatures(name):
    assert str(inspect.signature(getattr(varlen_signatures, name))) == PUBLISHED[name]


def parameters(function) -> list[tuple[str, object]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_the_installed_flash_attn_has_the_signature_of_the_stand_in():
    from flash_attn import flash_attn_varlen_func

    assert parameters(flash_attn_varlen_func) == parameters(varlen_signatures.flash_attn_varlen_func)


@pytest.mark.skipif(not has_torch_varlen(), reason="torch has no varlen attention")
def test_the_installed_torch_has_a_signature_that_we_call_right():
    """One of those whose stand-in is compared with dense attention above; a new one wants a look at `torch_varlen`."""
    from torch.nn.attention.varlen import varlen_attn

    known = (
        varlen_signatures.varlen_attn_2_10,
        varlen_signatures.varlen_attn_2_11,
        varlen_signatures.varlen_attn_2_13,
    )
    assert parameters(varlen_attn) in [parameters(function) for function in known], (
        f"torch {torch.__version__} has changed varlen_attn: see that torch_varlen still calls it right"
    )


class _Produced(TorchDispatchMode):
    """Counts the elements of every tensor that an operation makes, forward and backward, and notes the dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.dtypes |= {tensor.dtype for tensor in tensors}
            sizes = [tensor.numel() for tensor in tensors]
            self.largest = max(self.largest, *sizes, 0)
            self.total += sum(sizes)
        return result


def _elements(rows: int, groups: int) -> tuple[int, int, int]:
    """Elements made in a forward and backward pass over segments of 64, the largest tensor, and bytes kept between."""
    q, k, v = draw(rows, 2, groups, 8, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mode = _Produced()
        with mode:
            sdpa_per_segment(q, k, v, borders((64,) * (rows // 64)), None).sum().backward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return mode.total, mode.largest, sum(storages.values())


@pytest.mark.parametrize("groups", [2, 1])
def test_memory_grows_with_the_segments_and_not_with_the_square_of_the_rows(groups):
    """Twice the segments, twice the elements; and no tensor as large as one score per pair of rows."""
    rows, heads, width = 16_384, 2, 8
    half, whole = _elements(rows // 2, groups), _elements(rows, groups)
    assert whole[1] <= rows * heads * width
    # q, k, v and the outputs, in fp32, and at worst the scores of each segment twice
    assert whole[2] <= 4 * (6 * rows * heads * width + 2 * heads * rows * 64)
    for small, large in zip(half, whole, strict=True):
        assert large <= 2.1 * small
