"""`--verify`: pictures as transformers' image processor of a folder makes pixels of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.config_write import to_preprocessor_json
from hacl_megatron.evaluation.image_agreement import compare_pixels
from tests.tiny import write_tiny_llava

SQUARE = {"height": 48, "width": 48}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor"},
    "clip, bilinear": {"image_processor_type": "CLIPImageProcessor", "resample": 2},
    "llava, padded": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "siglip 2": {"image_processor_type": "SiglipImageProcessor", "resample": 2, "size": SQUARE, "image_std": [0.5] * 3},
    "blip, other levels": {"image_processor_type": "BlipImageProcessor", "size": SQUARE, "rescale_factor": 1 / 127.5},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_tiny_llava(tmp_path_factory.mktemp("agreement") / "llava", layers=1, vision_layers=2)
    processor = json.loads((folder / "processor_config.json").read_text())
    # transformers 5 prefers the one in there to a file of its own.
    processor.pop("image_processor", None)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def write_processor(source: Path, changes: dict) -> None:
    (source / "preprocessor_config.json").unlink(missing_ok=True)
    settings = to_preprocessor_json(read_model_config(source))
    if "size" in changes:
        settings = {key: value for key, value in settings.items() if key not in ("do_center_crop", "crop_size")}
    (source / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_agree_for_what_is_taken_in(source, name):
    """Against transformers' own classes, on pictures of every mode: none is off by a level.
    Where pictures are transparent, transformers 5 goes another way than LLaVA, which is said and not an error."""
    write_processor(source, PROCESSORS[name])
    config = read_model_config(source)
    found = compare_pixels(config, source, aspect_ratio=config.extra["image_aspect_ratio"])
    assert found.holds and found.num_pictures == 7, found
    assert PROCESSORS[name]["image_processor_type"] in found.processor
    assert "of 255 levels on 7 pictures" in str(found)


def test_pictures_padded_before_clip_are_padded_for_the_comparison(source):
    """As the original layout has it, whose processor does not pad."""
    write_processor(source, PROCESSORS["clip"])
    config = read_model_config(source)
    assert compare_pixels(config, source, aspect_ratio="pad").holds


@pytest.mark.parametrize("wrong", ["interpolation", "mean", "std", "aspect_ratio"])
def test_pixels_that_differ_are_found(source, wrong):
    """Catches a comparison that holds whatever it compares."""
    write_processor(source, PROCESSORS["clip"])
    config = read_model_config(source)
    changes = {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    image = replace(config.image, **{key: value for key, value in changes.items() if key == wrong})
    aspect_ratio = "stretch" if wrong == "aspect_ratio" else "square"
    found = compare_pixels(replace(config, image=image), source, aspect_ratio=aspect_ratio)
    assert not found.holds and found.largest_difference > 3, found


def test_a_folder_without_a_processor_is_not_compared(source):
    write_processor(source, {})
    config = read_model_config(source)
    (source / "preprocessor_config.json").unlink()
    assert compare_pixels(config, source, aspect_ratio="square") is None
