"""`ModelConfig` of a tiny model of transformers, written down from its configuration object by hand."""

import json
from typing import Any

import torch
from transformers import (
    AutoModel,
    Blip2Config,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
)

from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, QFormerConfig, VisionConfig


def json_clean(config: PreTrainedConfig) -> dict[str, Any]:
    """`to_dict()` with JSON's types alone, as a run_config.yaml keeps it."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def dinov2_ffn(config: Dinov2Config | Dinov2WithRegistersConfig) -> int:
    """As transformers' own module has it."""
    with torch.device("meta"):
        mlp = AutoModel.from_config(config).encoder.layer[0].mlp
    return (mlp.down_proj if config.use_swiglu_ffn else mlp.fc2).in_features


def tower(config: PreTrainedConfig) -> VisionConfig:
    """A transformers vision model on the backend hf."""
    ffn = getattr(config, "intermediate_size", None) or dinov2_ffn(config)
    return VisionConfig(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=ffn,
        num_attention_heads=config.num_attention_heads, image_size=config.image_size, patch_size=config.patch_size,
        norm_epsilon=config.layer_norm_eps, activation=config.hidden_act, backend="hf", hf=json_clean(config),
    )  # fmt: skip


def language(config: LlamaConfig) -> LanguageConfig:
    return LanguageConfig(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.num_key_value_heads,
        vocab_size=config.vocab_size, norm_epsilon=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip


def architecture(config: Blip2Config | LlavaConfig) -> ModelConfig:
    """Of BLIP-2 with a LLaMA, or of a LLaVA whose tower runs as transformers has it."""
    parts = {
        "language": language(config.text_config),
        "vision": tower(config.vision_config),
        "image": ImageConfig(size=config.vision_config.image_size),
    }
    if isinstance(config, LlavaConfig):
        return ModelConfig(**parts, vision_select_layer=config.vision_feature_layer)
    qformer = config.qformer_config
    return ModelConfig(
        **parts,
        projector_type="qformer",
        vision_select_layer=-1,
        qformer=QFormerConfig(
            num_query_tokens=config.num_query_tokens, hidden_size=qformer.hidden_size, hf=json_clean(qformer)
        ),
    )
