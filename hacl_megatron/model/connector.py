"""Connectors between the vision tower and the language model: `linear` and `mlpNx_gelu`, as LLaVA-1.5 has them.

Replicated over tensor-parallel ranks: 21M parameters in the 7B model, so splitting them would cost more in
communication than it saves. Their input and the gradient of their output are the same on every tensor-parallel rank,
so the replicas stay equal without a reduction.
"""

import torch
from torch import nn

from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.model.init import seeded_linear


class Connector(nn.Sequential):
    """[..., vision hidden] -> [..., language hidden]; children are numbered as in LLaVA's `mm_projector`."""

    def __init__(
        self,
        projector_type: str,
        vision_hidden: int,
        language_hidden: int,
        *,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        layers: list[nn.Module] = [
            seeded_linear(vision_hidden, language_hidden, generator=generator, dtype=dtype),
        ]
        for _ in range(connector_depth(projector_type) - 1):
            layers += [
                nn.GELU(),
                seeded_linear(language_hidden, language_hidden, generator=generator, dtype=dtype),
            ]
        super().__init__(*layers)
