"""From an image file to RGB levels by Pillow: what its header tells, what is refused undecoded, how levels come about.

    bytes ─inspect─→ size, format, a decoder that will do ─levels─→ uint8 [H, W, 3]

Levels deeper than 8 bits are shortened to them, where Pillow's own conversion cuts them off at 255 and makes white
pictures (16 and 32 bits) or black ones (floats of 0 to 1). 16 bits lose their lower 8, in grey as in colour. Integers
of 32 bits and floats are taken to fill the smallest of these ranges that holds all levels of the picture: 0 to 1
(floats), 0 to 255, 0 to 65535; else the one from its least level to its greatest.
"""

import contextlib
import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from hacl_megatron.data.store import UnusableImage

DALI_MODES = {
    "JPEG": ("RGB", "L"),
    "MPO": ("RGB", "L"),  # JPEGs with a second picture behind them
    "PNG": ("RGB", "RGBA", "P", "L", "LA", "1"),
}
"""Formats and Pillow modes that DALI decodes to Pillow's very levels, and refuses where Pillow does."""

_OTHER_FORMATS = ("WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats left to Pillow. A list, since some that Pillow knows start other programs (EPS) or make no sense here."""

MAX_DALI_PIXELS = 4096 * 4096
"""Larger images are left to Pillow: DALI decodes several at once, and keeps the memory that the largest took."""

_PILLOW_BLOCK = 64 << 20
"""Bytes that Pillow asks for at once. Its usual 16 MiB are few enough for glibc to keep them, a large picture's worth
for each thread; what is above 32 goes back to the system. Smaller pictures ask for what they need."""

MAX_JPEG_SCANS = 100
"""Progressive JPEGs have about ten. Each costs a pass over all pixels, so that a small file could take hours."""

MAX_JPEG2000_TILES = 4096
"""Each costs OpenJPEG 37 kB before a pixel is there: a picture of 250 x 250 one-pixel tiles took 2.3 GB."""

Transparency = Literal["drop", "fill"]
Orientation = Literal["ignore", "exif"]

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: lambda levels: levels[:, ::-1],
    3: lambda levels: levels[::-1, ::-1],
    4: lambda levels: levels[::-1],
    5: lambda levels: levels.swapaxes(0, 1),
    6: lambda levels: levels.swapaxes(0, 1)[:, ::-1],
    7: lambda levels: levels[::-1, ::-1].swapaxes(0, 1),
    8: lambda levels: levels.swapaxes(0, 1)[::-1],
}
"""What shows a picture [H, W, 3] upright, by its EXIF orientation; 1 and unknown ones are left alone."""

_TIFF_BITS, _TIFF_SAMPLE_FORMAT = 258, 339

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""A marker in entropy-coded data, where 0xff is followed by 0 (stuffing) or D0-D7 (restart) otherwise."""


@dataclass(frozen=True)
class ImageFile:
    """An image file whose header is in order."""

    data: bytes
    width: int
    """Of the picture as it will be shown, so turned where orientation counts; `height` likewise."""
    height: int
    format: str
    ends: bool
    """Whether it reaches its format's end marker; True for formats that have none we look for."""
    for_dali: bool
    """Whether DALI may decode it."""
    for_gpu: bool
    """Whether its decoder on the GPU may."""
    orientation: int
    """EXIF's; 1 where it is to be ignored."""

    @property
    def is_large(self) -> bool:
        """Whether it takes so much memory to decode that no other such image should be decoded beside it."""
        return self.width * self.height > MAX_DALI_PIXELS


