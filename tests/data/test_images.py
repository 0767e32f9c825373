"""Pixels against Pillow and transformers; what is refused; independence of batch, place and threads."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data import images
from hacl_megatron.data.images import ImageDecoder, resolve_backend
from tests.tiny import tiny_blip_image_processor

try:  # transformers 5 keeps a processor without torchvision under its own name
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

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


def decoder(backend: str, aspect_ratio: str = "pad", **options) -> ImageDecoder:
    return ImageDecoder(CONFIG, aspect_ratio=aspect_ratio, backend=backend, **options)


@pytest.fixture(scope="module")
def decoders():
    """One decoder for each backend and aspect ratio, built when first asked for."""
    built = {}

    def get(backend: str, aspect_ratio: str = "pad") -> ImageDecoder:
        key = backend, aspect_ratio
        if key not in built:
            built[key] = decoder(backend, aspect_ratio)
        return built[key]

    yield get
    for item in built.values():
        item.close()


def decode(item: ImageDecoder, *files: bytes) -> torch.Tensor:
    decoded = item.decode(files)
    assert decoded.reasons == [None] * len(files)
    assert decoded.pixel_values.shape == (len(files), 3, SIZE, SIZE)
    assert decoded.pixel_values.dtype == torch.float32 and decoded.pixel_values.is_contiguous()
    return decoded.pixel_values


# ---- pixels


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_those_of_llava(decoders, backend, aspect_ratio):
    """torch's fixed-point resize, behind DALI, rounds as Pillow-SIMD does: almost everywhere the same level."""
    files = [jpeg(*size) for size in SIZES]
    result = levels(decode(decoders(backend, aspect_ratio), *files))
    largest, mean = (2.001, 0.01) if backend == "dali" else (1e-3, 1e-4)
    for size, ours, file in zip(SIZES, result, files, strict=True):
        difference = np.abs(ours - ORACLES[aspect_ratio](file))
        assert difference.max() <= largest, size
        assert difference.mean() < mean, size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
def test_images_of_the_right_size_keep_their_levels(decoders, backend, aspect_ratio):
    file = encode(drawing(SIZE, SIZE), "PNG")
    pixels = decode(decoders(backend, aspect_ratio), file)[0]
    exact = np.asarray(drawing(SIZE, SIZE)) / 255
    np.testing.assert_allclose(pixels.movedim(0, -1).numpy(), (exact - MEAN) / STD, rtol=0, atol=1e-6)


