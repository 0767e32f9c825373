"""Damaged images and records by the thousand: nothing crashes or hangs, and whatever is refused has a reason.

Everything derives from seeds, so that a failure's number names its file again.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.data.test_images import drawing, encode, jpeg, png16, with_alpha, with_thumbnail

SEED = 2024
WHOLE = {
    "jpeg": jpeg(48, 32),
    "progressive jpeg": jpeg(48, 32, progressive=True),
    "cmyk jpeg": encode(drawing(40, 48).convert("CMYK"), "JPEG"),
    "grey jpeg": encode(drawing(33, 47).convert("L"), "JPEG"),
    "4:4:4 jpeg with restart markers": jpeg(48, 40, subsampling=0, restart_marker_rows=1),
    "jpeg with a thumbnail": with_thumbnail(jpeg(48, 32)),
    "png": encode(drawing(40, 30), "PNG"),
    "png with palette": encode(drawing(40, 30).quantize(64), "PNG"),
    "png with alpha": encode(with_alpha(drawing(24, 30)), "PNG"),
    "16-bit png": png16(drawing(20, 16)),
    "webp": encode(drawing(48, 32), "WEBP"),
    "lossless webp": encode(with_alpha(drawing(30, 32)), "WEBP", lossless=True),
    "gif": encode(drawing(40, 30), "GIF"),
    "bmp": encode(drawing(24, 20), "BMP"),
    "tiff": encode(drawing(24, 20), "TIFF"),
    "compressed tiff": encode(drawing(40, 30), "TIFF", compression="tiff_lzw"),
}
HEADERS = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 ", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"%!PS", b"\0" * 12)  # fmt: skip


def flip_bits(rng: np.random.Generator, data: bytearray) -> None:
    for _ in range(rng.choice([1, 2, 8, 64])):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)


def flip_header_bits(rng: np.random.Generator, data: bytearray) -> None:
    for _ in range(rng.choice([1, 4])):
        data[rng.integers(min(len(data), 200))] ^= 1 << rng.integers(8)


def cut(rng: np.random.Generator, data: bytearray) -> None:
    del data[rng.integers(len(data)) :]


def remove_bytes(rng: np.random.Generator, data: bytearray) -> None:
    at = rng.integers(len(data))
    del data[at : at + rng.choice([1, 7, 300])]


def insert_bytes(rng: np.random.Generator, data: bytearray) -> None:
    at = rng.integers(len(data))
    data[at:at] = rng.bytes(rng.choice([1, 3, 100]))


def overwrite(rng: np.random.Generator, data: bytearray) -> None:
    at, length = rng.integers(len(data)), rng.integers(1, 200)
    length = len(data[at : at + length])
    data[at : at + length] = bytes(length) if rng.random() < 0.5 else rng.bytes(length)


def swap_header(rng: np.random.Generator, data: bytearray) -> None:
    header = HEADERS[rng.integers(len(HEADERS))]
    data[: len(header)] = header


def move_end(rng: np.random.Generator, data: bytearray) -> None:
    """Half of the file and its end: a file that looks whole from both sides."""
    middle = len(data) // 2
    del data[middle - rng.integers(1, middle) // 2 : middle + rng.integers(1, middle) // 2]


MUTATIONS = (
    flip_bits,
    flip_header_bits,
    cut,
    remove_bytes,
    insert_bytes,
    overwrite,
    swap_header,
    move_end,
)


def mutated_images(number: int) -> dict[str, bytes]:
    """`number` damaged files by name; the name says what was done."""
    files = {}
    for index in range(number):
        rng = np.random.default_rng([SEED, index])
        kind = list(WHOLE)[index % len(WHOLE)]
        mutate = MUTATIONS[index // len(WHOLE) % len(MUTATIONS)]
        data = bytearray(WHOLE[kind])
        mutate(rng, data)
        files[f"{index}: {kind}, {mutate.__name__}"] = bytes(data)
    return files
