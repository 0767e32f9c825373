"""The drawings as a vision tower gets them: pixels, and what every patch shows."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from draw import BACKGROUNDS, COLOURS, SHAPES, SIZES
from PIL import Image
from torch import Tensor

IMAGE_SIZE, PATCH_SIZE = 64, 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ATTRIBUTES = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES,
    "where": ("left", "right", "top", "bottom", "middle", "two", "three"), "background": BACKGROUNDS,
}  # fmt: skip
Aspect = Literal["pad", "stretch"]
"""How an image becomes a square: LLaVA-1.5 pads it with the mean colour, MiniGPT-4 stretches it."""


def square_pixels(image: Image.Image, size: int, aspect: Aspect = "pad") -> Tensor:
    """[3, size, size] normalised pixels of an image that was made a square, then resized."""
    square = image.convert("RGB")
    if aspect == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in CLIP_MEAN))
        square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return (pixels / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def patch_labels(scene: dict, grid: int, aspect: Aspect = "pad") -> Tensor:
    """[A, grid * grid] int64: for each of `ATTRIBUTES`, what a patch shows; 0 where its centre shows no thing."""
    width, height = scene["width"], scene["height"]
    shift_x = shift_y = 0
    if aspect == "pad":
        width = height = max(width, height)
        shift_x, shift_y = (width - scene["width"]) // 2, (height - scene["height"]) // 2
    centres_x, centres_y = ((torch.arange(grid) + 0.5) * side / grid for side in (width, height))
    facts = scene["facts"]
    labels = torch.zeros(len(ATTRIBUTES), grid, grid, dtype=torch.long)
    labels[list(ATTRIBUTES).index("background")] = 1 + BACKGROUNDS.index(facts["background"])
    for number, thing in enumerate(scene["things"]):
        left, top, right, bottom = thing["box"]
        columns = (centres_x >= left + shift_x) & (centres_x <= right + shift_x)
        rows = (centres_y >= top + shift_y) & (centres_y <= bottom + shift_y)
        if "relation" in facts:  # the things are listed from left to right, from top to bottom
            where = (("left", "right") if facts["relation"] in ("left of", "right of") else ("top", "bottom"))[number]
        else:
            where = facts["count"] if "count" in facts else facts["place"].split()[-1]
        for row, value in enumerate((thing["colour"], thing["shape"], thing["size"], where)):
            labels[row, rows[:, None] & columns[None, :]] = 1 + list(ATTRIBUTES.values())[row].index(value)
    return labels.flatten(1)


def load_scenes(data: Path, prefix: str | tuple[str, ...], size: int, aspect: Aspect = "pad") -> tuple[Tensor, Tensor]:
    """(float16 pixels [B, 3, size, size], patch labels [B, A, grid * grid]) of the images named `prefix`..."""
    pixels, labels = [], []
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        if scene["image"].startswith(prefix):
            with Image.open(data / "images" / scene["image"]) as image:
                pixels.append(square_pixels(image, size, aspect).half())  # half of the memory
            labels.append(patch_labels(scene, size // PATCH_SIZE, aspect))
    return torch.stack(pixels), torch.stack(labels)


def mirror(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same scenes seen in a mirror: left is right."""
    grid = math.isqrt(labels.shape[-1])
    labels = labels.unflatten(-1, (grid, grid)).flip(-1).flatten(-2).clone()
    where = labels[:, list(ATTRIBUTES).index("where")]
    where.copy_(torch.where(where == 1, 2, torch.where(where == 2, 1, where)))
    return pixels.flip(-1), labels
