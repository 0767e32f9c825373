"""Images of any resolution: the views that a picture becomes, and the rows that their features take.

    picture ─best grid─→ base view, tile 0, tile 1, ... ─tower, connector─→ V features each
       rows: the base view's | the tiles' laid out as the picture, its padding cut away, a newline behind each line

as transformers' LlavaNextModel and LlavaOnevisionModel lay them out (`pack_image_features`) and their image processors
cut pictures (`select_best_resolution`, `get_patch_output_size`, `divide_to_patches`). Only sizes are at work here: the
packer knows from a file's header alone how many rows its image takes.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NEWLINE = -1
"""Among an image's `sources`: the learned newline row."""


@dataclass(frozen=True, kw_only=True)
class TilesConfig:
    """How a picture of any resolution is cut (`image_grid_pinpoints`)."""

    pinpoints: tuple[tuple[int, int], ...]
    """Sizes, (height, width) in pixels and multiples of the view's side, of which the best fitting one is taken."""
    max_tiles: int | None = None
    """LLaVA-OneVision's `anyres_max_9`: tiles' features are pooled, bilinearly, to about as many as this number of
    tiles has. None: never, as in LLaVA-NeXT."""
    only_alone: bool = False
    """Whether an image among several of a record is one view, padded to a square, as in LLaVA-OneVision."""

    def described(self, view_size: int) -> str:
        """In words: `tiles of 336 pixels, in 5 grids of up to 4`."""
        most = max(height * width for height, width in self.pinpoints) // view_size**2
        words = f"tiles of {view_size} pixels, in {len(self.pinpoints)} grids of up to {most}"
        if self.max_tiles is not None:
            words += f", pooled to as many features as {self.max_tiles} have"
        return words + (", one view of an image among several" if self.only_alone else "")


NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""(rows, columns) of LLaVA-NeXT's published grids, in views."""
ONEVISION_SIDE = 6
"""LLaVA-OneVision's are all of up to so many rows and columns."""
ONEVISION_MAX_TILES = 9


def tiles_of(text: str, view_size: int) -> TilesConfig:
    """What `--image-grid-pinpoints` says: `next`, `onevision`, or sizes such as `336x672,672x336`.

    Args:
        view_size: pixels a side of one view.

    Raises:
        ValueError: it is none of these.
    """
    if text == "next":
        return TilesConfig(pinpoints=tuple((rows * view_size, columns * view_size) for rows, columns in NEXT_GRIDS))
    if text == "onevision":
        edges = [number * view_size for number in range(1, ONEVISION_SIDE + 1)]
        pinpoints = tuple((height, width) for height in edges for width in edges)
        return TilesConfig(pinpoints=pinpoints, max_tiles=ONEVISION_MAX_TILES, only_alone=True)
    pinpoints = []
    for size in text.split(","):
        height, _, width = size.strip().partition("x")
        if not (height.isdecimal() and width.isdecimal() and len(size) < 20):
            raise ValueError(
                f"--image-grid-pinpoints holds {size.strip()[:40]!r}; expected next, onevision, or sizes, height x "
                "width in pixels, such as 336x672,672x336"
            )
        pinpoints.append((int(height), int(width)))
    return TilesConfig(pinpoints=tuple(pinpoints))


@dataclass(frozen=True)
class Cut:
    """How a picture becomes tiles."""

    grid: tuple[int, int]
    """Rows and columns of tiles."""
    resized: tuple[int, int]
    """(height, width) in pixels that the picture is resized to, within the grid's."""
    offset: tuple[int, int]
    """(top, left) of it in the grid, in pixels; the rest is black."""


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Which features the rows of one image take. Views count from the image's first; V features each."""

    num_views: int
    """Pictures that the tower sees of it."""
    sources: np.ndarray
    """int64 [rows]: a feature of its views laid end to end (below num_views * V), `NEWLINE`, or a pooled feature
    (num_views * V + its number)."""
    pooled: np.ndarray
    """int64 [pooled features, 4]: features of its views that each is a mean of."""
    weights: np.ndarray
    """float32 [pooled features, 4]: with these weights, which sum to 1."""

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """What decides the rows of images."""

    visual_tokens: int
    """V: features of one view."""
    view_size: int = 0
    """Pixels a side of one view; of no use without tiles."""
    tiles: TilesConfig | None = None
    """None: every image is one view, and takes V rows."""

    def has_tiles(self, *, alone: bool) -> bool:
        """Whether an image is cut, so that its rows follow from its size.

        Args:
            alone: whether it is the only image of its record.
        """
        return self.tiles is not None and (alone or not self.tiles.only_alone)

    @property
    def needs_sizes(self) -> bool:
        """Whether the rows of some image follow from its size."""
        return self.tiles is not None

    def cut(self, width: int, height: int) -> Cut:
        """How a picture of this size is cut, with tiles."""
        return _cut(width, height, self.tiles.pinpoints, self.view_size)

    def rows(self, size: tuple[int, int] | None, *, alone: bool) -> ImageRows:
        """The rows of one image.

        Args:
            size: (width, height) in pixels as the picture is shown; None where no image's rows follow from it.
            alone: whether it is the only image of its record.
        """
        if not self.has_tiles(alone=alone):
            return _rows_of_one_view(self.visual_tokens, self.tiles is not None)
        assert size is not None, "an image's size decides its rows"
        return _rows_of_tiles(*size, self)


