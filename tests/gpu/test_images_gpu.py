"""Images decoded, resized and normalised by DALI's `mixed` graph against those of the host."""

import operator

import numpy as np
import pytest
import torch

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.config.tiles import ImageLayout, TilesConfig
from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder
from tests.data.drawn_images import BAD, KINDS, SIZES, drawing, inner_levels, jpeg

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not images.dali_is_installed(), reason="DALI is not installed"),
]
CONFIG = ImageConfig(size=336)
LEVEL = (1 / 255 / np.array(CONFIG.std)).reshape(3, 1, 1)


def bounds(name: str) -> tuple[float, float]:
    """Levels of difference inside and at the borders, as `tests/data/test_mixed_graph.py` holds them for the graph
    itself; for a JPEG there is another decoder before it."""
    inside = 10 if "jpeg" in name else 3
    return inside, 17 if name == "black and white png" else max(inside, 6)


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
    difference = (decoded["mixed"].pixel_values - decoded["cpu"].pixel_values).abs().numpy() / LEVEL
    names = [f"jpeg {size}" for size in SIZES] + list(KINDS)
    found = {
        name: (float(inner_levels(here, file).max()), float(here.max()))
        for name, file, here in zip(names, files, difference, strict=True)
    }
    too_far = {name: worst for name, worst in found.items() if any(map(operator.gt, worst, bounds(name)))}
    assert too_far == {}


@pytest.mark.parametrize("only_alone", [False, True])
def test_mixed_tiles_are_those_of_the_cpu(only_alone):
    """LLaVA-NeXT's five grids; with `only_alone`, as in LLaVA-OneVision, every fourth image is one padded view."""
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    layout = ImageLayout(
        visual_tokens=576, view_size=336, tiles=TilesConfig(pinpoints=pinpoints, only_alone=only_alone)
    )
    names = [f"jpeg {size}" for size in (*SIZES, (3000, 40))] + list(KINDS)
    files = [jpeg(*size) for size in (*SIZES, (3000, 40))] + [make(drawing(200, 150)) for make in KINDS.values()]
    alone = [index % 4 != 1 for index in range(len(files))]
    decoded = {}
    for device in ("cpu", "mixed"):
        decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend="dali", device=device, device_id=0, layout=layout)
        decoded[device] = decoder.decode(files, alone)
        assert decoded[device].reasons == [None] * len(files)
        decoder.close()
    places = decoded["mixed"].first_views
    assert places == decoded["cpu"].first_views and places[-1] == len(decoded["mixed"].pixel_values)
    difference = (decoded["mixed"].pixel_values - decoded["cpu"].pixel_values).abs().numpy() / LEVEL
    found = {
        name: (float(inner_levels(difference[start], file).max(initial=0)), float(difference[start:end].max()))
        for name, file, start, end in zip(names, files, places, places[1:], strict=False)
    }
    too_far = {name: worst for name, worst in found.items() if any(map(operator.gt, worst, bounds(name)))}
    assert too_far == {}


def test_mixed_refuses_broken_files_and_moves_nothing_else():
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend="dali", device="mixed", device_id=0)
    good = [jpeg(60, 40, seed) for seed in range(3)]
    alone = decoder.decode(good).pixel_values
    for kind, (data, _) in BAD.items():
        mixed = decoder.decode([good[0], data, good[1], good[2]])
        assert [reason is None for reason in mixed.reasons] == [True, False, True, True], kind
        assert torch.equal(mixed.pixel_values[[0, 2, 3]], alone), kind
    decoder.close()
