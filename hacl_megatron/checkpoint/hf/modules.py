"""Parameters of transformers' own vision towers and Q-Former: their names and shapes, without a value of them."""

import json
from functools import cache
from typing import Any

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.towers.tower import BACKBONE_KEYS

Shapes = dict[str, tuple[int, ...]]
"""Name inside the module -> shape."""


def clean_config(values: dict[str, Any]) -> dict[str, Any]:
    """A part of a transformers `config.json` with every field of its model stated, in plain JSON values.

    What all models have (label names, versions, dtype) is left out. Two files of one model give the same, however many
    fields each of them leaves to the defaults.

    Args:
        values: with `model_type`.
    """
    from transformers import AutoConfig, PretrainedConfig  # of 4.57 too

    common = PretrainedConfig().to_dict()
    model_type = values["model_type"]
    parsed = AutoConfig.for_model(**{key: value for key, value in values.items() if key not in common}
                                  | {"model_type": model_type})  # fmt: skip
    defaults = type(parsed)().to_dict()
    # What a file says beyond the fields of its model is of no use to it.
    left_out = (*common, *BACKBONE_KEYS)
    fields = {key: value for key, value in parsed.to_dict().items() if key in defaults and key not in left_out}
    return {"model_type": model_type, **json.loads(json.dumps(fields))}


def module_shapes(model_class: str, values: dict[str, Any]) -> Shapes:
    """Of the model that `clean_config` describes: parameters under the names that transformers 5 gives them."""
    return dict(_shapes(model_class, json.dumps(values, sort_keys=True)))


@cache
def _shapes(model_class: str, config: str) -> Shapes:
    import torch
    import transformers

    values = transformers.AutoConfig.for_model(**json.loads(config))
    with torch.device("meta"):
        module = getattr(transformers, model_class)(values)
    # transformers 4.x wraps CLIP's and SigLIP's towers once more.
    return {name.removeprefix("vision_model."): tuple(value.shape) for name, value in module.named_parameters()}


def tower_shapes(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Parameters of a tower on the backend hf: those that features pass through, and those that are not built."""
    kind = config.vision.kind
    behind = tuple(
        f"{kind.layers}.{layer}." for layer in range(config.num_vision_layers_built, config.vision.num_layers)
    )
    unused = (*behind, *(f"{name}." for name in kind.unused))
    every = module_shapes(kind.model_class, config.vision.hf)
    built = {name: shape for name, shape in every.items() if not f"{name}.".startswith(unused)}
    return built, {name: shape for name, shape in every.items() if name not in built}
