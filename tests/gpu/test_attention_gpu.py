"""The packed-attention kernels that exist on CUDA alone, against dense attention in fp32."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from hacl_megatron.platform import attention
from hacl_megatron.platform.accelerators import attention_kernel, has_torch_varlen
from hacl_megatron.platform.attention import PackedAttention, flash_varlen, sdpa_per_segment, torch_varlen
from tests.platform import context_cases
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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KERNELS = {
    "sdpa": sdpa_per_segment,
    "flash_attn": pytest.param(
        flash_varlen,
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
    ),
    "torch_varlen": pytest.param(
        torch_varlen,
        marks=pytest.mark.skipif(not has_torch_varlen(), reason="torch has no varlen attention"),
    ),
}
HEADS = {"multi-head, 64": (4, 4, 64), "grouped, 128": (6, 2, 128), "grouped, 8": (6, 2, 8)}
ALL_LENGTHS = {**LENGTHS, "long": (577, 1, 1300, 64, 129)}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", ALL_LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.2])
def test_bf16_values_and_gradients_are_near_dense_fp32(kernel, heads, lengths, scale):
    """Not further from fp32 than dense attention in bf16 is, by a factor of 3 (flash-attn's tests allow 2 to 3).

    Plus 1 % of the largest entry of all: a segment of length 1 has a gradient of 0 towards q and k, which dense
    attention hits exactly, and a kernel that subtracts two rounded numbers does not.
    """
    lengths = ALL_LENGTHS[lengths]
    half = draw(sum(lengths), *HEADS[heads], dtype=torch.bfloat16, device="cuda")
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    allowed = causal_within_segments(lengths).cuda()
    segments = borders(lengths, "cuda")
    ours = with_gradients(lambda q, k, v: kernel(q, k, v, segments, scale), half)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed, scale), exact)
    rough = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed, scale), half)
    floor = 0.01 * max(tensor.abs().max().item() for tensor in dense)
    for name, ours_, dense_, rough_ in zip(("out", "dq", "dk", "dv"), ours, dense, rough, strict=True):
        assert ours_.dtype == torch.bfloat16 and ours_.shape == dense_.shape
        error, allowance = (ours_ - dense_).abs().max().item(), (rough_ - dense_).abs().max().item()
        assert error <= 3 * allowance + floor, (name, error, allowance, floor)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("lengths", READ)
def test_bf16_queries_from_the_ends_of_segments_alone(kernel, lengths):
    """The last layer's: causal is aligned at the end of a segment."""
    read, lengths = READ[lengths], LENGTHS[lengths]
    rows = rows_at_the_ends(lengths, read).cuda()
    segments = with_read_rows(borders(lengths, "cuda"), rows, read).of_read_rows()
    half = draw(sum(lengths), 4, 4, 64, dtype=torch.bfloat16, device="cuda")
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    allowed = causal_within_segments(lengths).cuda()
    ours = with_gradients(lambda q, k, v: kernel(q[rows], k, v, segments, None), half)
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed)[rows], exact)
    floor = 0.02 * max(tensor.abs().max().item() for tensor in dense)  # q and k of a segment of length 1 get nothing
    for ours_, dense_ in zip(ours, dense, strict=True):
        torch.testing.assert_close(ours_.float(), dense_, rtol=0.05, atol=floor)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("heads", ["multi-head, 64", "grouped, 128"])
