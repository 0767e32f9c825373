"""Rows of images of any resolution, against transformers' own layout of features."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import image_processing_utils
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from hacl_megatron.config.tiles import NEWLINE, ImageLayout, ImageRows, TilesConfig

VIEW, SIDE, WIDTH = 28, 4, 6
NEXT = TilesConfig(pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)))
ONEVISION = TilesConfig(
    pinpoints=tuple((VIEW * i, VIEW * j) for i in range(1, 7) for j in range(1, 7)), max_tiles=9, only_alone=True
)
SIZES = [(28, 28), (1, 1), (1, 500), (500, 1), (56, 28), (57, 28), (640, 480), (480, 640), (333, 71), (1000, 999)]


def sizes() -> list[tuple[int, int]]:
    draw = random.Random(3)
    return SIZES + [(draw.randrange(1, 900), draw.randrange(1, 900)) for _ in range(150)]


def gathered(rows: ImageRows, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """The rows' features, from [views, V, width]."""
    flat = features.flatten(0, 1)
    pooled = (flat[torch.from_numpy(rows.pooled)] * torch.from_numpy(rows.weights)[..., None]).sum(1)
    sources = torch.from_numpy(rows.sources)
    table = torch.cat([flat, pooled, newline[None]])
    return table[sources.where(sources != NEWLINE, torch.tensor(len(table) - 1))]


@pytest.mark.parametrize("tiles", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_rows_are_those_of_transformers(tiles: TilesConfig) -> None:
    """Of 160 sizes: grids, lines, cut padding, pooling; a wrong rounding or a swapped axis shows."""
    layout = ImageLayout(visual_tokens=SIDE**2, view_size=VIEW, tiles=tiles)
    vision = SimpleNamespace(image_size=VIEW, patch_size=VIEW // SIDE)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(p) for p in tiles.pinpoints])
    )
    newline, generator, num_pooled = torch.randn(WIDTH), torch.Generator().manual_seed(0), 0
    for width, height in sizes():
        rows = layout.rows((width, height), alone=True)
        features = torch.randn(rows.num_views, SIDE**2, WIDTH, generator=generator)
        size = torch.tensor([[height, width]])
        if tiles is NEXT:
            (expected,), _ = LlavaNextModel.pack_image_features(model, [features], size, "default", newline)
        else:
            (expected,), _ = LlavaOnevisionModel.pack_image_features(model, [features], size, newline)
        assert torch.allclose(gathered(rows, features, newline), expected, atol=1e-5), (width, height)
        assert len(rows) == len(expected)
        num_pooled += len(rows.pooled) > 0
    assert (num_pooled > 10) == (tiles is ONEVISION)


def test_an_image_among_several_is_one_view_and_a_newline_in_onevision_alone() -> None:
    layout = ImageLayout(visual_tokens=SIDE**2, view_size=VIEW, tiles=ONEVISION)
    assert layout.rows(None, alone=False).sources.tolist() == [*range(SIDE**2), NEWLINE]
    layout = ImageLayout(visual_tokens=SIDE**2, view_size=VIEW, tiles=NEXT)
    assert layout.rows((80, 20), alone=False).num_views == layout.rows((80, 20), alone=True).num_views == 4


def test_without_tiles_an_image_is_one_view_of_any_number_of_rows() -> None:
    rows = ImageLayout(visual_tokens=7).rows(None, alone=True)
    assert rows.num_views == 1 and rows.sources.tolist() == [*range(7)] and not len(rows.pooled)


@pytest.mark.parametrize("tiles", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_pictures_are_cut_as_transformers_cuts_them(tiles: TilesConfig) -> None:
    layout, pinpoints = ImageLayout(visual_tokens=16, view_size=VIEW, tiles=tiles), [list(p) for p in tiles.pinpoints]
    for width, height in sizes():
        cut = layout.cut(width, height)
        best = image_processing_utils.select_best_resolution((height, width), pinpoints)
        resized = image_processing_utils.get_patch_output_size(torch.empty(3, height, width), best, "channels_first")
        assert (cut.grid[0] * VIEW, cut.grid[1] * VIEW) == tuple(best)
        assert cut.resized == tuple(resized)
        assert cut.offset == ((best[0] - resized[0]) // 2, (best[1] - resized[1]) // 2)
