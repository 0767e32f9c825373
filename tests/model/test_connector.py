"""The connector types of LLaVA-1.5."""

import pytest
import torch
from torch import nn

from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.model.connector import Connector, table_of_features
from hacl_megatron.model.init import cpu_generator, seeded_linear

TYPES = {"linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3, "mlp10x_gelu": 10}


def connector(projector_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Connector:
    return Connector(projector_type, 12, 20, generator=cpu_generator(seed), dtype=dtype)


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_forward_is_that_of_the_layers_by_hand(projector_type):
    """Names as in `mm_projector`: linear layers at 0, 2, 4 with an exact (erf) GELU between them."""
    depth, module = TYPES[projector_type], connector(projector_type)
    state = module.state_dict()
    assert list(state) == [f"{2 * i}.{kind}" for i in range(depth) for kind in ("weight", "bias")]
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    y = x
    for index in range(depth):
        y = y @ state[f"{2 * index}.weight"].T + state[f"{2 * index}.bias"]
        if index < depth - 1:
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(module(x), y)
    assert module(x).shape == (2, 5, 20)


@pytest.mark.parametrize("projector_type", TYPES)
def test_depth(projector_type):
    assert connector_depth(projector_type) == TYPES[projector_type]
    assert sum(isinstance(layer, nn.Linear) for layer in connector(projector_type)) == TYPES[projector_type]


@pytest.mark.parametrize("bad", ["identity", "mlp0x_gelu", "mlp2x_relu", "mlpx_gelu", "mlp2x_gelu ", "mlp-1x_gelu", ""])
def test_an_unknown_type_is_refused_in_one_line(bad):
    with pytest.raises(ValueError, match="--mm-projector-type") as error:
        connector(bad)
    assert repr(bad) in str(error.value) and "linear" in str(error.value) and "\n" not in str(error.value)


def test_initial_values_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = connector("mlp2x_gelu").state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = connector("mlp2x_gelu").state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    other = connector("mlp2x_gelu", seed=1).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert not torch.equal(value, other[name])
    half = connector("mlp2x_gelu", dtype=torch.bfloat16).state_dict()
    for name, value in first.items():
        assert torch.equal(half[name], value.bfloat16()), "a bf16 run starts from the rounded numbers of an fp32 run"


def test_a_newline_is_drawn_behind_the_layers_as_transformers_draws_it():
    """normal / sqrt(hidden); a connector with one starts from the layers that it would have without."""
    options = {"generator": cpu_generator(0), "dtype": torch.float32}
    module = Connector("mlp2x_gelu", 12, 4000, with_newline=True, **options)
    plain = Connector("mlp2x_gelu", 12, 4000, generator=cpu_generator(0), dtype=torch.float32).state_dict()
    assert list(module.state_dict()) == ["image_newline", *plain], "the order of `assemble.parameters`"
    assert all(torch.equal(module.state_dict()[name], value) for name, value in plain.items())
    newline = module.image_newline
    assert newline.requires_grad and newline.shape == (4000,)
    torch.testing.assert_close(newline.std(), torch.tensor(4000**-0.5), rtol=0.05, atol=0)
    assert abs(newline.mean()) < 3 / 4000 and newline.unique().numel() > 3900


def test_pooled_features_are_summed_in_fp32():
    """Of bf16 features: one rounding, as torch's interpolation has it; gradients go to the four."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 16, generator=generator).bfloat16().requires_grad_()
    newline = torch.randn(16, generator=generator).bfloat16().requires_grad_()
    rows, weights = torch.randint(50, (7, 4), generator=generator), torch.rand(7, 4, generator=generator)
    table = table_of_features(features, newline, rows, weights)
    assert table.dtype == torch.bfloat16 and table.shape == (58, 16)
    assert torch.equal(table[:50], features) and torch.equal(table[50], newline)
    exact = (features.detach().double()[rows] * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(table[51:].double(), exact, rtol=2**-8, atol=1e-6)
    table[50:].float().sum().backward()
    assert torch.equal(newline.grad, torch.ones_like(newline))
    expected = torch.zeros(50).index_add(0, rows.flatten(), weights.flatten())
    torch.testing.assert_close(features.grad[:, 0].float(), expected, rtol=0.02, atol=0)


def test_initial_distribution_is_that_of_torch():
    """Uniform within 1 / sqrt(in features), for weight and bias."""
    ours = seeded_linear(100, 400, generator=cpu_generator(3), dtype=torch.float32)
    torch.manual_seed(3)
    theirs = nn.Linear(100, 400)
    for name in ("weight", "bias"):
        a, b = getattr(ours, name).detach(), getattr(theirs, name).detach()
        assert a.abs().max() <= 0.1
        assert a.requires_grad is False and getattr(ours, name).requires_grad
        torch.testing.assert_close(a.abs().max(), b.abs().max(), rtol=0.01, atol=0)
        torch.testing.assert_close(a.std(), b.std(), rtol=0.1, atol=0)
