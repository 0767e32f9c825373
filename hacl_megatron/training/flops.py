"""Arithmetic of one optimiser step, for the model-TFLOP/s tag.

Counts matrix products alone, 2 per multiply-add, as Megatron-LM does: forward once, the gradient of the input once
where anything before it trains, the gradient of the weight once where it trains. Recomputation is not counted (model,
not hardware, FLOPs).
"""

from collections.abc import Iterable

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.model.connector import connector_depth


def language_flops(
    model: ModelConfig, lengths: Iterable[int], num_targets: int, *, vocab_size: int, trained: bool
) -> float:
    """FLOPs of the LLaMA over packed segments of `lengths` rows, with the LM head on `num_targets` rows.

    Forward and input gradients always count: the connector before it trains.
    """
    language = model.language
    head = language.head_dim
    qkv = language.hidden_size * head * (language.num_attention_heads + 2 * language.num_query_groups)
    out = language.hidden_size * head * language.num_attention_heads
    mlp = 3 * language.hidden_size * language.ffn_hidden_size
    rows, squares = 0, 0
    for length in lengths:
        rows += length
        squares += length * length
    passes = 3 if trained else 2
    linear = 2 * rows * (qkv + out + mlp) * passes
    # Scores and values, causal: half of 2 * 2 * length^2 * width; backward costs twice the forward.
    attention = 2 * squares * head * language.num_attention_heads * 3
    lm_head = 2 * num_targets * language.hidden_size * vocab_size * passes
    return float(language.num_layers * (linear + attention) + lm_head)


def vision_flops(model: ModelConfig, num_images: int, *, trained: bool) -> float:
    """FLOPs of the vision tower and connector over `num_images` images."""
    vision = model.vision
    rows = vision.num_patches + 1
    layer = 2 * rows * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size)
    attention = 4 * rows * rows * vision.hidden_size
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
    tower = (model.num_vision_layers_built * (layer + attention) + patches) * (3 if trained else 1)
    hidden = model.language.hidden_size
    depth = connector_depth(model.projector_type)
    connector = 2 * vision.num_patches * (vision.hidden_size * hidden + (depth - 1) * hidden * hidden) * 3
    return float(num_images * (tower + connector))
