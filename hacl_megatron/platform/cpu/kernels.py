"""What fused GPU kernels do for memory and speed, for the CPU: rotary embedding, attention, SwiGLU, RMSNorm.

Each is an autograd function with a hand-written gradient. Written op by op, as autograd would have them, these four
keep about twice as much for the backward pass and copy each row several times more often. They are used on the CPU
alone (float32 and float64; other dtypes take the plain path) and compute what the plain path does, up to the order of
sums.

Shape legend: T packed rows, Q rows that ask, h query heads, g key-value heads, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# torch's own CPU flash kernel, which scaled_dot_product_attention calls too; with it the backward pass can write each
# segment's gradient where it belongs.
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def supported(tensor: Tensor) -> bool:
    """Whether these functions take `tensor`."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------------------------- rotary


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(tensor, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(gradient, *ctx.saved_tensors, -1), None, None


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    (first, second), (first_out, second_out) = tensor.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin, value=direction)
    return out


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (half-split, as LLaMA). tensor [T, h, d]; cos and sin [T, 1, d / 2] in its dtype."""
    return _Rotate.apply(tensor, cos, sin)


# ---------------------------------------------------------------------------------------------------------- attention


def has_segment_attention(query: Tensor, key: Tensor) -> bool:
    """Whether `segment_attention` takes these: as many key-value heads as query heads, and a torch with the kernel."""
    return _flash is not None and _flash_backward is not None and supported(query) and query.shape[1] == key.shape[1]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, queries: tuple[int, ...], rows: tuple[int, ...],
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        # The value is a view into the projection of all three: a copy lets go of the rest.
        value = value.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        sums = []
        parts = zip(query.split(queries), key.split(rows), value.split(rows), out.split(queries), strict=True)
        for q, k, v, o in parts:
            if q.shape[0]:
                heads = _heads_first(q, k, v)
                found, log_sum = _flash(*heads, 0.0, _is_causal(q, k), attn_mask=_mask(q, k), scale=scale)
                o.copy_(found.squeeze(0).transpose(0, 1))
                sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.queries, ctx.rows, ctx.scale = queries, rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        gradients = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        if 0 in ctx.queries:  # segments that nothing asks about
            for tensor in gradients[1:]:
                tensor.zero_()
        splits = (ctx.queries, ctx.rows, ctx.rows, ctx.queries, ctx.queries, ctx.queries, ctx.rows, ctx.rows)
        tensors = (query, key, value, out, gradient, *gradients)
        log_sums = iter(sums)
        for q, k, v, o, g, *targets in zip(
            *(tensor.split(split) for tensor, split in zip(tensors, splits, strict=True)), strict=True
        ):
            if not q.shape[0]:
                continue
            q_, k_, v_, o_, g_ = _heads_first(q, k, v, o, g)
            found = _flash_backward(
                g_, q_, k_, v_, o_, next(log_sums), 0.0, _is_causal(q, k), attn_mask=_mask(q, k), scale=ctx.scale
            )
            for target, part in zip(targets, found, strict=True):
                target.copy_(part.squeeze(0).transpose(0, 1))
        return *gradients, None, None, None


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[rows, h, d] -> [1, h, rows, d]."""
    return [tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors]


def _is_causal(query: Tensor, key: Tensor) -> bool:
    return 1 < query.shape[0] == key.shape[0]  # one query sees its whole segment


def _mask(query: Tensor, key: Tensor) -> Tensor | None:
    """0 where a query may look and -inf elsewhere, for fewer queries than keys, aligned at the end."""
    queries, rows = query.shape[0], key.shape[0]
    if not 1 < queries < rows:
        return None
    visible = torch.ones(queries, rows, dtype=torch.bool).tril(rows - queries)
    return torch.zeros(queries, rows, dtype=query.dtype).masked_fill_(~visible, float("-inf"))


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: tuple[int, ...], rows: tuple[int, ...], scale: float | None
) -> Tensor:
    """Causal attention within segments whose last `queries` of `rows` rows ask. query [Q, h, d], others [T, h, d]."""
    return _SegmentAttention.apply(query, key, value, queries, rows, scale)


# ------------------------------------------------------------------------------------------------------------- SwiGLU


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        out = torch.empty(both.shape, dtype=both.dtype)
        (gate, up), (gate_out, up_out) = both.chunk(2, -1), out.chunk(2, -1)
        torch.mul(F.silu(gate), gradient, out=up_out)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_out)
        return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 * width], gate first; keeps its input alone."""
    if supported(both):
        return _SwiGlu.apply(both)
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------------------ RMSNorm


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * x).mul_(inverse).flatten(0, -2).sum(0)
        scaled = gradient * weight
        # d/dx of x / rms: scaled / rms - x * mean(scaled * x) / rms^3
        mean = torch.linalg.vecdot(scaled, x).unsqueeze(-1).div_(x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, mean.mul_(inverse**3), value=-1), weight_gradient, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * weight / rms(x) over the last dim; keeps x and one number a row."""
    if supported(x) and weight.dtype == x.dtype:
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)
