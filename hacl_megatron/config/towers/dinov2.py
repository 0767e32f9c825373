"""DINOv2, without and with registers: class token, layer scale, positions interpolated to the image that comes.

The published towers are described for 518 pixels, and their image processors make 224: transformers interpolates the
37 x 37 positions to 16 x 16 in every pass. Registers stand between class token and patches, and are features too: LLaVA
drops the first row alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hacl_megatron.config.towers.tower import SIZES, FileName, TowerKind


def ffn_hidden_size(values: Mapping[str, Any]) -> int:
    """Of `Dinov2MLP`; of `Dinov2SwiGLUFFN` two thirds of that, in eights."""
    width = int(values["hidden_size"] * values["mlp_ratio"])
    return (int(width * 2 / 3) + 7) // 8 * 8 if values.get("use_swiglu_ffn") else width


DINOV2 = TowerKind(
    model_type="dinov2",
    model_class="Dinov2Model",
    origin="DINOv2",
    title="DINOv2",
    stands_in=("llava",),
    has_class_token=True,
    interpolates_positions=True,
    num_outer_norms=0,
    layer_scales=2,
    gated="use_swiglu_ffn",
    layers="encoder.layer",
    unused=("layernorm", "embeddings.mask_token"),
    without_unused={"use_mask_token": False},
    sizes={ours: theirs for ours, theirs in SIZES.items() if ours != "ffn_hidden_size"},
    derived={"ffn_hidden_size": ffn_hidden_size},
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    aspect_ratio="square",
    spellings=((r"(?:dinov2(?:_with_registers)?\.)?((?:embeddings|encoder|layernorm)\..*)", r"vision.\1"),),
    ignored=((r"classifier\..*", "DINOv2's classifier of images"),),
    wrapper="",
    file_names=(
        FileName(r"(.*\.attention)\.q_proj\.(.*)", r"\1.attention.query.\2"),
        FileName(r"(.*\.attention)\.k_proj\.(.*)", r"\1.attention.key.\2"),
        FileName(r"(.*\.attention)\.v_proj\.(.*)", r"\1.attention.value.\2"),
        FileName(r"(.*\.attention)\.o_proj\.(.*)", r"\1.output.dense.\2"),
        FileName(r"(.*\.mlp)\.gate_proj\.(.*)", r"\1.weights_in.\2", part=0, parts=2),
        FileName(r"(.*\.mlp)\.up_proj\.(.*)", r"\1.weights_in.\2", part=1, parts=2),
        FileName(r"(.*\.mlp)\.down_proj\.(.*)", r"\1.weights_out.\2"),
    ),
)

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    model_type="dinov2_with_registers",
    model_class="Dinov2WithRegistersModel",
    title="DINOv2 with registers",
    registers="num_register_tokens",
    without_unused={},
)
