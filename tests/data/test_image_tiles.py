"""Pixels of pictures cut into tiles, against transformers' own processors; and how the views of images are counted."""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.config.tiles import ImageLayout, TilesConfig
from hacl_megatron.data import dali, images
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.store import UnusableImage
from tests.data.drawn_images import (
    BACKENDS,
    BAD,
    KINDS,
    PHOTO,
    drawing,
    encode,
    exif_rotated,
    inner_levels,
    jpeg,
    needs_dali,
)

try:  # transformers 5 keeps a processor without torchvision under its own name
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as NextPixels
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil as OnevisionPixels,
    )
except ImportError:
    from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor as NextPixels
    from transformers.models.llava_onevision.image_processing_llava_onevision import (
        LlavaOnevisionImageProcessor as OnevisionPixels,
    )

S = 56
CONFIG = ImageConfig(size=S, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
FILL = (127, 102, 76)
NEXT = TilesConfig(pinpoints=((S, 2 * S), (2 * S, S), (2 * S, 2 * S), (3 * S, S), (S, 3 * S)))
ONEVISION = TilesConfig(
    pinpoints=tuple((S * i, S * j) for i in range(1, 5) for j in range(1, 5)), max_tiles=9, only_alone=True
)
FAMILIES = {"llava_next": NEXT, "llava_onevision": ONEVISION}
SIZES = [
    (1, 1), (2, 1), (3, 2), (1, 500), (500, 1), (3000, 40), (40, 3000), (56, 56), (57, 56), (111, 113), (112, 56),
    (333, 71), (71, 333), (640, 480), (480, 640), (224, 224), (97, 61),
]  # fmt: skip
FILES = [jpeg(*size) for size in SIZES] + [make(drawing(150, 83)) for make in KINDS.values()]
BOUNDS = {"pillow": (1e-3, 1e-4), "dali": (5.001, 0.15)}
"""Levels of 255, at most and on average. Behind DALI torch resizes, which rounds elsewhere: 5 where noise is enlarged,
2 where it is not."""


def layout(tiles: TilesConfig) -> ImageLayout:
    return ImageLayout(visual_tokens=16, view_size=S, tiles=tiles)


def decoder(backend: str, tiles: TilesConfig = NEXT, **options) -> ImageDecoder:
    return ImageDecoder(CONFIG, aspect_ratio="square", backend=backend, layout=layout(tiles), **options)


@pytest.fixture
def make() -> Iterator[Callable[..., ImageDecoder]]:
    """`decoder`, whose products are closed."""
    made = []

    def get(*arguments, **options) -> ImageDecoder:
        made.append(decoder(*arguments, **options))
        return made[-1]

    yield get
    for item in made:
        item.close()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def theirs(family: str, pictures: list[Image.Image], *, alone: bool = True) -> list[np.ndarray]:
    """float64 [views, 3, S, S] of each picture by transformers' processor, in levels of 255."""
    options = dict(
        image_grid_pinpoints=[list(pinpoint) for pinpoint in FAMILIES[family].pinpoints],
        image_mean=list(CONFIG.mean), image_std=list(CONFIG.std), do_pad=False,
    )  # fmt: skip
    square = {"height": S, "width": S}
    if family == "llava_next":
        processor = NextPixels(size={"shortest_edge": S}, crop_size=square, **options)
    else:
        processor = OnevisionPixels(size=square, **options)
    pictures = [Image.fromarray(np.asarray(picture)) for picture in pictures]  # it would lay a transparent one on white
    several = pictures if alone else [pictures]
    return [in_levels(torch.as_tensor(np.array(views))) for views in processor(several)["pixel_values"]]


def in_levels(pixel_values: torch.Tensor) -> np.ndarray:
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (CONFIG.mean, CONFIG.std))
    return (pixel_values.double().numpy() * std + mean) * 255


def views_of(item: ImageDecoder, files: list[bytes], alone: list[bool] | None = None) -> list[np.ndarray]:
    decoded = item.decode(files, alone)
    assert decoded.reasons == [None] * len(files)
    assert decoded.pixel_values.dtype == torch.float32 and len(decoded.pixel_values) == decoded.first_views[-1]
    places = zip(decoded.first_views, decoded.first_views[1:], strict=False)
    return [in_levels(decoded.pixel_values[start:end]) for start, end in places]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], backend: str) -> None:
    largest, mean = BOUNDS[backend]
    for index, (ours, other) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == other.shape, index
        assert np.abs(ours - other).max() <= largest and np.abs(ours - other).mean() <= mean, index