def test_pillow_equals_transformers_image_processor(decoders):
    """`square` is CLIPImageProcessor itself; `pad` is it applied to the padded image, as LLaVA does. `stretch` is
    BlipImageProcessor."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CONFIG.mean), image_std=list(CONFIG.std), resample=Image.BICUBIC,
    )  # fmt: skip
    blip = tiny_blip_image_processor(SIZE)
    for size in SIZES:
        file = jpeg(*size)
        theirs = processor(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(decode(decoders("pillow", "square"), file).numpy(), theirs, rtol=0, atol=2e-6)
        theirs = blip(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(decode(decoders("pillow", "stretch"), file).numpy(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 5), (1, 4000), (4000, 1), (3, 2000), (2001, 2)])
def test_tiny_and_extreme_images(decoders, backend, aspect_ratio, size):
    file = jpeg(*size)
    result = levels(decode(decoders(backend, aspect_ratio), file))[0]
    assert np.abs(result - ORACLES[aspect_ratio](file)).max() <= 2.001


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_odd_margin_is_wider_below_and_right(decoders, backend):
    """White on the mean colour, unresized: rows of the image show where it was pasted, (w - h) // 2 from the top."""
    white = Image.new("RGB", (SIZE, SIZE - 3), (255, 255, 255))
    wide, high = levels(
        decode(decoders(backend), encode(white, "PNG"), encode(white.transpose(Image.ROTATE_90), "PNG"))
    )
    expected = np.full((SIZE, SIZE, 3), (122, 116, 104))
    expected[1 : SIZE - 2] = 255
    np.testing.assert_array_equal(wide.round(), expected)
    np.testing.assert_array_equal(high.round(), expected.transpose(1, 0, 2))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_decodes_as_pillow_does(decoders, backend, kind):
    """At S x S nothing is resized, so the levels must be Pillow's very own."""
    file = KINDS[kind](drawing(SIZE, SIZE))
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    result = levels(decode(decoders(backend), file))[0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_avif(decoders, backend):
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    file = encode(drawing(90, 60), "AVIF")
    assert np.abs(levels(decode(decoders(backend), file))[0] - llava_pad(file)).max() <= 2.001


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_rotation_is_ignored(decoders, backend):
    image = drawing(90, 60)
    plain, rotated = decode(decoders(backend), encode(image, "JPEG", quality=90), exif_rotated(image))
    assert torch.equal(plain, rotated)


# ---- what is refused


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BAD)
def test_broken_files_have_a_reason_and_move_nothing_else(decoders, backend, kind):
    data, reason = BAD[kind]
    good = [jpeg(60, 40, seed) for seed in range(3)]
    alone = decode(decoders(backend), *good)
    mixed = decoders(backend).decode([good[0], data, good[1], good[2]])
    assert [index for index, text in enumerate(mixed.reasons) if text] == [1]
    text = mixed.reasons[1]
    assert re.search(reason, text), text
    assert "\n" not in text and len(text) <= 300
    assert not mixed.pixel_values[1].any()
    assert torch.equal(mixed.pixel_values[[0, 2, 3]], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thumbnail_is_no_reason_to_refuse(decoders, backend):
    whole = decode(decoders(backend), with_thumbnail(PHOTO), PHOTO)
    assert torch.equal(whole[0], whole[1])


@needs_dali
def test_what_dali_alone_cannot_decode_goes_through_pillow(decoders, monkeypatch):
    """Formats that DALI raises on, sent to it anyway: the batch is repeated and every image still comes out."""
    bmp, gif = encode(drawing(90, 60), "BMP"), encode(drawing(90, 60), "GIF")
    expected = decode(decoders("dali"), PHOTO, gif, bmp)
    with_gif = decoder("dali")
    monkeypatch.setitem(images._DALI_MODES, "GIF", ("P", "RGB"))
    assert torch.equal(decode(with_gif, PHOTO, gif, bmp), expected)
    assert sum(graph.num_failures for graph in with_gif._graphs) > 0, "DALI was expected to refuse the GIF"
    assert torch.equal(decode(with_gif, PHOTO, PHOTO)[1], expected[0])
    with_gif.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_images_are_refused_before_they_are_decoded(backend):
    """A PNG of 30,000 x 30,000 pixels in a few bytes of header."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + PNG[33:]
    item = decoder(backend, max_image_pixels=1000)
    assert item.decode([jpeg(31, 32), jpeg(40, 25), jpeg(20, 32), jpeg(32, 32), bomb]).reasons == [
        "31 x 32 pixels, padded to a square, are more than --max-image-pixels 1000",
        "40 x 25 pixels, padded to a square, are more than --max-image-pixels 1000",
        "20 x 32 pixels, padded to a square, are more than --max-image-pixels 1000",
        "32 x 32 pixels are more than --max-image-pixels 1000",
        item.decode([bomb]).reasons[0],
    ]
    assert "pixels" in item.decode([bomb]).reasons[0]
    item.close()
    item = decoder(backend, "square", max_image_pixels=1000)
    assert item.decode([jpeg(40, 25), jpeg(41, 25)]).reasons == [
        None, "41 x 25 pixels are more than --max-image-pixels 1000",
    ]  # fmt: skip
    item.close()


@needs_dali
@pytest.mark.parametrize("kind", ["text", "empty", "jpeg cut in half", "png cut in half", "webp cut in half"])
def test_broken_files_are_found_before_dali_sees_them(decoders, kind):
    """What DALI fails on is repeated image by image on a new pipeline: too slow for the common faults."""
    item = decoders("dali")
    before = [graph.num_failures for graph in item._graphs]
    assert item.decode([PHOTO, BAD[kind][0], PHOTO]).reasons[1] is not None
    assert [graph.num_failures for graph in item._graphs] == before


# ---- independence


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_do_not_depend_on_batch_place_or_threads(decoders, backend):
    files = [jpeg(60 + 7 * seed, 90 - 2 * seed, seed) for seed in range(8)]
    together = decode(decoders(backend), *files)
    backwards = decode(decoders(backend), *files[::-1])
    assert torch.equal(together, backwards.flip(0))
    for file, pixels in zip(files, together, strict=True):
        assert torch.equal(decode(decoders(backend), file)[0], pixels)
    one_thread, many_threads = decoder(backend, num_threads=1), decoder(backend, num_threads=5)
    assert torch.equal(decode(one_thread, *files), together)
    assert torch.equal(decode(many_threads, *files), together)
    # More than DALI takes at once, and a result that survives the next batch.
    many = decode(decoders(backend), *(files * 5))
    decode(decoders(backend), *files[::-1])
    assert torch.equal(many, together.repeat(5, 1, 1, 1))
    for item in (one_thread, many_threads):
        item.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(decoders, backend):
    assert decode(decoders(backend)).shape == (0, 3, SIZE, SIZE)


def test_the_processors_own_mean_and_size_count(decoders):
    config = ImageConfig(size=48, mean=(0.5, 0.25, 0.75), std=(0.5, 0.5, 0.25))
    grey = encode(Image.new("RGB", (48, 24), (255, 0, 51)), "PNG")
    for backend in ("dali", "pillow") if images.dali_is_installed() else ("pillow",):
        item = ImageDecoder(config, aspect_ratio="pad", backend=backend)
        pixels = item.decode([grey]).pixel_values[0]
        fill = (torch.tensor([127, 63, 191]) / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
        inside = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(config.mean)) / torch.tensor(config.std)
        torch.testing.assert_close(pixels[:, 0, 0], fill)
        torch.testing.assert_close(pixels[:, 24, 24], inside)
        item.close()


# ---- choosing


def test_resolve_backend(monkeypatch):
    assert resolve_backend("pillow") == "pillow"
    monkeypatch.setattr(images, "dali_is_installed", lambda: True)
    assert (resolve_backend("auto"), resolve_backend("dali")) == ("dali", "dali")
    monkeypatch.setattr(images, "dali_is_installed", lambda: False)
    assert resolve_backend("auto") == "pillow"
    with pytest.raises(ValueError, match=r"--image-backend dali needs NVIDIA DALI.*--image-backend pillow"):
        resolve_backend("dali")
    with pytest.raises(ValueError, match="auto, dali or pillow"):
        resolve_backend("opencv")


def test_wrong_combinations_are_explained():
    with pytest.raises(ValueError, match="pad, square or stretch"):
        decoder("pillow", "anyres")
    with pytest.raises(ValueError, match="needs DALI"):
        decoder("pillow", device="mixed", device_id=0)
