"""Settings of an image processor that change a picture's pixels: this trainer has them, or refuses them by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.config_write import to_preprocessor_json
from hacl_megatron.data.images import ImageDecoder
from tests.tiny import CLIPImageProcessor, tiny_image_processor, write_tiny_llava

SETTINGS = {
    "plain": {}, "class": {"image_processor_type": "CLIPImageProcessor"}, "rgb": {"do_convert_rgb": False},
    "unknown-rgb": {"do_convert_rgb": None}, "stated": {"resample": 3, "rescale_factor": 0.00392156862745098},
    "bilinear": {"resample": 2}, "no-normalising": {"do_normalize": False}, "no-rescaling": {"do_rescale": False},
    "rescaling": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "levels": {"do_normalize": False, "do_rescale": False},
    "old-class": {"image_processor_type": "CLIPFeatureExtractor"},
    "larger-than-the-crop": {"size": {"shortest_edge": 55}, "image_processor_type": "BitImageProcessor"},
}  # fmt: skip
REFUSED = {
    "nearest": ({"resample": 0}, "resample is 0; this trainer supports 3 or 2 only"),
    "lanczos": ({"resample": 1}, "resample is 1; this trainer supports 3 or 2 only"),
    "box": ({"resample": 4}, "resample is 4; this trainer supports 3 or 2 only"),
    "hamming": ({"resample": 5}, "resample is 5; this trainer supports 3 or 2 only"),
    "rescaling": ({"rescale_factor": -1.0}, "rescale_factor is -1.0; expected a number above 0"),
    "patches": ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type is 'Siglip2ImageProcessor'"),
    "tiles": (
        {"image_processor_type": "LlavaNextImageProcessorFast"},
        "is 'LlavaNextImageProcessorFast'; this trainer",
    ),
    "no-resizing": ({"do_resize": False}, "do_resize is False"),
    "no-cropping": ({"do_center_crop": False}, "do_center_crop is False after resizing to {'shortest_edge': 48}"),
    "crop-beyond": ({"size": {"shortest_edge": 40}}, "resizes to {'shortest_edge': 40} and crops to"),
    "crop-of-stretched": ({"size": {"height": 60, "width": 60}}, "resizes to {'height': 60, 'width': 60} and crops to"),
    "padding": ({"do_pad": True}, "do_pad is True for a CLIPImageProcessor; expected LlavaImageProcessor"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("processors") / "llava", layers=1, vision_layers=2)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Larger than the tower's square, oblong, and rough."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((80, 60), Image.Resampling.BICUBIC)


def with_settings(source: Path, changes: dict) -> dict:
    """Written beside the model, as transformers has it; returned."""
    settings = {**tiny_image_processor().to_dict(), **changes}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    (source / "preprocessor_config.json").write_text(json.dumps(settings, default=dict))
    beside = json.loads((source / "processor_config.json").read_text())
    beside.pop("image_processor", None)  # which transformers 5 would read in its place
    (source / "processor_config.json").write_text(json.dumps(beside))
    return json.loads((source / "preprocessor_config.json").read_text())


def pixels_of(settings: dict, picture: Image.Image) -> Tensor:
    return CLIPImageProcessor.from_dict(settings)(picture, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_taken_gives_transformers_pixels(source, picture, tmp_path, name):
    """Catches a setting that is taken and not obeyed, in training and in what an export says."""
    settings = with_settings(source, SETTINGS[name])
    config = read_model_config(source)
    expected = pixels_of(settings, picture).float()
    picture.save(tmp_path / "picture.png")
    decoder = ImageDecoder(
        config.image, aspect_ratio=config.extra["image_aspect_ratio"], backend="pillow", num_threads=1
    )
    ours = decoder.decode([(tmp_path / "picture.png").read_bytes()])
    decoder.close()
    assert ours.reasons == [None]
    assert (ours.pixel_values[0] - expected).abs().max() <= 1e-4 * expected.std()
    exported = to_preprocessor_json(config)
    torch.testing.assert_close(pixels_of(exported, picture), expected, rtol=1e-5, atol=1e-5 * expected.std().item())
    assert exported["do_convert_rgb"] == settings.get("do_convert_rgb")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_refused_by_name(source, picture, name):
    """Each gives other pixels (some: in the processor that has them), and was dropped without a word."""
    changes, message = REFUSED[name]
    settings = with_settings(source, changes)
    if name not in ("padding", "patches", "tiles"):
        default = pixels_of(with_settings(source, {}), picture)
        other = pixels_of(settings, picture)
        assert other.shape != default.shape or (other - default).abs().max() > 0.05
        with_settings(source, changes)
    with pytest.raises(ValueError) as caught:
        read_model_config(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(source / "preprocessor_config.json"))


def test_a_crop_that_is_switched_off_counts_for_nothing(source):
    """Catches CLIP's `crop_size` taken for the size of pictures that are stretched to another."""
    square = {"height": 48, "width": 48}
    with_settings(source, {"do_center_crop": False, "size": square, "crop_size": {"height": 40, "width": 40}})
    config = read_model_config(source)
    assert config.image.size == 48 and config.extra["image_aspect_ratio"] == "stretch"


@pytest.mark.parametrize("changes", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_padding_without_the_usual_levels_is_refused(source, changes):
    """transformers then pads with `mean * 255` all the same, which is not the colour that becomes 0."""
    with_settings(source, {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **changes})
    with pytest.raises(ValueError, match=r"do_pad with do_normalize .* pads with a colour that is not the mean"):
        read_model_config(source)


def test_a_processor_without_resample_resizes_as_its_class_does(source):
    """Catches ViT's, bilinear by default, taken for CLIP's."""
    square = {"height": 48, "width": 48}
    for kind, usual in (("ViTImageProcessor", "bilinear"), ("SiglipImageProcessorFast", "bicubic")):
        settings = with_settings(source, {"image_processor_type": kind, "size": square, "do_center_crop": False})
        assert read_model_config(source).image.interpolation == "bicubic"
        del settings["resample"]
        (source / "preprocessor_config.json").write_text(json.dumps(settings))
        assert read_model_config(source).image.interpolation == usual, kind
