"""Norm layers that know about sequence parallelism, for machines without Transformer Engine.

megatron-core's own torch norm refuses sequence parallelism; its Apex one needs CUDA. Under sequence parallelism
each rank sees part of the rows, so the parameters carry `sequence_parallel` and megatron-core sums their gradients
over the tensor-parallel ranks (`finalize_model_grads`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.platform.cpu.kernels import rms_norm


class _Norm(torch.nn.Module):
    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel


class RMSNorm(_Norm):
    """x * weight / rms(x) over the last dim, in the input's dtype (LLaMA)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(_Norm):
    """Layer norm with weight and bias over the last dim (CLIP)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
