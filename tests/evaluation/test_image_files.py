"""Images by name: each file decoded once and found under its name, whatever is wrong with its neighbours."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.store import FolderStore
from hacl_megatron.evaluation.image_files import read_images


@pytest.fixture
def decoder():
    decoder = ImageDecoder(ImageConfig(size=28), aspect_ratio="pad", backend="pillow", num_threads=1)
    yield decoder
    decoder.close()


def test_every_name_has_its_own_pixels_or_a_reason(tmp_path: Path, decoder: ImageDecoder) -> None:
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_bytes(b"no picture")
    cut = (tmp_path / "green.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "again.png").write_bytes((tmp_path / "red.png").read_bytes())

    names = ["text.png", "red.png", "none.png", "blue.png", "red.png", "cut.png", "green.png", "again.png"]
    found = read_images(names, FolderStore(tmp_path), decoder)
    assert set(found.reasons) == {"text.png", "none.png", "cut.png"} and all(found.reasons.values())
    assert {name: list(views) for name, views in found.places.items()} == {
        "red.png": [0], "blue.png": [1], "green.png": [2], "again.png": [3]
    }  # fmt: skip
    assert found.pixel_values.shape == (4, 3, 28, 28) and found.pixel_values.dtype == torch.float32
    for channel, name in enumerate(("red.png", "green.png", "blue.png")):
        middle = found.pixel_values[found.places[name][0], :, 14, 14]
        assert middle.argmax() == channel, name
    assert found.keys["red.png"] == found.keys["again.png"] != found.keys["blue.png"]
    nothing = read_images(["none.png"], FolderStore(tmp_path), decoder)
    assert nothing.places == {} and nothing.pixel_values.shape == (0, 3, 28, 28)
