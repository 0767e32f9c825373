"""Whether transformers' image processor makes the pixels that training sees, of a few pictures made in memory."""

import io
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hacl_megatron.checkpoint.hf.config_write import to_preprocessor_json
from hacl_megatron.checkpoint.hf.json_files import one_line, write_json
from hacl_megatron.checkpoint.hf.tower_config import read_image_processor
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.data.images import ImageDecoder

TOLERANCES = {"pil": 0.01, "torchvision": 3.0}
"""Most levels of 255 that pixels may differ by, for the library that transformers' processor works with."""
SIZES = ((640, 480), (333, 500), (97, 350), (31, 17), (900, 150))


@dataclass(frozen=True, kw_only=True)
class ImageAgreement:
    """How close the pixels of two image processors are."""

    processor: str
    """Name of transformers' class."""
    largest_difference: float
    """In levels of 0 to 255."""
    num_pictures: int
    tolerance: float
    transparent_difference: float = 0.0
    """The same of a picture with transparency, which transformers 5 lays on white and LLaVA drops: told, not judged."""

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.tolerance

    def __str__(self) -> str:
        text = (
            f"largest pixel difference {self.largest_difference:.2g} of 255 levels on {self.num_pictures} pictures, "
            f"against {self.processor}"
        )
        if self.transparent_difference > self.tolerance:
            text += (
                f"; {self.transparent_difference:.0f} on a transparent one, which it lays on a colour of its own "
                "and --image-transparency drop does not"
            )
        return text


def compare_pixels(config: ModelConfig, folder: Path, *, aspect_ratio: str) -> ImageAgreement | None:
    """Pixels of training's decoder (by Pillow) against those of the image processor that a folder describes.

    Where training pads and the processor does not, it is given padded pictures, as LLaVA's own code does.

    Args:
        folder: a Hugging Face model, or a tower, with `preprocessor_config.json` or `processor_config.json`.
        aspect_ratio: `--image-aspect-ratio`.

    Returns:
        None where the folder describes no image processor.

    Raises:
        ValueError: transformers cannot read it.
    """
    settings = read_image_processor(folder)
    if not settings:
        return None
    layout = config.image_layout
    processor = _processor_of_tiles(config, settings) if layout.tiles else _load(folder)
    made = made_pictures()
    if not settings.get("do_convert_rgb", True):  # the others are then the caller's to convert
        made = [picture for picture in made if picture.mode == "RGB"]
    decoder = ImageDecoder(config.image, aspect_ratio=aspect_ratio, backend="pillow", num_threads=1, layout=layout)
    # An image among several may be shown otherwise than one alone.
    alone = [True] * len(made) + [False] * len(made) * (layout.tiles is not None and layout.tiles.only_alone)
    made = made * (len(alone) // len(made))
    decoded = decoder.decode([_png(picture) for picture in made], alone)
    decoder.close()
    assert not any(decoded.reasons), decoded.reasons
    decoded = [decoded.pixel_values[start:end] for start, end in pairwise(decoded.first_views)]
    pictures = made
    if layout.tiles is None and aspect_ratio == "pad" and not settings.get("do_pad"):
        pictures = [_padded(picture.convert("RGB"), decoder.fill) for picture in made]
    try:
        theirs = [_pixels(processor, picture, only) for picture, only in zip(pictures, alone, strict=True)]
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{folder}: its image processor fails on a picture: {one_line(error)}") from None
    std = torch.tensor(config.image.std, dtype=torch.float64).reshape(3, 1, 1)
    largest = transparent = 0.0
    for picture, ours, other in zip(made, decoded, theirs, strict=True):
        if other.shape != ours.shape:
            raise ValueError(
                f"{folder}: its image processor makes pixels of shape {tuple(other.shape)}; expected "
                f"{tuple(ours.shape)}, as the checkpoint's are"
            )
        difference = float(((ours.double() - other.double()) * std * 255).abs().max())
        if picture.mode == "RGBA":
            transparent = max(transparent, difference)
        else:
            largest = max(largest, difference)
    name = type(processor).__name__
    return ImageAgreement(
        processor=name,
        largest_difference=largest,
        num_pictures=sum(picture.mode != "RGBA" for picture, only in zip(made, alone, strict=True) if only),
        transparent_difference=transparent,
        tolerance=TOLERANCES["torchvision" if _by_torchvision(processor) else "pil"],
    )


def made_pictures() -> list[Image.Image]:
    """What photographs are like, in several shapes; one with transparency, one grey, one of a palette."""
    pictures = [_scene(width, height) for width, height in SIZES]
    transparent = _scene(200, 151)
    transparent.putalpha(_scene(200, 151).convert("L"))
    return [*pictures, transparent, _scene(150, 203).convert("L"), _scene(120, 90).quantize(64)]


def _scene(width: int, height: int) -> Image.Image:
    """Slopes of colour, noise of several grains, and hard edges; the same for the same size."""
    rng = np.random.default_rng([width, height])
    levels = np.linspace(0, 160, width)[None, :, None] * [1, 0.5, 0] + np.linspace(0, 160, height)[:, None, None]
    for grain in (1, 7, 40):
        coarse = rng.integers(0, 256, (-(-height // grain), -(-width // grain), 3), dtype=np.uint8)
        noise = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        levels = levels + 0.3 * np.asarray(noise, dtype=np.float64) - 20
    levels[height // 3 : height // 2, width // 4 : width // 2] = (250, 240, 5)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _load(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        try:
            return AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        except TypeError:  # transformers 4
            return AutoImageProcessor.from_pretrained(folder, use_fast=False, **options)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{folder}: transformers cannot read its image processor: {one_line(error)}") from None


def _by_torchvision(processor: Any) -> bool:
    return any("Torchvision" in kind.__name__ or kind.__name__.endswith("Fast") for kind in type(processor).__mro__)


def _pixels(processor: Any, picture: Image.Image, alone: bool) -> torch.Tensor:
    """[views, 3, S, S]"""
    given = picture if alone else [[picture, picture]]
    pixels = torch.as_tensor(np.asarray(processor(images=given, return_tensors="np")["pixel_values"][0]))
    return pixels if pixels.dim() == 4 else pixels[None]


def _processor_of_tiles(config: ModelConfig, settings: dict[str, Any]) -> Any:
    """What `settings` describe, or where that is the tower's alone, as beside the original layout, what an export has.

    With the tower's alone LLaVA's own code cuts pictures too, as transformers' processor of LLaVA-NeXT does.
    """
    if "image_grid_pinpoints" not in settings:
        settings = to_preprocessor_json(config)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "preprocessor_config.json", settings)
        return _load(Path(folder))


def _padded(picture: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """LLaVA's `expand2square`."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