class ImageReader:
    """Reads headers and levels of image files. Threads may share it.

    Args:
        max_image_pixels: images with more pixels are refused undecoded.
        padded: whether images will be padded to squares, which then have to keep to that number too; those in tiles
            never are.
        transparency: `drop` shows the colours that a file has below its transparency, `fill` lays it on `fill`.
        orientation: `exif` turns pictures as their EXIF says, or XMP in its place.
        fill: levels of red, green and blue.
    """

    def __init__(
        self,
        *,
        max_image_pixels: int,
        padded: bool,
        transparency: Transparency = "drop",
        orientation: Orientation = "ignore",
        fill: tuple[int, ...] = (0, 0, 0),
    ) -> None:
        if transparency not in ("drop", "fill"):
            raise ValueError(f"--image-transparency {transparency!r} is unknown; it is drop or fill")
        if orientation not in ("ignore", "exif"):
            raise ValueError(f"--image-orientation {orientation!r} is unknown; it is ignore or exif")
        self.max_image_pixels, self.padded, self.fill = max_image_pixels, padded, fill
        self.transparency, self.orientation = transparency, orientation
        # Pillow's own limit is per process; ours, checked below, is the one that counts.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_image_pixels)
        Image.core.set_block_size(_PILLOW_BLOCK)
        Image.init()
        self._formats = [name for name in (*DALI_MODES, *_OTHER_FORMATS) if name in Image.OPEN and name != "MPO"]

    def size_of(self, file: BinaryIO, *, in_tiles: bool = True) -> tuple[int, int]:
        """(width, height) as the picture will be shown, by the header alone, of an open file at its start.

        Args:
            in_tiles: see `inspect`.

        Raises:
            UnusableImage: see `inspect`, which looks at more of the file.
        """
        with self._header(file, in_tiles) as (_, size, _):
            return size

    def inspect(self, data: bytes, *, in_tiles: bool = False) -> ImageFile:
        """Format and size from the header. Raises UnusableImage for what is no image, or too large a one.

        Args:
            in_tiles: whether the picture will be cut into tiles.
        """
        with self._header(io.BytesIO(data), in_tiles) as (image, (width, height), orientation):
            format, mode = image.format, image.mode
            for_gpu = gpu_decoder_is_right(image, data)
            see_through = self.transparency == "fill" and image.has_transparency_data
        for_dali = mode in DALI_MODES.get(format, ()) and not see_through and orientation == 1
        for_dali = for_dali and width * height <= MAX_DALI_PIXELS
        if format in ("JPEG", "MPO"):
            scans, ends = jpeg_scans(data)
            if scans > MAX_JPEG_SCANS:
                raise UnusableImage(f"a JPEG of {scans} scans; expected at most {MAX_JPEG_SCANS}")
            # Pillow refuses a progressive file that calls itself sequential, DALI does not. It also decides about files
            # without an end marker, since some are whole but for it.
            for_dali = for_dali and scans == 1 and ends
        elif format == "PNG":
            ends = b"IEND\xaeB`\x82" in data[-4096:]  # some programs write a little behind it
            if ends:
                self._verify_png(data)
            deep = data[24] == 16  # bits a sample; Pillow and DALI shorten them differently
            for_dali = for_dali and ends and not deep
        else:
            if format == "JPEG2000" and (tiles := jpeg2000_tiles(data)) > MAX_JPEG2000_TILES:
                raise UnusableImage(f"a JPEG 2000 of {tiles} tiles; expected at most {MAX_JPEG2000_TILES}")
            ends = format != "WEBP" or len(data) >= 8 + int.from_bytes(data[4:8], "little")
        return ImageFile(data, width, height, format, ends, for_dali, for_gpu, orientation)

    def levels(self, file: ImageFile) -> np.ndarray:
        """uint8 [H, W, 3]: the image's RGB levels. Raises UnusableImage when it does not decode."""
        try:
            with self._open(file.data) as image:
                image.load()
                levels = self._rgb(image, file.data)
        except Exception as error:  # as in _header
            what = "does not decode" if file.ends else "is cut off, its end marker is missing"
            raise UnusableImage(one_line(f"the {file.format} file {what}: {error}")) from None
        turn = _TURNS.get(file.orientation)
        return levels if turn is None else np.ascontiguousarray(turn(levels))

    def _rgb(self, image: Image.Image, data: bytes) -> np.ndarray:
        """uint8 [H, W, 3] of a decoded image; writable, since torch's kernels take no other without a warning."""
        filled = self.transparency == "fill" and image.has_transparency_data
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            levels = np.repeat(shortened(image)[..., None], 3, axis=2)
            if filled:  # one level of a PNG's is transparent
                levels[np.asarray(image) == image.info["transparency"]] = self.fill
            return levels
        if filled:
            if image.format == "PNG" and "transparency" in image.info:
                image.info["transparency"] = _as_decoded(image.info["transparency"], bits=data[24])
            picture, image = image.convert("RGBA"), Image.new("RGB", image.size, self.fill)
            image.paste(picture, mask=picture)
        # A picture of RGB would be copied once more.
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))

    @contextlib.contextmanager
    def _header(self, file: BinaryIO, in_tiles: bool) -> Iterator[tuple[Image.Image, tuple[int, int], int]]:
        """Pillow's image, of which only the header has been read, (width, height) as shown, and EXIF's orientation.

        What goes wrong while it is looked at is an UnusableImage.
        """
        try:
            start = file.read(12)
            if not start:
                raise UnusableImage("the file is empty")
            file.seek(0)
            with Image.open(file, formats=self._formats) as image:
                is_small = image.width * image.height <= self.max_image_pixels  # else refused below, still undecoded
                orientation = self._orientation(image, file) if is_small else 1
                size = image.size if orientation < 5 else image.size[::-1]
                self._check_size(*size, in_tiles)
                yield image, size, orientation
        except UnusableImage:
            raise
        except Image.DecompressionBombError:
            raise UnusableImage(
                f"its declared pixels are more than twice Pillow's limit and --max-image-pixels {self.max_image_pixels}"
            ) from None
        except Image.UnidentifiedImageError:
            raise UnusableImage(f"not an image in a known format: it starts with {start!r}") from None
        except Exception as error:  # Pillow's readers raise many kinds on broken headers
            raise UnusableImage(one_line(f"not a readable image: {error}")) from None

    def _check_size(self, width: int, height: int, in_tiles: bool) -> None:
        if width < 1 or height < 1:
            raise UnusableImage(f"an image of {width} x {height} pixels")
        if width * height > self.max_image_pixels:
            raise UnusableImage(f"{width} x {height} pixels are more than --max-image-pixels {self.max_image_pixels}")
        side = max(width, height)
        if self.padded and not in_tiles and side * side > self.max_image_pixels:
            raise UnusableImage(
                f"{width} x {height} pixels, padded to a square, are more than --max-image-pixels "
                f"{self.max_image_pixels}"
            )

    def _orientation(self, image: Image.Image, file: BinaryIO) -> int:
        """1 to 8. A picture whose EXIF cannot be read is left as it is, as one without EXIF.

        Pillow turns TIFFs by itself, whatever is asked for.
        """
        if self.orientation == "ignore" or image.format == "TIFF":
            return 1
        try:
            # PNG's own `getexif` decodes the picture, since facts may stand behind it.
            early = image.format == "PNG" and not png_has_late_facts(file)
            exif = Image.Image.getexif(image) if early else image.getexif()
            orientation = exif.get(_ORIENTATION_TAG, 1)
        except Exception:  # as in _header
            return 1
        return orientation if orientation in _TURNS else 1

    def _verify_png(self, data: bytes) -> None:
        """Raises UnusableImage when a chunk's checksum is wrong: decoding, Pillow does not look at those of pixels."""
        try:
            self._open(data).verify()
        except Exception as error:  # as in _header
            raise UnusableImage(one_line(f"the PNG file is damaged: {error}")) from None

    def _open(self, data: bytes) -> Image.Image:
        """Pillow's image, of which only the header has been read."""
        return Image.open(io.BytesIO(data), formats=self._formats)