def test_bf16_branches_see_their_prefix_and_themselves(kernel, heads, monkeypatch):
    """An image's EOS, which sees 400 rows of the first segment, and a rejected answer, the last segment, which sees 3
    rows of the third."""
    lengths = ALL_LENGTHS["long"]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    contexts = {(ends[0],): range(400), tuple(range(ends[3], ends[4])): range(ends[1], ends[1] + 3)}
    segments = replace(borders(lengths, "cuda"), branches=branches_of(contexts, "cuda"))
    allowed = allow_branches(causal_within_segments(lengths), contexts)
    half = draw(sum(lengths), *HEADS[heads], dtype=torch.bfloat16, device="cuda")
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    name = {sdpa_per_segment: "sdpa", flash_varlen: "flash_attn", torch_varlen: "torch_varlen"}[kernel]
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: name)

    def ours(q, k, v):
        return packed_attention()(*(t.unsqueeze(1) for t in (q, k, v)), packed_seq_params=segments).reshape(q.shape)

    try:
        found = with_gradients(ours, half)
    except RuntimeError as error:
        if "split" not in str(error):
            raise
        pytest.skip(f"this build of flash-attn has no kernel for it: {error}")
    dense = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed.cuda()), exact)
    for ours_, dense_ in zip(found, dense, strict=True):
        torch.testing.assert_close(ours_.float(), dense_, rtol=0.05, atol=0.02 * dense_.abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("heads", HEADS)
def test_bf16_over_the_keys_of_two_context_parallel_ranks(kernel, heads):
    """What is gathered is gathered once more, not kept, whatever a kernel saves."""
    half = draw(sum(context_cases.LENGTHS), *HEADS[heads], dtype=torch.bfloat16, device="cuda")
    mine, out, gradients, calls = context_cases.first_ranks_attention(kernel, *half)
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    dense = dense_attention(*exact, causal_within_segments(context_cases.LENGTHS).cuda())[mine]
    dense.square().sum().backward()
    expected = (dense, exact[0].grad[mine], *(tensor.grad for tensor in exact[1:]))
    for found, value in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(found.float(), value, rtol=0.05, atol=0.02 * value.abs().max().item())
    assert calls == ["gather", "forward is done", "gather", "scatter"]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_segments_do_not_see_each_other(kernel):
    lengths = ALL_LENGTHS["long"]
    q, k, v = draw(sum(lengths), 6, 2, 64, dtype=torch.bfloat16, device="cuda")
    start, stop = sum(lengths[:2]), sum(lengths[:3])
    before = kernel(q, k, v, borders(lengths, "cuda"), None)
    gradients = torch.autograd.grad(before[start:stop].float().square().sum(), (q, k, v))
    for gradient in gradients:
        assert gradient[:start].eq(0).all() and gradient[stop:].eq(0).all() and gradient[start:stop].ne(0).any()


def packed_attention() -> PackedAttention:
    return PackedAttention(config=SimpleNamespace(), layer_number=1, attn_mask_type=AttnMaskType.causal)


def test_the_module_runs_the_chosen_kernel_without_waiting_for_the_device():
    """32 layers times a wait for the host would leave the GPU idle."""
    lengths = ALL_LENGTHS["long"]
    q, k, v = (t.unsqueeze(1) for t in draw(sum(lengths), 6, 2, 64, dtype=torch.bfloat16, device="cuda"))
    segments, module = borders(lengths, "cuda"), packed_attention()

    def run() -> torch.Tensor:
        out = module(q, k, v, None, packed_seq_params=segments)
        out.sum().backward()
        return out

    run()  # first calls load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    name = attention_kernel(q.device, q.dtype)
    kernel = {"sdpa": sdpa_per_segment, "flash_attn": flash_varlen, "torch_varlen": torch_varlen}[name]
    expected = kernel(q.squeeze(1), k.squeeze(1), v.squeeze(1), segments, None)
    assert torch.equal(out, expected.flatten(1).unsqueeze(1))


def test_fp32_on_the_device_equals_the_host():
    lengths = ALL_LENGTHS["long"]
    on_host = draw(sum(lengths), 6, 2, 64, dtype=torch.float32)
    on_device = [tensor.detach().cuda().requires_grad_() for tensor in on_host]
    host = with_gradients(lambda q, k, v: sdpa_per_segment(q, k, v, borders(lengths), None), on_host)
    device = with_gradients(
        lambda q, k, v: packed_attention()(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), packed_seq_params=borders(lengths, "cuda")
        ).reshape(q.shape),
        on_device,
    )
    for a, b in zip(host, device, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_the_rows_and_not_with_their_square():
    """Twice the rows in segments of one length: twice the peak. One score a pair of rows would be 2 GiB in bf16."""
    peaks = {}
    for rows in (16_384, 32_768):
        q, k, v = draw(rows, 2, 2, 64, dtype=torch.bfloat16, device="cuda")
        segments = borders((512,) * (rows // 512), "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        packed_attention()(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), packed_seq_params=segments).sum().backward()
        peaks[rows] = torch.cuda.max_memory_allocated() - before
    assert peaks[32_768] <= 2.2 * peaks[16_384], peaks
    assert peaks[32_768] <= 0.25 * 2 * 32_768**2, peaks
