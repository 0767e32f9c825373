"""SigLIP, and SigLIP 2 of a fixed resolution, whose files are SigLIP's but for the image processor's interpolation: no
class token, no norm before the first layer, a pooling head that no feature passes through.
"""

from hacl_megatron.config.towers.tower import TowerKind

NAFLEX = (
    "SigLIP 2's NaFlex cuts pictures into patches by their proportions; take a SigLIP 2 of a fixed resolution "
    "(google/siglip2-base-patch16-224 and the like), whose files say siglip"
)

SIGLIP = TowerKind(
    model_type="siglip_vision_model",
    model_class="SiglipVisionModel",
    origin="SigLIP",
    title="SigLIP",
    part_of=("siglip",),
    stands_in=("llava",),
    has_class_token=False,
    num_outer_norms=0,
    unused=("post_layernorm", "head"),
    without_unused={"vision_use_head": False},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    aspect_ratio="stretch",
    taken_for={"siglip2": NAFLEX, "siglip2_vision_model": NAFLEX, "Siglip2ImageProcessor": NAFLEX},
    spellings=((r"(?:vision_model\.)?((?:embeddings|encoder|post_layernorm|head)\..*)", r"vision.\1"),),
    ignored=((r"text_model\..*|logit_(?:scale|bias)", "the text side of CLIP or SigLIP"),),
)
