"""Sizes of the model's parts. They belong to the checkpoint, not to the user: no flag sets them.

Both are filled from a Hugging Face `config.json` (`hacl_megatron.checkpoint.hf_config`) or from the
`run_config.yaml` inside a checkpoint of this trainer; a YAML file may also spell them out under `model:` to
train from random weights.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A LLaMA: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads; equal to `num_attention_heads` without grouped-query attention."""
    vocab_size: int
    """Rows of the Hugging Face embedding, before padding for tensor parallelism."""
    kv_channels: int | None = None
    """Width of one head. Default: hidden_size / num_attention_heads."""
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """Llama-3's scaling as its config.json has it (`rope_type: llama3`, factor, ...); None for plain RoPE."""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP ViT: class token, learned positions, pre-norm before the first layer, biases everywhere."""

    num_layers: int
    """Layers of the whole tower; those behind the selected one are never built."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    norm_epsilon: float = 1e-5
    activation: str = "quick_gelu"
    """quick_gelu (OpenAI's CLIP) or gelu."""

    @property
    def num_patches(self) -> int:
        """V, the visual tokens an image: patches without the class token."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes pixels; the tower's own processor settings."""

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The assembled model: vision tower -> connector -> LLaMA, with contrastive heads of width hidden / 4."""

    language: LanguageConfig
    vision: VisionConfig
    image: ImageConfig
    projector_type: str = "mlp2x_gelu"
    vision_select_layer: int = -2
    """Index into the tower's hidden states as transformers counts them (0 is the embedding output)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Facts a round trip to Hugging Face needs and the model does not (token ids, layout of origin)."""

    @property
    def num_vision_layers_built(self) -> int:
        """Layers that run: hidden state -2 of an L-layer tower is the output of layer L - 1."""
        layer = self.vision_select_layer
        return layer if layer >= 0 else self.vision.num_layers + 1 + layer

    @property
    def projection_size(self) -> int:
        """Width of the contrastive embeddings (DESIGN: hidden / 4)."""
        return self.language.hidden_size // 4