def shortened(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of a grey image of more than 8 bits, by the ranges that this file's head names.

    Args:
        image: decoded, of Pillow's modes I;16, I or F.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode.startswith("I;"):
        bits = tags.get(_TIFF_BITS, (16,))[0]  # a TIFF's may be 12
        return (values >> (bits - 8)).astype(np.uint8)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow gives these 16 bits in 32
        return (values >> 8).clip(0, 255).astype(np.uint8)
    if image.mode == "I" and image.format == "TIFF" and tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)
    seen = values
    if image.mode == "F" and not (finite := np.isfinite(values)).all():
        seen = values[finite]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    base, top = next(((0.0, top) for top in tops if low >= 0 and high <= top), (low, high))
    levels = np.empty(values.shape, dtype=np.uint8)
    half = 0.5 * (top != 255)  # levels that need no scaling are cut off, as Pillow does it
    for row, out in zip(values, levels, strict=True):  # double precision of one row at a time
        scaled = (row.astype(np.float64) - base) * (255 / max(top - base, np.finfo(np.float64).tiny))
        out[:] = np.nan_to_num(scaled, nan=0.0).clip(0, 255) + half
    return levels


def _as_decoded(level: object, *, bits: int) -> object:
    """A PNG's transparent level or colour, of the file's bits, in the 8 that Pillow decodes to; a palette's stays."""
    if isinstance(level, tuple):
        return tuple(_as_decoded(one, bits=bits) for one in level)
    if isinstance(level, bytes) or bits == 8:
        return level
    return level >> 8 if bits == 16 else level * 255 // (2**bits - 1)


