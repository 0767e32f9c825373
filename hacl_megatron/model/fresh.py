"""Initial values of the parts that no Hugging Face model holds, without building the model around them."""

import torch
from torch import Tensor, nn

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.flags import ObjectiveFlags
from hacl_megatron.model.connector import Connector
from hacl_megatron.model.heads import ContrastiveHeads
from hacl_megatron.model.init import cpu_generator, seeded_linear


def fresh_parts(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Connector and heads as `HaclModel` draws them from `seed`, by parameter name, fp32.

    Of a Q-Former's connector the projection alone: query tokens and Q-Former come with a checkpoint.
    """
    vision, language = model.vision.hidden_size, model.language.hidden_size
    drawn = {"generator": cpu_generator(seed), "dtype": torch.float32}
    parts = {
        "connector": Connector(model.projector_type, vision, language, with_newline=model.tiles is not None, **drawn)
        if model.qformer is None
        else nn.ModuleDict({"projection": seeded_linear(model.qformer.hidden_size, language, **drawn)}),
        "heads": ContrastiveHeads(
            language,
            model.projection_size,
            temperature=ObjectiveFlags().initial_temperature,
            generator=cpu_generator(seed + 1),
            dtype=torch.float32,
        ),
    }
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