# ---- pixels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_those_of_transformers(make, backend, family):
    """Sizes tiny, odd and extreme, every kind of file. Catches tiles in another order, another grid, a picture off its
    place by a pixel, padding of another colour, a base view that is not stretched or not the first."""
    expected = theirs(family, [opened(file).convert("RGB") for file in FILES])
    assert_close(views_of(make(backend, FAMILIES[family]), FILES), expected, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_among_several_is_padded_as_onevision_does_it(make, backend):
    """Among images that are alone, and more than are decoded at once: catches tiles of one that is not alone, another
    padding, and views that land at another image's place."""
    files = [jpeg(*size, seed) for seed, size in enumerate(SIZES)]
    pictures = [opened(file).convert("RGB") for file in files]
    alone = [index % 3 == 0 for index in range(len(files))]
    expected = [theirs("llava_onevision", [picture], alone=True)[0] for picture in pictures]
    together = theirs("llava_onevision", pictures, alone=False)
    expected = [one if only else other for one, other, only in zip(expected, together, alone, strict=True)]
    item = make(backend, ONEVISION)
    found = views_of(item, files, alone)
    assert [len(views) == 1 for views in found] == [not only for only in alone]
    assert_close(found, expected, backend)
    assert all(len(views) > 1 for views in views_of(make(backend, NEXT), files[:3], [False] * 3)), "NeXT cuts them all"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transparency", ["drop", "fill"])
def test_transparency_and_orientation_come_before_tiles(make, backend, transparency):
    """What is seen through shows the mean colour, while the rest of a grid is black; a turned picture has the grid of
    how it is shown. Oracle: Pillow's own turning and pasting, then transformers."""
    item = make(backend, NEXT, transparency=transparency, orientation="exif")
    turned = exif_rotated(drawing(150, 40))
    files, pictures = [turned], [ImageOps.exif_transpose(opened(turned))]
    seen_through = drawing(60, 150)
    seen_through.putalpha(Image.linear_gradient("L").resize((60, 150)))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        files.append(encode(seen_through, format, **options))
        picture = opened(files[-1]).convert("RGBA")
        laid = Image.new("RGB", picture.size, FILL)
        laid.paste(picture, mask=picture)
        pictures.append(laid if transparency == "fill" else picture.convert("RGB"))
    found = views_of(item, files)
    assert_close(found, theirs("llava_next", pictures), backend)
    assert found[0].shape[0] == 4, "40 x 150 as it is shown"


def graph_on_the_host(config: ImageConfig, **options) -> dali.Graph:
    return MIXED_GRAPH(config, **{**options, "device_id": None, "decoder": "cpu"})


MIXED_GRAPH = dali.mixed_graph


@needs_dali
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_for_the_gpu_gives_the_same_views(monkeypatch, make, family):
    """The bounds of `test_mixed_graph.py`: within 2 levels, but for the borders of an enlarged picture. Catches a plane
    cut in another order or filled with another colour, and a picture among several whose frame is another's."""
    monkeypatch.setattr(images, "mixed_graph", graph_on_the_host)
    alone = [index % 4 != 1 for index in range(len(FILES))]
    mixed = make("dali", FAMILIES[family], device="mixed", device_id=0)
    found = views_of(mixed, FILES, alone)
    assert mixed.device == "mixed" and sum(graph.num_failures for graph in mixed._graphs) == 0
    host = views_of(make("dali", FAMILIES[family]), FILES, alone)
    for index, (ours, other) in enumerate(zip(found, host, strict=True)):
        assert ours.shape == other.shape, index
        difference = np.abs(ours - other)
        assert inner_levels(difference[0], FILES[index]).max(initial=0) <= 2.001, index
        assert difference.max() <= 16.001 and difference.mean() <= (1 if index < 3 else 0.15), index


@needs_dali
def test_a_picture_too_tall_for_its_grids_width_goes_the_hosts_way(monkeypatch, make):
    """Its graph would make all rows as wide as the grid: 2 x S here."""
    monkeypatch.setattr(images, "mixed_graph", graph_on_the_host)
    files, tiles = [encode(drawing(110, 220), "PNG")], TilesConfig(pinpoints=((4 * S, 2 * S),))
    sizes = {}
    for limit in (111 * 220, 112 * 220):
        item = make("dali", tiles, device="mixed", device_id=0, max_image_pixels=limit)
        host = make("dali", tiles, max_image_pixels=limit)
        sizes[limit] = np.abs(views_of(item, files)[0] - views_of(host, files)[0]).max()
    assert sizes[111 * 220] == 0 < sizes[112 * 220], "the graph's levels are told apart"


# ---- sizes


def with_late_exif(file: bytes, orientation: int) -> bytes:
    """The PNG with an eXIf chunk behind its pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    return file[:-12] + chunk + file[-12:]


def with_long_segments(file: bytes) -> bytes:
    """The JPEG behind 300 kB of application data."""
    return file[:2] + (b"\xff\xe5" + struct.pack(">H", 60_002) + bytes(60_000)) * 5 + file[2:]


class Counted(io.BytesIO):
    """A file that knows how much of it was read."""

    taken = 0

    def read(self, *arguments) -> bytes:
        data = super().read(*arguments)
        self.taken += len(data)
        return data


def turned_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {format: encode(drawing(150, 60), format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF")}
    return {
        **files,
        "behind long segments": with_long_segments(files["JPEG"]),
        "late EXIF": with_late_exif(encode(drawing(150, 60), "PNG"), 6),
        "GIF": encode(drawing(150, 60), "GIF"),
    }


@pytest.mark.parametrize("orientation", ["ignore", "exif"])
def test_sizes_are_those_that_are_decoded(make, orientation):
    """Of bytes and of open files. Catches a size as it is stored where the picture is turned, and the other way round,
    and what stands behind a PNG's pixels or 300 kB of a JPEG's segments."""
    item = make("pillow", orientation=orientation)
    for name, file in turned_files().items():
        size = item.size_of(file)
        turned = name != "GIF" and (orientation == "exif" or name == "TIFF")  # which Pillow always turns
        assert size == ((60, 150) if turned else (150, 60)), name
        assert item.size_of(io.BytesIO(file)) == size, name
        height, width = item.reader.levels(item.reader.inspect(file)).shape[:2]
        assert (width, height) == size, name
        assert item.decode([file]).first_views == [0, 1 + np.prod(layout(NEXT).cut(*size).grid)], name


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_size_costs_no_decoding(make, format):
    """Catches Pillow's `getexif`, which decodes a whole PNG, and a file that is read to its end."""
    file = encode(drawing(900, 700), format, **({"quality": 98} if format == "JPEG" else {}))
    counted = Counted(file)
    assert make("pillow", orientation="exif").size_of(counted) == (900, 700)
    assert counted.taken < 20_000 < len(file) / 4
    broken = file[: len(file) // 2]
    assert make("pillow", orientation="exif").size_of(broken) == (900, 700)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unusable_image_has_the_views_of_its_size(make, backend):
    """Zeros, with neighbours where they belong: as many as the packer counts, one where no header is to be read."""
    item = make(backend)
    expected = views_of(item, [PHOTO])[0]
    for kind, (bad, _) in BAD.items():
        try:
            wanted = 1 + np.prod(layout(NEXT).cut(*item.size_of(bad)).grid)
        except UnusableImage as error:
            wanted = 1
            assert item.decode([bad]).reasons == [str(error)], kind
        decoded = item.decode([PHOTO, bad, PHOTO])
        assert [reason is None for reason in decoded.reasons] == [True, False, True], kind
        first, end = decoded.first_views[1:3]
        assert end - first == wanted, kind
        assert (wanted > 1) == bool(re.match("(jpeg|png|gif|progressive jpeg|cut jpeg) (?!header)", kind)), kind
        assert not decoded.pixel_values[first:end].any(), kind
        assert np.array_equal(in_levels(decoded.pixel_values[:first]), expected), kind
        assert np.array_equal(in_levels(decoded.pixel_values[end:]), expected), kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_padded_is_counted_as_a_square(make, backend):
    """Catches pictures in tiles refused for a square that nobody makes, and OneVision's several that make one."""
    item = make(backend, ONEVISION, max_image_pixels=1000)
    files = [jpeg(40, 25), jpeg(40, 25), jpeg(41, 25)]
    reasons = item.decode(files, [True, False, True]).reasons
    assert reasons == [
        None,
        "40 x 25 pixels, padded to a square, are more than --max-image-pixels 1000",
        "41 x 25 pixels are more than --max-image-pixels 1000",
    ]
    assert item.size_of(files[0]) == (40, 25)
    for file, only, reason in zip(files[1:], (False, True), reasons[1:], strict=True):
        with pytest.raises(UnusableImage) as error:
            item.size_of(file, alone=only)
        assert str(error.value) == reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 10_000)])