def gpu_decoder_is_right(image: Image.Image, data: bytes) -> bool:
    """Whether DALI's decoders for the GPU get this file's colours right (seen on an H200, DALI 2.4.0, 2026-11-26).

    They take a JPEG of red, green and blue for one of luminance and two colours, and palettes of fewer than 8 bits for
    something else: other pictures, by 200 levels, without an error. What was not seen to be right is left to Pillow.
    """
    if image.format == "PNG":
        return data[24] == 8
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return True
    # As libjpeg decides: by the markers of JFIF and Adobe, else by the components' names.
    transform = image.info.get("adobe_transform")
    names = [component[0] for component in image.layer]
    return "jfif" in image.info or transform == 1 or (transform is None and names == [1, 2, 3])


def png_has_late_facts(file: BinaryIO) -> bool:
    """Whether chunks that may tell a PNG's orientation stand behind its pixels. Leaves the file where it is."""
    place, chunk, seen = file.tell(), 8, False  # behind the signature
    try:
        while len(head := _bytes_at(file, chunk, 8)) == 8:
            if seen and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            seen = seen or head[4:] == b"IDAT"
            chunk += 12 + int.from_bytes(head[:4], "big")
        return False
    finally:
        file.seek(place)


def _bytes_at(file: BinaryIO, place: int, number: int) -> bytes:
    file.seek(place)
    return file.read(number)


def jpeg_scans(data: bytes) -> tuple[int, bool]:
    """How many scans a JPEG has, and whether its end-of-image marker is there.

    Walks the segments, because an EXIF thumbnail carries an end-of-image marker of its own, and looks no further than
    the first one at this level, because some cameras write on behind it.
    """
    position, scans = 2, 0  # behind the start-of-image marker
    while match := _JPEG_MARKER.search(data, position):
        marker = data[match.end() - 1]
        if marker == 0xD9:
            return scans, True
        scans += marker == 0xDA
        length = 0 if marker == 0x01 else int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + length
    return scans, False


def jpeg2000_tiles(data: bytes) -> int:
    """How many tiles the code stream of a JPEG 2000 is cut into, by its SIZ segment; 0 where it has none."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) < at + 40:
        return 0
    right, bottom, _, _, width, height, left, top = struct.unpack(">8I", data[at + 8 : at + 40])
    return -(-max(0, right - left) // max(1, width)) * -(-max(0, bottom - top) // max(1, height))


def is_nearly_constant(levels: np.ndarray) -> bool:
    """Whether 99.9 % of the pixels lie within 9 neighbouring levels, in each colour: nothing that could be learned.

    Args:
        levels: uint8 [H, W, 3].
    """
    for channel in range(3):
        counts = np.zeros(256, dtype=np.int64)
        for rows in np.array_split(levels[..., channel], -(-levels.shape[0] * levels.shape[1] // (1 << 20)) or 1):
            counts += np.bincount(rows.ravel(), minlength=256)
        if np.convolve(counts, np.ones(9, dtype=np.int64)).max() < 0.999 * counts.sum():
            return False
    return True


def one_line(text: str) -> str:
    """`text` without line breaks, at most 200 characters."""
    return " ".join(text.split())[:200]
