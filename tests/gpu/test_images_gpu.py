"""Images decoded, resized and normalised by DALI's `mixed` graph against those of the host."""

import numpy as np
import pytest
import torch

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder
from tests.data.drawn_images import BAD, KINDS, SIZES, drawing, jpeg

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not images.dali_is_installed(), reason="DALI is not installed"),
]
CONFIG = ImageConfig(size=336)
TOLERANCE = (10 / 255 / np.array(CONFIG.std)).reshape(3, 1, 1)
"""10 of 255 levels: DALI's resize differs by up to 8 from Pillow's, which the host's follows to 2."""


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
def test_mixed_pixels_are_those_of_the_cpu(aspect_ratio):
    files = [jpeg(*size) for size in SIZES] + [make(drawing(200, 150)) for make in KINDS.values()]
    decoded = {}
    for device in ("cpu", "mixed"):
        decoder = ImageDecoder(CONFIG, aspect_ratio=aspect_ratio, backend="dali", device=device, device_id=0)
        decoded[device] = decoder.decode(files)
        assert decoded[device].reasons == [None] * len(files)
        assert decoded[device].pixel_values.device.type == "cpu"
        decoder.close()
    difference = (decoded["mixed"].pixel_values - decoded["cpu"].pixel_values).abs().numpy()
    worst = (difference / TOLERANCE).reshape(len(files), -1).max(axis=1)
    names = [f"jpeg {size}" for size in SIZES] + list(KINDS)
    assert worst.max() <= 1, {name: float(share) for name, share in zip(names, worst, strict=True) if share > 1}


def test_mixed_refuses_broken_files_and_moves_nothing_else():
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend="dali", device="mixed", device_id=0)
    good = [jpeg(60, 40, seed) for seed in range(3)]
    alone = decoder.decode(good).pixel_values
    for kind, (data, _) in BAD.items():
        mixed = decoder.decode([good[0], data, good[1], good[2]])
        assert [reason is None for reason in mixed.reasons] == [True, False, True, True], kind
        assert torch.equal(mixed.pixel_values[[0, 2, 3]], alone), kind
    decoder.close()