def _cut(width: int, height: int, pinpoints: tuple[tuple[int, int], ...], view_size: int) -> Cut:
    best_height, best_width = _best_fit(width, height, pinpoints)
    by_width, by_height = best_width / width, best_height / height
    if by_width < by_height:
        resized = min(math.ceil(height * by_width), best_height), best_width
    else:
        resized = best_height, min(math.ceil(width * by_height), best_width)
    return Cut(
        grid=(best_height // view_size, best_width // view_size),
        resized=resized,
        offset=((best_height - resized[0]) // 2, (best_width - resized[1]) // 2),
    )


def _best_fit(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(height, width) that shows most of the picture's pixels; of those the one with the least padding, the first."""

    def quality(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=quality)  # the first of equals


@lru_cache(maxsize=8)
def _rows_of_one_view(visual_tokens: int, with_newline: bool) -> ImageRows:
    sources = np.arange(visual_tokens, dtype=np.int64)
    if with_newline:
        sources = np.append(sources, NEWLINE)
    return ImageRows(1, sources, *_NOTHING_POOLED)


@lru_cache(maxsize=256)  # of up to 0.4 MB each
def _rows_of_tiles(width: int, height: int, layout: ImageLayout) -> ImageRows:
    per_view, side = layout.visual_tokens, math.isqrt(layout.visual_tokens)
    tall, wide = layout.cut(width, height).grid
    # Features by their places in the picture: [tall * side, wide * side].
    tiles = np.arange(tall * wide * per_view, dtype=np.int64).reshape(tall, wide, side, side) + per_view
    plane = _without_padding(tiles.transpose(0, 2, 1, 3).reshape(tall * side, wide * side), width, height)
    num_views = 1 + tall * wide
    pooled, weights = _NOTHING_POOLED
    if layout.tiles.max_tiles is not None:
        ratio = math.sqrt(plane.size / (layout.tiles.max_tiles * side**2))
        if ratio > 1.1:
            shape = int(plane.shape[0] // ratio), int(plane.shape[1] // ratio)
            pooled, weights = _pooled(plane, *shape)
            plane = np.arange(len(pooled), dtype=np.int64).reshape(shape) + num_views * per_view
    lines = np.pad(plane, ((0, 0), (0, 1)), constant_values=NEWLINE)
    sources = np.concatenate([np.arange(per_view, dtype=np.int64), lines.ravel()])
    return ImageRows(num_views, sources, pooled, weights)


def _without_padding(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """`unpad_image`: the part of the features that shows the picture, cut alike on both sides."""
    tall, wide = plane.shape
    if width / height > wide / tall:
        cut = (tall - int(round(height * (wide / width), 7))) // 2
        return plane[cut : tall - cut]
    cut = (wide - int(round(width * (tall / height), 7))) // 2
    return plane[:, cut : wide - cut]


def _pooled(plane: np.ndarray, tall: int, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """torch's bilinear interpolation (`align_corners` off, no antialiasing) as means of four."""
    (top, bottom, below), (left, right, beside) = _taps(plane.shape[0], tall), _taps(plane.shape[1], wide)
    corners = [plane[np.ix_(rows, columns)] for rows in (top, bottom) for columns in (left, right)]
    weights = [np.outer(down, across) for down in (1 - below, below) for across in (1 - beside, beside)]
    return (
        np.stack(corners, axis=-1).reshape(-1, 4),
        np.stack(weights, axis=-1).reshape(-1, 4).astype(np.float32),
    )


def _taps(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `wanted` places along an edge of `size`: the two neighbours and the second one's weight, float64."""
    places = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    first = np.minimum(places.astype(np.int64), size - 1)
    return first, np.minimum(first + 1, size - 1), places - first


_NOTHING_POOLED = np.empty((0, 4), dtype=np.int64), np.empty((0, 4), dtype=np.float32)
