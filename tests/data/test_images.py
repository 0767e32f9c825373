"""Pixels against Pillow and transformers; independence of batch, place and threads; the choice of the decoder."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data import image_levels, images
from hacl_megatron.data.dali import dali_is_installed
from hacl_megatron.data.images import ImageDecoder, resolve_backend
from tests.data.drawn_images import (
    BACKENDS,
    CONFIG,
    KINDS,
    MEAN,
    ORACLES,
    PHOTO,
    SIZE,
    SIZES,
    STD,
    decode,
    decoder,
    drawing,
    encode,
    exif_rotated,
    jpeg,
    levels,
    llava_pad,
    needs_dali,
)
from tests.tiny import tiny_blip_image_processor

try:  # transformers 5 keeps a processor without torchvision under its own name
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

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


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bilinear_pixels_are_pillows(monkeypatch, backend, aspect_ratio):
    """Catches an interpolation that one of the ways to resize does not take, the far ends cut off included."""
    monkeypatch.setattr(Image, "BICUBIC", Image.BILINEAR)  # the oracles'
    item = ImageDecoder(replace(CONFIG, interpolation="bilinear"), aspect_ratio=aspect_ratio, backend=backend)
    files = [jpeg(*size) for size in [*SIZES, (1, 4000)]]
    for ours, file in zip(levels(decode(item, *files)), files, strict=True):
        difference = np.abs(ours - ORACLES[aspect_ratio](file))
        assert difference.max() <= 2.001 and difference.mean() < 0.01
    item.close()


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "stretch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_crop_of_more_is_pillows(backend, aspect_ratio):
    """DINOv2's processor: catches a picture resized to what is cropped, or cut at another place than its middle, the
    far ends cut off included. `stretch` crops nothing."""
    shortest = SIZE + 37
    item = ImageDecoder(replace(CONFIG, shortest_edge=shortest), aspect_ratio=aspect_ratio, backend=backend)
    extreme = [(1, 4000), (4000, 1)] if aspect_ratio == "square" else []
    files = [jpeg(*size) for size in [*SIZES, *extreme]]
    for ours, file in zip(levels(decode(item, *files)), files, strict=True):
        expected = ORACLES[aspect_ratio](file) if aspect_ratio == "stretch" else cropped(file, shortest, aspect_ratio)
        difference = np.abs(ours - expected)
        assert difference.max() <= 2.001 and difference.mean() < 0.01
    item.close()


def cropped(file: bytes, shortest: int, aspect_ratio: str) -> np.ndarray:
    """By Pillow: uint8 [S, S, 3], the middle of what a resized shortest edge leaves."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    if aspect_ratio == "pad":
        picture, side = image, max(image.size)
        image = Image.new("RGB", (side, side), (122, 116, 104))
        image.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    size = [int(shortest * edge / min(image.size)) for edge in image.size]
    left, top = ((edge - SIZE) // 2 for edge in size)
    return np.asarray(image.resize(size, Image.BICUBIC).crop((left, top, left + SIZE, top + SIZE)))


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


@needs_dali
def test_what_dali_alone_cannot_decode_goes_through_pillow(decoders, monkeypatch):
    """Formats that DALI raises on, sent to it anyway: the batch is repeated and every image still comes out."""
    bmp, gif = encode(drawing(90, 60), "BMP"), encode(drawing(90, 60), "GIF")
    expected = decode(decoders("dali"), PHOTO, gif, bmp)
    with_gif = decoder("dali")
    monkeypatch.setitem(image_levels.DALI_MODES, "GIF", ("P", "RGB"))
    assert torch.equal(decode(with_gif, PHOTO, gif, bmp), expected)
    assert sum(graph.num_failures for graph in with_gif._graphs) > 0, "DALI was expected to refuse the GIF"
    assert torch.equal(decode(with_gif, PHOTO, PHOTO)[1], expected[0])
    with_gif.close()


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


def test_dali_that_cannot_be_imported_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not dali_is_installed()


def test_wrong_combinations_are_explained():
    with pytest.raises(ValueError, match="pad, square or stretch"):
        decoder("pillow", "anyres")
    with pytest.raises(ValueError, match="needs DALI"):
        decoder("pillow", device="mixed", device_id=0)
