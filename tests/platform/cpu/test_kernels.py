"""The CPU's own kernels against the same formulas op by op: values, gradients, and what they keep for the backward."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.platform.cpu import kernels
from tests.platform.segment_cases import with_gradients

CLOSE = dict(rtol=1e-12, atol=1e-12)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def plain_rotation(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' `apply_rotary_pos_emb`, whose cosines and sines stand twice."""
    first, second = tensor.chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    return tensor * cos + torch.cat([-second, first], -1) * sin


def plain_swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


ANGLES = torch.linspace(0, 7, 5 * 4, dtype=torch.float64).view(5, 1, 4)
CASES = {
    "norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), plain_rms_norm, [draw(7, 1, 12), draw(12)]),
    "rotation": (
        lambda t: kernels.rotate(t, ANGLES.cos(), ANGLES.sin()),
        lambda t: plain_rotation(t, ANGLES.cos(), ANGLES.sin()),
        [draw(5, 3, 8)],
    ),
    "activation": (kernels.swiglu, plain_swiglu, [draw(6, 1, 10)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name):
    ours, plain, tensors = CASES[name]
    for found, expected in zip(with_gradients(ours, tensors), with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_view_with_gaps_and_a_frozen_weight_do_as_well(name):
    """What megatron-core passes: parts of a projection, and weights that do not train."""
    ours, plain, (first, *others) = CASES[name]
    wide = torch.cat([first, first], dim=1).detach().requires_grad_()
    others = [other.detach() for other in others]

    def on_view(function):
        return lambda w: function(w[:, : first.shape[1]], *others)

    found, expected = (with_gradients(on_view(function), [wide]) for function in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", ["norm", "activation"])
def test_other_dtypes_take_the_plain_path(name):
    ours, plain, tensors = CASES[name]
    tensors = [tensor.detach().bfloat16() for tensor in tensors]
    torch.testing.assert_close(ours(*tensors), plain(*tensors), rtol=2e-2, atol=2e-2)


def test_what_is_kept_for_the_backward():
    """Floats a row, of a projection of 3 x 16 wide cut into queries, keys and values, and of 2 x 20 in the MLP."""
    rows = 11

    def kept(function, *tensors: Tensor) -> float:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(*tensors)
        return sum(sizes.values()) / rows / 8

    def attention(mixed: Tensor) -> Tensor:
        query, key, value = mixed.unflatten(-1, (2, 24)).split([8, 8, 8], dim=-1)
        cos, sin = torch.ones(rows, 1, 4, dtype=torch.float64), torch.zeros(rows, 1, 4, dtype=torch.float64)
        query, key = kernels.rotate(query, cos, sin), kernels.rotate(key, cos, sin)
        return kernels.segment_attention(query, key, value, (rows,), (rows,), None)

    # Queries, keys, values and outputs of 16 each, a sum for each of 2 heads, and the angles of 2 x 4.
    assert kept(attention, draw(rows, 48)) <= 4 * 16 + 2 + 2 * 2 * 4 + 1
    assert kept(kernels.swiglu, draw(rows, 1, 40)) == 40
    assert kept(lambda x: kernels.rms_norm(x, torch.ones(16, dtype=torch.float64), 1e-5), draw(rows, 16)) <= 20


def test_segments_that_nothing_asks_about_get_no_gradient():
    queries, rows = (0, 2, 0), (3, 4, 2)
    query, key, value = draw(2, 2, 8), draw(9, 2, 8), draw(9, 2, 8)
    out = kernels.segment_attention(query, key, value, queries, rows, 0.3)
    for gradient in torch.autograd.grad(out.square().sum(), (key, value)):
        assert gradient[:3].eq(0).all() and gradient[7:].eq(0).all() and gradient[3:7].ne(0).any()
    assert [*itertools.accumulate(rows)] == [3, 7, 9]
