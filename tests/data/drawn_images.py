"""Drawn images as files of every kind, whole and broken; and what LLaVA, CLIP and BLIP make of their pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder

SIZE = 112
CONFIG = ImageConfig(size=SIZE)
MEAN, STD = np.array(CONFIG.mean), np.array(CONFIG.std)
needs_dali = pytest.mark.skipif(not images.dali_is_installed(), reason="DALI is not installed")
BACKENDS = [pytest.param("dali", marks=needs_dali), "pillow"]
SIZES = [(640, 480), (480, 640), (500, 333), (336, 336), (113, 112), (112, 113), (61, 40), (37, 90), (900, 150)]


def drawing(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something between a photograph and a diagram: gradient, blurred noise, shapes with hard edges."""
    rng = np.random.default_rng([seed, width, height])
    across = np.linspace(0, 255, width)[None, :, None]
    down = np.linspace(0, 255, height)[:, None, None]
    noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)), dtype=np.float64)
    levels = 0.3 * across * [1, 0, 1] + 0.3 * down * [0, 1, 1] + 0.5 * blurred
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.integers(0, width), rng.integers(0, height)
        color = tuple(int(level) for level in rng.integers(0, 256, 3))
        draw.ellipse([x - width // 5, y - height // 6, x + width // 5, y + height // 6], fill=color)
    return image


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(width: int, height: int, seed: int = 0, **options) -> bytes:
    return encode(drawing(width, height, seed), "JPEG", quality=90, **options)


def exif_rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: show rotated by 90 degrees
    return encode(image, "JPEG", quality=90, exif=exif)


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = np.random.default_rng(0).integers(0, 256, (image.height, image.width)).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def png_of(width: int, height: int, *, bits: int, interlaced: bool, raw: bytes) -> bytes:
    """An RGB PNG of filtered rows."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, interlaced)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7's seven passes, each a smaller image; Pillow reads them but cannot write them."""
    levels = np.asarray(image)
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = [row for top, down, left, right in passes for row in levels[top::down, left::right]]
    raw = b"".join(b"\0" + row.tobytes() for row in rows if row.size)
    return png_of(image.width, image.height, bits=8, interlaced=True, raw=raw)


def png16(image: Image.Image) -> bytes:
    """A 16-bit RGB PNG, which Pillow reads but cannot write."""
    rows = np.asarray(image).astype(">u2") * 256 + 200
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(image.width, image.height, bits=16, interlaced=False, raw=raw)


KINDS = {
    "grey jpeg": lambda image: encode(image.convert("L"), "JPEG"),
    "cmyk jpeg": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "progressive jpeg": lambda image: encode(image, "JPEG", progressive=True),
    "4:4:4 jpeg": lambda image: encode(image, "JPEG", subsampling=0),
    "4:2:2 jpeg": lambda image: encode(image, "JPEG", subsampling=1),
    "jpeg with restart markers": lambda image: encode(image, "JPEG", restart_marker_rows=1),
    "jpeg with bytes behind its end": lambda image: encode(image, "JPEG") + b"camera" * 50,
    "jpeg with a second picture": lambda image: encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
    "4:1:1 jpeg": lambda image: encode(image, "JPEG", subsampling="4:1:1"),
    "rgb jpeg": lambda image: encode(image, "JPEG", keep_rgb=True),
    "exif-rotated jpeg": exif_rotated,
    "png": lambda image: encode(image, "PNG"),
    "png with alpha": lambda image: encode(with_alpha(image), "PNG"),
    "png with palette": lambda image: encode(image.quantize(64), "PNG"),
    "png with 4 colours": lambda image: encode(image.quantize(4), "PNG", bits=2),
    "png with transparent colour": lambda image: encode(image.quantize(64), "PNG", transparency=3),
    "grey png": lambda image: encode(image.convert("L"), "PNG"),
    "grey png with alpha": lambda image: encode(with_alpha(image).convert("LA"), "PNG"),
    "black and white png": lambda image: encode(image.convert("1"), "PNG"),
    "interlaced png": interlaced_png,
    "16-bit png": png16,
    "webp": lambda image: encode(image, "WEBP"),
    "webp with alpha": lambda image: encode(with_alpha(image), "WEBP", lossless=True),
    "moving webp": lambda image: encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
    "gif": lambda image: encode(image, "GIF"),
    "moving gif": lambda image: encode(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
    "bmp": lambda image: encode(image, "BMP"),
    "tiff": lambda image: encode(image, "TIFF"),
}


def with_thumbnail(file: bytes) -> bytes:
    """The JPEG with another whole JPEG inside its EXIF segment."""
    payload = b"Exif\0\0" + jpeg(16, 16)
    return file[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + file[2:]


def png_without_half_its_data(file: bytes) -> bytes:
    """A PNG whose chunks are all in order but whose pixels stop half way."""
    start = file.find(b"IDAT")
    length = int.from_bytes(file[start - 4 : start], "big")
    data = file[start + 4 : start + 4 + length // 2]
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return file[: start - 4] + chunk + file[start + 8 + length :]


PHOTO = jpeg(160, 120)
PNG = encode(drawing(160, 120), "PNG")
BAD = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "not an image in a known format"),
    "zeros": (bytes(1000), "not an image in a known format"),
    "jpeg cut in half": (PHOTO[: len(PHOTO) // 2], "is cut off"),
    "jpeg without its last bytes": (PHOTO[:-3], "is cut off"),
    "jpeg filled up with zeros": (PHOTO[: len(PHOTO) // 2] + bytes(len(PHOTO) // 2), "is cut off|does not decode"),
    "progressive jpeg cut in half": (jpeg(160, 120, progressive=True)[:3000], "is cut off"),
    "cut jpeg with a whole thumbnail": (with_thumbnail(PHOTO)[: len(PHOTO) // 2], "is cut off"),
    "jpeg header alone": (PHOTO[:20], "not a"),
    "png cut in half": (PNG[: len(PNG) // 2], "is cut off"),
    "png with half its pixels": (png_without_half_its_data(PNG), "does not decode"),
    "webp cut in half": (encode(drawing(160, 120), "WEBP")[:1500], "is cut off|not a"),
    "gif cut in half": (encode(drawing(160, 120), "GIF")[:2000], "does not decode"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image in a known format"),
}


def llava_pad(data: bytes) -> np.ndarray:
    """LLaVA-1.5 written out: expand2square on the mean colour, bicubic resize. uint8 [S, S, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    background = (122, 116, 104)
    if width > height:
        square = Image.new("RGB", (width, width), background)
        square.paste(image, (0, (width - height) // 2))
    elif height > width:
        square = Image.new("RGB", (height, height), background)
        square.paste(image, ((height - width) // 2, 0))
    else:
        square = image
    return np.asarray(square.resize((SIZE, SIZE), Image.BICUBIC))


def clip_square(data: bytes) -> np.ndarray:
    """CLIP's processor written out: shortest edge to S, centre crop. uint8 [S, S, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((SIZE, int(SIZE * height / width)), Image.BICUBIC)
    else:
        image = image.resize((int(SIZE * width / height), SIZE), Image.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def blip_stretch(data: bytes) -> np.ndarray:
    """BLIP's and SigLIP's processors written out: both edges to S. uint8 [S, S, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))


ORACLES = {"pad": llava_pad, "square": clip_square, "stretch": blip_stretch}


def levels(pixel_values: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: float64 [..., S, S, 3] in 0 .. 255."""
    return (pixel_values.double().movedim(-3, -1).numpy() * STD + MEAN) * 255


def inner_levels(square: np.ndarray, file: bytes) -> np.ndarray:
    """Of [..., S, S], made of `file`, what no pixel beyond the image's border counts in: bicubic reaches 2 pixels."""
    size = square.shape[-1]
    margin = 1 + -(-2 * size // min(size, *Image.open(io.BytesIO(file)).size))
    return square[..., margin:-margin, margin:-margin]


def decoder(backend: str, aspect_ratio: str = "pad", **options) -> ImageDecoder:
    return ImageDecoder(CONFIG, aspect_ratio=aspect_ratio, backend=backend, **options)


def decode(item: ImageDecoder, *files: bytes) -> torch.Tensor:
    decoded = item.decode(files)
    assert decoded.reasons == [None] * len(files)
    assert decoded.pixel_values.shape == (len(files), 3, SIZE, SIZE)
    assert decoded.pixel_values.dtype == torch.float32 and decoded.pixel_values.is_contiguous()
    return decoded.pixel_values
