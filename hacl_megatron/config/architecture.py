"""Sizes of the model's parts. They belong to the checkpoint, not to the user: no flag sets them.

Both are filled from a Hugging Face `config.json` (`hacl_megatron.checkpoint.hf.config_read`) or from the
`run_config.yaml` inside a checkpoint of this trainer; a YAML file may also spell them out under `model:` to
train from random weights.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hacl_megatron.config.tiles import ImageLayout, TilesConfig
from hacl_megatron.config.towers import CLIP, TowerKind, tower_kind


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder with rotary positions and grouped-query attention; what else its layers have, its family says."""

    family: str = "llama"
    """`config.families`."""
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
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    """As config.json has it (`rope_type: llama3`, factor, ...; `config.families.rotary`); None for plain RoPE."""
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    """Rows that a query may see, its own among them; None: all. Never computed: longer samples are refused."""
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def letters(self) -> dict[str, int]:
        """Sizes by the letters of `config.tensor_rows`."""
        return {
            "h": self.hidden_size,
            "q": self.num_attention_heads * self.head_dim,
            "kv": self.num_query_groups * self.head_dim,
            "d": self.head_dim,
            "f": self.ffn_hidden_size,
            "v": self.vocab_size,
        }


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer: megatron-core's CLIP, or a model of transformers as it is.

    megatron-core's: class token, learned positions, pre-norm before the first layer, biases everywhere.
    """

    num_layers: int
    """Layers of the whole tower; those behind the selected one are never built."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int
    """Pixels a side that the tower gets; `hf` may tell another size, of positions that transformers interpolates."""
    patch_size: int
    norm_epsilon: float = 1e-5
    activation: str = "quick_gelu"
    """quick_gelu (OpenAI's CLIP) or gelu. Of the backend hf this and `norm_epsilon` are what `hf` says."""
    backend: Literal["megatron", "hf"] = "megatron"
    """megatron: megatron-core's CLIP, tensor parallel. hf: transformers' model, replicated (`config.towers`)."""
    hf: dict[str, Any] | None = field(default=None, hash=False)
    """Of the backend hf alone: the tower's own transformers configuration (`config.to_dict()`), JSON values only."""

    @property
    def num_patches(self) -> int:
        """Patches of an image, without a class token; a rest at the borders is in none (SigLIP's 384 / 14)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def kind(self) -> TowerKind:
        """What the tower is; without `hf` a CLIP. ValueError for one that `config.towers` does not know."""
        return CLIP if self.hf is None else tower_kind(self.hf.get("model_type"))

    @property
    def num_registers(self) -> int:
        """Rows between the class token and the patches."""
        return self.hf[self.kind.registers] if self.kind.registers else 0

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward part is a SwiGLU, of three products."""
        return bool(self.kind.gated and self.hf.get(self.kind.gated))

    @property
    def sequence_length(self) -> int:
        """Rows an image inside the tower: patches, registers and a class token."""
        return self.num_patches + self.num_registers + self.kind.has_class_token

    @property
    def num_features(self) -> int:
        """Rows an image that the tower hands to the connector: patches, registers, and the class token where it is
        kept."""
        return self.num_patches + self.num_registers + self.kind.keeps_class_token

    @property
    def letters(self) -> dict[str, int]:
        """Sizes by the letters of `config.tensor_rows`, for a tower with a class token."""
        return {
            "h": self.hidden_size,
            "f": self.ffn_hidden_size,
            "p": self.patch_size,
            "c": 3,
            "n": self.num_patches + 1,
        }

    def on(self, backend: Literal["megatron", "hf"]) -> "VisionConfig":
        """The same tower on another backend.

        Raises:
            ValueError: megatron-core has no such tower.
        """
        if backend == self.backend:
            return self
        kind = self.kind
        if backend == "hf":
            facts = {theirs: getattr(self, ours) for ours, theirs in {**kind.sizes, **kind.traits}.items()}
            return replace(self, backend="hf", hf={"model_type": kind.model_type, **facts})
        if kind.megatron is None:
            raise ValueError(
                f"--vision-backend is megatron, but the vision tower is a {kind.model_type}; megatron-core has CLIP's "
                "alone: use --vision-backend hf"
            )
        return replace(self, backend="megatron", hf=None)


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """BLIP-2's Q-Former: learned query tokens that attend to one another and, across, to all tower features."""

    num_query_tokens: int
    hidden_size: int
    hf: dict[str, Any] = field(hash=False)
    """Its own transformers configuration (`Blip2QFormerConfig.to_dict()`), JSON values only."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes pixels; the tower's own processor settings."""

    size: int
    mean: tuple[float, float, float] = CLIP.mean
    std: tuple[float, float, float] = CLIP.std
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How it is resized; always with antialiasing."""
    shortest_edge: int | None = None
    """What `pad` and `square` resize to before they cut out the centre of `size`. Default: `size`."""

    @property
    def resized(self) -> int:
        """Pixels of the shortest edge before the centre is cut out."""
        return self.shortest_edge or self.size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The assembled model: vision tower -> connector -> LLaMA, with contrastive heads of width hidden / 4."""

    language: LanguageConfig
    vision: VisionConfig
    image: ImageConfig
    projector_type: str = "mlp2x_gelu"
    """`linear`, `mlpNx_gelu`, or `qformer`: a Q-Former and a linear projection behind it."""
    vision_select_layer: int = -2
    """Index into the tower's hidden states as transformers counts them (0 is the embedding output)."""
    qformer: QFormerConfig | None = None
    """There exactly when `projector_type` is `qformer`."""
    tiles: TilesConfig | None = None
    """How pictures of any resolution are cut (LLaVA-NeXT, LLaVA-OneVision); None: each is one view."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """Facts a round trip to Hugging Face needs and the model does not (token ids, layout of origin)."""

    @property
    def visual_tokens(self) -> int:
        """V, rows a view takes in the language model: query tokens of a Q-Former, else features of the tower."""
        return self.vision.num_features if self.qformer is None else self.qformer.num_query_tokens

    @property
    def image_layout(self) -> ImageLayout:
        """What decides the rows of images."""
        return ImageLayout(visual_tokens=self.visual_tokens, view_size=self.vision.image_size, tiles=self.tiles)

    @property
    def num_vision_layers_built(self) -> int:
        """Layers that run: hidden state -2 of an L-layer tower is the output of layer L - 1."""
        layer = self.vision_select_layer
        return layer if layer >= 0 else self.vision.num_layers + 1 + layer

    @property
    def projection_size(self) -> int:
        """Width of the contrastive embeddings (hidden / 4)."""
        return self.language.hidden_size // 4
