"""Initial values of the parts that no Hugging Face model holds, without building the model around them."""

import torch
from torch import Tensor

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.flags import ObjectiveFlags
from hacl_megatron.model.connector import Connector
from hacl_megatron.model.heads import ContrastiveHeads
from hacl_megatron.model.init import cpu_generator


def fresh_parts(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Connector and heads as `HaclModel` draws them from `seed`, by parameter name, fp32."""
    vision, language = model.vision.hidden_size, model.language.hidden_size
    parts = {
        "connector": Connector(
            model.projector_type, vision, language, generator=cpu_generator(seed), dtype=torch.float32
        ),
        "heads": ContrastiveHeads(
            language,
            model.projection_size,
            temperature=ObjectiveFlags().initial_temperature,
            generator=cpu_generator(seed + 1),
            dtype=torch.float32,
        ),
    }
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
