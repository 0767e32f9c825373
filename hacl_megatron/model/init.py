"""Seeded initial values that do not depend on the layout: every rank that holds a replica draws the same numbers."""

import torch
from torch import nn


def seeded_linear(in_features: int, out_features: int, *, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """`nn.Linear` with torch's default distribution (uniform within 1 / sqrt(in)), drawn in fp32 from `generator`."""
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, dtype=dtype)
    bound = in_features**-0.5
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(values.uniform_(-bound, bound, generator=generator))
    return linear


def cpu_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a GPU run starts from the same numbers as a CPU run."""
    return torch.Generator(device="cpu").manual_seed(seed)
