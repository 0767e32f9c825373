"""Image processors as the published towers have them, DINOv2 and SigLIP 2 among them: their pixels, or a refusal.

transformers is who decides. The files are those of the hub: facebook/dinov2-base and -with-registers-base (which are
described for 518 pixels and shown 224), google/siglip-so400m-patch14-384, google/siglip2-base-patch16-224.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.evaluation.image_agreement import compare_pixels
from tests.checkpoint.hf.test_blip2 import write_llama

LEVELS = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True, "do_resize": True}
DINOV2 = {
    **LEVELS, "image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True, "do_convert_rgb": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": {"shortest_edge": 256},
}  # fmt: skip
SIGLIP = {
    **LEVELS, "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 3,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 384, "width": 384},
}  # fmt: skip
SIGLIP2 = SIGLIP | {"resample": 2, "do_convert_rgb": None, "size": {"height": 224, "width": 224}}
DINOV2_TOWER = {
    "model_type": "dinov2", "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "mlp_ratio": 4,
    "image_size": 518, "patch_size": 14, "layerscale_value": 1.0, "qkv_bias": True, "drop_path_rate": 0.0,
    "out_features": ["stage12"], "out_indices": [12], "stage_names": ["stem", *(f"stage{i}" for i in range(1, 13))],
}  # fmt: skip
REGISTERS = DINOV2_TOWER | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
GIANT = DINOV2_TOWER | {
    "hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True,
    "out_features": ["stage40"], "out_indices": [40], "stage_names": ["stem", *(f"stage{i}" for i in range(1, 41))],
}  # fmt: skip
SIGLIP_TOWER = {
    "model_type": "siglip", "text_config": {"model_type": "siglip_text_model"},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 384,
        "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
    },
}  # fmt: skip
SIGLIP2_TOWER = SIGLIP_TOWER | {"vision_config": {"model_type": "siglip_vision_model"}}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str, str]] = {
    "dinov2": (DINOV2_TOWER, DINOV2, 256, "square", "bicubic"),
    "dinov2 with registers": (REGISTERS, DINOV2, 260, "square", "bicubic"),
    "dinov2 giant": (GIANT, DINOV2, 256, "square", "bicubic"),
    "dinov2 at its own size": (
        DINOV2_TOWER, DINOV2 | {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}},
        1369, "square", "bicubic",
    ),
    "dinov2 without a processor": (DINOV2_TOWER, {}, 1369, "square", "bicubic"),
    "siglip": (SIGLIP_TOWER, SIGLIP, 729, "stretch", "bicubic"),
    "siglip 2": (SIGLIP2_TOWER, SIGLIP2, 196, "stretch", "bilinear"),
}  # fmt: skip
"""Tower, processor, features of an image, shape and interpolation."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "llama"
    write_llama(folder)
    return folder


def write(folder: Path, tower: dict[str, Any], processor: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tower))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tower_sees_the_pixels_of_transformers(llama: Path, tmp_path: Path, name: str) -> None:
    """Catches SigLIP 2's bilinear taken for SigLIP's bicubic, DINOv2's 256 taken for its 224 or the 518 of its
    positions, and the tower's own mean."""
    described, processor, features, aspect_ratio, interpolation = PUBLISHED[name]
    tower = write(tmp_path / "tower", described, processor)
    config = read_model_config(llama, tower)
    assert (config.visual_tokens, config.image.interpolation) == (features, interpolation)
    assert data_flags(config).image_aspect_ratio == aspect_ratio
    assert config.vision.hf.keys().isdisjoint({"out_features", "out_indices", "stage_names"})
    if name == "dinov2 giant":
        assert config.vision.ffn_hidden_size == 4096 and config.vision.is_gated
    for shape in {"dinov2": ("square", "pad"), "siglip 2": ("stretch",)}.get(name, ()):
        agreement = compare_pixels(config, tower, aspect_ratio=shape)
        assert agreement.holds, f"{shape}: {agreement}"


@pytest.mark.parametrize("kind", ["ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"])
@pytest.mark.parametrize(("name", "make"), [("dinov2", "Bit"), ("siglip 2", "Siglip")])
def test_every_spelling_of_a_processor_says_the_same(llama: Path, tmp_path: Path, name: str, make: str, kind: str):
    """transformers writes the class that made the pixels: torchvision's, Pillow's, or of old an extractor."""
    described, processor, *_ = PUBLISHED[name]
    expected = read_model_config(llama, write(tmp_path / "tower", described, processor))
    processor = processor | {"image_processor_type": f"{make}{kind}"}
    assert read_model_config(llama, write(tmp_path / "tower", described, processor)) == expected


NAFLEX = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16, "resample": 2}
REFUSED = {
    "NaFlex tower": ({"model_type": "siglip2", "vision_config": {"num_patches": 256}}, NAFLEX, "'siglip2'", "NaFlex"),
    "NaFlex's tower alone": ({"model_type": "siglip2_vision_model"}, NAFLEX, "'siglip2_vision_model'", "NaFlex"),
    "NaFlex processor": (SIGLIP2_TOWER, NAFLEX, "'Siglip2ImageProcessor'", "NaFlex"),
    "NaFlex processor, fast": (
        SIGLIP2_TOWER, NAFLEX | {"image_processor_type": "Siglip2ImageProcessorFast"}, "'Siglip2ImageProcessorFast'",
        "NaFlex",
    ),
    "a crop beyond the picture": (DINOV2_TOWER, DINOV2 | {"size": {"shortest_edge": 200}}, "crops to", "at least"),
    "a crop of a stretched picture": (
        DINOV2_TOWER, DINOV2 | {"size": {"height": 256, "width": 256}}, "crops to", "shortest_edge",
    ),
    "less than a patch": (
        DINOV2_TOWER, DINOV2 | {"crop_size": {"height": 13, "width": 13}}, "images of 13 pixels", "14",
    ),
    "no end of pixels": (
        DINOV2_TOWER, DINOV2 | {"size": {"shortest_edge": 10**9}, "crop_size": {"height": 10**9, "width": 10**9}},
        "1000000000", "16,384",
    ),
    "words": (
        DINOV2_TOWER, DINOV2 | {"size": {"shortest_edge": "a"}, "crop_size": {"height": "a", "width": "a"}}, "'a'",
        "a whole number",
    ),
    "another size of SigLIP": (SIGLIP_TOWER, SIGLIP2, "images of 224 pixels", "384"),
    "positions of less than a patch": (DINOV2_TOWER | {"image_size": 13}, DINOV2, "image_size 13", "patch_size 14"),
    "no registers": (REGISTERS | {"num_register_tokens": -1}, DINOV2, "num_register_tokens is -1", "1 to 16,384"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused_by_name(llama: Path, tmp_path: Path, case: str) -> None:
    """Catches a tower or processor taken for another one, and sizes that end in a traceback."""
    described, processor, *words = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        read_model_config(llama, write(tmp_path / "tower", described, processor))
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message
