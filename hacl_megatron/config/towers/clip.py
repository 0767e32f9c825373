"""CLIP: class token, learned positions, a norm before the first layer, biases everywhere. LLaVA-1.5's tower.

The one tower that megatron-core has too, and what a model without a word on its tower has.
"""

from collections.abc import Mapping
from typing import Any

from hacl_megatron.config.tensor_rows import Source, row
from hacl_megatron.config.towers.tower import MegatronTower, TowerKind, TowerSizes

LAYER = (
    row("input_layernorm.weight", "replicated", ("layer_norm1.weight", "h")),
    row("input_layernorm.bias", "replicated", ("layer_norm1.bias", "h")),
    row("self_attention.linear_qkv.weight", "qkv",
        ("self_attn.q_proj.weight", "h h"), ("self_attn.k_proj.weight", "h h"), ("self_attn.v_proj.weight", "h h")),
    row("self_attention.linear_qkv.bias", "qkv",
        ("self_attn.q_proj.bias", "h"), ("self_attn.k_proj.bias", "h"), ("self_attn.v_proj.bias", "h")),
    row("self_attention.linear_proj.weight", "row", ("self_attn.out_proj.weight", "h h")),
    row("self_attention.linear_proj.bias", "replicated", ("self_attn.out_proj.bias", "h")),
    row("pre_mlp_layernorm.weight", "replicated", ("layer_norm2.weight", "h")),
    row("pre_mlp_layernorm.bias", "replicated", ("layer_norm2.bias", "h")),
    row("mlp.linear_fc1.weight", "column", ("mlp.fc1.weight", "f h")),
    row("mlp.linear_fc1.bias", "column", ("mlp.fc1.bias", "f")),
    row("mlp.linear_fc2.weight", "row", ("mlp.fc2.weight", "h f")),
    row("mlp.linear_fc2.bias", "replicated", ("mlp.fc2.bias", "h")),
)  # fmt: skip
OUTSIDE = (
    row("class_token", "class_token", ("embeddings.class_embedding", "h")),
    row("conv1.weight", "replicated", ("embeddings.patch_embedding.weight", "h c p p")),
    row("position_embeddings.weight", "replicated", ("embeddings.position_embedding.weight", "n h")),
    row("ln_pre.weight", "replicated", ("pre_layrnorm.weight", "h")),  # transformers' own spelling
    row("ln_pre.bias", "replicated", ("pre_layrnorm.bias", "h")),
)
POST_NORM = (Source("post_layernorm.weight", "h"), Source("post_layernorm.bias", "h"))

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
LARGE_336 = {**LARGE, "image_size": 336}
"""Of a LLaVA that does not describe its tower, as transformers' LlavaConfig has it."""


def write_clip(vision: TowerSizes, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`vision_config` of a LLaVA, or the config.json of a CLIP tower's folder."""
    return {
        "model_type": CLIP.model_type,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_epsilon,
        "projection_dim": extra.get("vision_projection_dim", 768),
    }


CLIP = TowerKind(
    model_type="clip_vision_model",
    model_class="CLIPVisionModel",
    origin="CLIP",
    title="CLIP",
    part_of=("clip",),
    stands_in=("llava", "original"),
    has_class_token=True,
    num_outer_norms=1,
    unused=("post_layernorm",),
    published={
        "openai/clip-vit-large-patch14-336": LARGE_336,
        "openai/clip-vit-large-patch14": {**LARGE, "image_size": 224},
    },
    megatron=MegatronTower(
        layer=LAYER,
        outside=OUTSIDE,
        unused=POST_NORM,
        activations=("quick_gelu", "gelu"),
        kept={"vision_projection_dim": "projection_dim"},
        write=write_clip,
    ),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    aspect_ratio="square",
    spellings=((r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", r"vision.\1"),),
    ignored=(
        (r"(?:text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)",
         "the text side of CLIP or SigLIP"),
    ),
)  # fmt: skip