def test_a_line_of_pixels_is_never_resized_whole(make, monkeypatch, backend, size):
    """Resizing makes all rows as wide as the view, and eight bytes of weights for each pixel of an edge, four times:
    of a column of 80 million pixels, a small PNG, 18 GB, of such a row 3 GB."""
    for name in ("_resize_by_pillow", "_resize_by_torch"):
        monkeypatch.setattr(images, name, lambda *_, **__: pytest.fail("resized whole"))
    line = drawing(*size)
    found = views_of(make(backend, max_image_pixels=30_000), [encode(line, "PNG")])[0]
    monkeypatch.undo()
    whole = views_of(make("pillow"), [encode(line, "PNG")])[0]
    assert found.shape == whole.shape
    assert np.abs(found - whole).max() <= 8 and np.abs(found - whole).mean() <= 1


def test_without_tiles_every_image_is_one_view():
    item = ImageDecoder(CONFIG, aspect_ratio="pad", backend="pillow", layout=ImageLayout(visual_tokens=16))
    decoded = item.decode([PHOTO, BAD["text"][0], PHOTO], [True, False, True])
    assert decoded.first_views == [0, 1, 2, 3] and decoded.pixel_values.shape == (3, 3, S, S)
    assert item.decode([]).first_views == [0]
    item.close()
