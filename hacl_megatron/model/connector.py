"""Connectors between the vision tower and the language model: `linear` and `mlpNx_gelu`, as LLaVA-1.5 has them.

Replicated over tensor-parallel ranks: 21M parameters in the 7B model, so splitting them would cost more in
communication than it saves. Where ranks share images out their gradients are summed; else input and the gradient of the
output are the same on every tensor-parallel rank, so the replicas stay equal without a reduction.
"""

import torch
from torch import Tensor, nn

from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.model.init import seeded_linear

NEWLINE = "connector.image_newline"
"""Among the model's parameters."""


class Connector(nn.Sequential):
    """[..., vision hidden] -> [..., language hidden]; children are numbered as in LLaVA's `mm_projector`.

    Of a model that cuts pictures into tiles (`ModelConfig.tiles`) it has `image_newline` [language hidden], the row
    that ends each line of an image's features.
    """

    def __init__(
        self,
        projector_type: str,
        vision_hidden: int,
        language_hidden: int,
        *,
        generator: torch.Generator,
        dtype: torch.dtype,
        with_newline: bool = False,
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
        if with_newline:  # as transformers draws it
            drawn = torch.empty(language_hidden, dtype=torch.float32, device="cpu")
            drawn.normal_(std=language_hidden**-0.5, generator=generator)
            self.image_newline = nn.Parameter(drawn.to(dtype))


def table_of_features(features: Tensor, newline: Tensor, pooled_rows: Tensor, pooled_weights: Tensor) -> Tensor:
    """What `PackedBatch.feature_rows` names: features [I * V, H], the newline, pooled features -> [I * V + 1 + P, H].

    Args:
        features: of the connector, one view after another.
        newline: [H].
        pooled_rows: int64 [P, 4], rows of `features`.
        pooled_weights: float32 [P, 4]; sums are fp32's, as those of torch's own bilinear interpolation.
    """
    parts = [features, newline.to(features.dtype).unsqueeze(0)]
    if pooled_rows.numel():
        # One corner after another: all four gathered at once would take four times the memory.
        corners = (
            features.index_select(0, rows).float() * weights.unsqueeze(1)
            for rows, weights in zip(pooled_rows.unbind(1), pooled_weights.unbind(1), strict=True)
        )
        parts.append(sum(corners).to(features.dtype))
    return torch.cat(parts)
