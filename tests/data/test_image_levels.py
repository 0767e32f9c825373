"""Levels of odd files: infinite ones, files that the GPU's decoder takes for others, images of one colour."""

import io

import numpy as np
import pytest
from PIL import Image

from hacl_megatron.data.image_levels import gpu_decoder_is_right, is_nearly_constant, shortened


def test_infinite_levels_are_white_or_black() -> None:
    """Catches 256 levels, which wrap to black."""
    image = Image.fromarray(np.array([[0.0, 100.0, 255.0, np.inf, -np.inf, np.nan]], dtype=np.float32))
    assert shortened(image).tolist() == [[0, 100, 255, 255, 0, 0]]


def _jpeg_without_markers(names: bytes) -> bytes:
    """Noise as a JPEG without JFIF's marker, its three components by these names."""
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(file, "JPEG", subsampling=0)
    data = file.getvalue()
    assert data[2:4] == b"\xff\xe0" and data[6:10] == b"JFIF"
    data = bytearray(data[:2] + data[4 + int.from_bytes(data[4:6], "big") :])
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for component in range(3):
        data[frame + 10 + 3 * component] = data[scan + 5 + 2 * component] = names[component]
    return bytes(data)


@pytest.mark.parametrize(("names", "is_right"), [(bytes([1, 2, 3]), True), (b"RGB", False), (bytes([1, 2, 2]), False)])
def test_a_jpeg_without_markers_is_told_by_its_components(names: bytes, is_right: bool) -> None:
    """Luminance and colours are decoded on the GPU; all else that a name may mean, by Pillow."""
    data = _jpeg_without_markers(names)
    assert gpu_decoder_is_right(Image.open(io.BytesIO(data)), data) == is_right


def test_a_large_image_is_looked_at_in_pieces() -> None:
    levels = np.full((1025, 1024, 3), 7, dtype=np.uint8)
    assert is_nearly_constant(levels)
    levels[:2, :, 1] = np.linspace(20, 255, 1024).astype(np.uint8)
    assert not is_nearly_constant(levels)
