"""BLIP-2's ViT, EVA-CLIP's ViT-g of MiniGPT-4 among them: all features behind its last norm, the class token too."""

from hacl_megatron.config.towers.clip import CLIP
from hacl_megatron.config.towers.tower import TowerKind

BLIP2 = TowerKind(
    model_type="blip_2_vision_model",
    model_class="Blip2VisionModel",
    origin="BLIP-2",
    title="BLIP-2's ViT",
    part_of=("blip-2",),
    with_qformer=True,
    stands_in=("blip-2",),
    has_class_token=True,
    keeps_class_token=True,
    final_norm=True,
    num_outer_norms=1,
    mean=CLIP.mean,
    std=CLIP.std,
    aspect_ratio="stretch",
    resizing_processor="BlipImageProcessor",
    spellings=(
        (r"(?:model\.)?query_tokens", r"qformer.query_tokens"),
        (r"(?:model\.)?qformer\.(.*)", r"qformer.\1"),
        (r"(?:model\.)?vision_model\.(.*)", r"vision.\1"),
    ),
    ignored=(
        (r"(?:model\.)?language_(?:model|projection)\..*",
         "BLIP-2's own language model, and the projection into it"),
    ),
)  # fmt: skip
