"""Pictures that trained as white, black or lying squares: deep levels, transparency, and cameras held upright."""

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.hf.config_write import to_config_json
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from tests.data.drawn_images import BACKENDS, CONFIG, SIZE, decode, decoder, drawing, encode, levels, with_alpha
from tests.data.loader_runs import MODEL
from tests.tiny import write_tiny_llava

GREY = np.asarray(drawing(SIZE, SIZE).convert("L")).astype(int)
RAMP = np.add.outer(np.arange(SIZE), np.arange(SIZE)) / (2 * SIZE - 2)  # 0 to 1
FILL = (122, 116, 104)


def file_of(values: np.ndarray, format: str, **options) -> bytes:
    return encode(Image.fromarray(values), format, **options)


def unsigned_tiff(values: np.ndarray) -> bytes:
    """A grey TIFF of 32 bits without signs, which Pillow reads as numbers with signs and cannot write."""
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 32), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, height), (279, 4, values.nbytes), (339, 3, 1)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.astype("<u4").tobytes() + directory


def jpeg2000_of_16_bits(values: np.ndarray) -> bytes:
    return file_of(values, "JPEG2000", irreversible=False)


DEEP = {
    "16-bit grey png": (file_of((GREY * 257).astype("<u2"), "PNG"), GREY),
    "16-bit grey png, lower bits": (file_of((GREY * 256 + 255).astype("<u2"), "PNG"), GREY),
    "16-bit grey tiff": (file_of((GREY * 257).astype("<u2"), "TIFF"), GREY),
    "16-bit grey tiff of a motorola": (file_of((GREY * 257).astype(">u2"), "TIFF"), GREY),
    "16-bit pgm": (b"P5 %d %d 65535\n" % (SIZE, SIZE) + (GREY * 257).astype(">u2").tobytes(), GREY),
    "12-bit pgm": (b"P5 %d %d 4095\n" % (SIZE, SIZE) + (GREY.astype(int) * 4095 // 255).astype(">u2").tobytes(), GREY),
    "16-bit jpeg 2000": (jpeg2000_of_16_bits((GREY * 257).astype("<u2")), GREY),
    "32-bit tiff of 8 bits": (file_of(GREY.astype("<i4"), "TIFF"), GREY),
    "32-bit tiff of 16 bits": (file_of(GREY.astype("<i4") * 257, "TIFF"), GREY),
    "32-bit tiff, all of them": (file_of((RAMP * (2**31 - 1)).astype("<i4"), "TIFF"), RAMP * 255),
    "32-bit tiff with negative levels": (file_of((RAMP * 4000 - 1000).astype("<i4"), "TIFF"), RAMP * 255),
    "32-bit tiff without signs": (unsigned_tiff((RAMP * (2**32 - 1)).astype("<u4")), RAMP * 255),
    "floats of 0 to 1": (file_of(RAMP.astype("<f4"), "TIFF"), RAMP * 255),
    "floats of 0 to 1, dark": (file_of((RAMP / 4).astype("<f4"), "TIFF"), RAMP * 255 / 4),
    "floats of 0 to 255": (file_of(GREY.astype("<f4"), "TIFF"), GREY),
    "floats of -3 to 3": (file_of((RAMP * 6 - 3).astype("<f4"), "TIFF"), RAMP * 255),
    "floats and no numbers": (file_of(np.where(RAMP > 0, RAMP, np.nan).astype("<f4"), "TIFF"), RAMP * 255),
    "pfm": (b"Pf %d %d -1.0\n" % (SIZE, SIZE) + RAMP[::-1].astype("<f4").tobytes(), RAMP * 255),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DEEP)
def test_deep_levels_are_scaled_and_not_cut_off(backend, kind):
    """Catches Pillow's `convert("RGB")`, which makes 16 and 32 bits white and floats black."""
    file, expected = DEEP[kind]
    item = decoder(backend)
    result = levels(decode(item, file))[0]
    item.close()
    assert np.abs(result - expected[..., None]).max() <= 1.001, kind
    assert result.std() > 10, "as the pictures were drawn"


def test_a_grey_picture_is_the_same_in_grey_and_in_colour():
    """16 bits lose their lower 8 in Pillow's own reading of colour; grey ones must not be rounded another way."""
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE)).astype(">u2")
    raw = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    colour = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    item = decoder("pillow")
    first, second = decode(item, colour, file_of(values.astype("<u2"), "PNG"))
    item.close()
    assert torch.equal(first, second)


# ---- transparency


def icon() -> Image.Image:
    """A shape whose colour is black all over and whose form is its transparency alone."""
    picture = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (20, 30, 80, 90))
    return picture


TRANSPARENT = {
    "png": encode(icon(), "PNG"),
    "png with shades": encode(with_alpha(drawing(SIZE, SIZE)), "PNG"),
    "grey png": encode(with_alpha(drawing(SIZE, SIZE)).convert("LA"), "PNG"),
    "palette": encode(drawing(SIZE, SIZE).quantize(64), "PNG", transparency=3),
    "palette with shades": encode(drawing(SIZE, SIZE).quantize(64), "PNG", transparency=bytes(range(0, 256, 4))),
    "one colour": encode(icon().convert("RGB"), "PNG", transparency=(0, 0, 0)),
    "one grey": encode(icon().convert("L"), "PNG", transparency=0),
    "webp": encode(with_alpha(drawing(SIZE, SIZE)), "WEBP", lossless=True),
    "gif": encode(icon(), "GIF"),
    "tiff": encode(with_alpha(drawing(SIZE, SIZE)), "TIFF"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_on_the_fill_colour_when_asked(backend, kind):
    """Catches an icon that is all black, and a decoder (DALI) that drops the transparency whatever the flag says."""
    picture = Image.open(io.BytesIO(TRANSPARENT[kind])).convert("RGBA")
    colours, alpha = np.asarray(picture)[..., :3].astype(float), np.asarray(picture)[..., 3:] / 255
    expected = {"fill": colours * alpha + np.array(FILL) * (1 - alpha)}
    expected["drop"] = np.asarray(Image.open(io.BytesIO(TRANSPARENT[kind])).convert("RGB"))
    for way, wanted in expected.items():
        item = decoder(backend, transparency=way)
        result = levels(decode(item, TRANSPARENT[kind]))[0]
        item.close()
        assert np.abs(result - wanted).max() <= 1.001, way


def test_a_transparent_level_of_16_bits_is_filled():
    """It is named in 16 bits, where Pillow compares 8."""
    values = (GREY // 2 * 257).astype("<u2")
    values[:40] = 65535
    item = decoder("pillow", transparency="fill")
    result = levels(decode(item, file_of(values, "PNG", transparency=65535)))[0]
    item.close()
    np.testing.assert_allclose(result[:40], np.broadcast_to(FILL, (40, SIZE, 3)), atol=1e-3)
    np.testing.assert_allclose(result[40:], np.repeat(GREY[40:, :, None] // 2, 3, axis=2), atol=1e-3)


# ---- orientation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_exif_says_when_asked(backend, format):
    """Catches each of the eight turns, one more or less, and a decoder that does not turn. Oracle: Pillow's own."""
    ignoring, turning = decoder(backend), decoder(backend, orientation="exif")
    for orientation in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = encode(drawing(90, 60), format, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)).convert("RGB"))
        lossless = encode(upright, "PNG")
        assert torch.equal(decode(turning, file), decode(turning, lossless)), orientation
        as_stored = encode(Image.open(io.BytesIO(file)).convert("RGB"), "PNG")
        assert torch.equal(decode(ignoring, file), decode(ignoring, as_stored)), orientation
    for item in (ignoring, turning):
        item.close()


@pytest.mark.parametrize("damage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(256))])
def test_a_picture_with_broken_exif_is_taken_as_it_is(damage):
    item = decoder("pillow", orientation="exif")
    good = encode(drawing(90, 60), "JPEG")
    broken = good[:2] + b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage + good[2:]
    assert torch.equal(decode(item, broken), decode(item, good))
    item.close()


# ---- the flags on their way


def test_a_run_decodes_as_its_flags_say():
    """Catches a flag that the decoder of a run (training and the likelihood tasks) is not given."""
    data = DataFlags(image_transparency="fill", image_orientation="exif", image_backend="pillow")
    item = ImageDecoder.of(RunConfig(data=data, architecture=replace(MODEL, image=CONFIG)))
    assert (item.reader.transparency, item.reader.orientation, item.reader.fill) == ("fill", "exif", FILL)
    item.close()


def test_flags_that_are_unknown_are_named():
    with pytest.raises(ValueError, match=r"--image-transparency 'keep' is unknown; it is drop or fill"):
        decoder("pillow", transparency="keep")
    with pytest.raises(ValueError, match=r"--image-orientation 'on' is unknown; it is ignore or exif"):
        decoder("pillow", orientation="on")


@pytest.mark.parametrize("layout", ["hf", "llava"])
def test_an_export_states_them_for_its_evaluation(tmp_path, layout):
    """Catches answers generated from pictures that the model was not trained to see; nothing is stated by default."""
    source = write_tiny_llava(tmp_path / "llava", layers=1, vision_layers=2)
    model = read_model_config(source)
    assert not {"image_transparency", "image_orientation"} & {*to_config_json(model, layout, dtype="float32")}
    ways = {"image_transparency": "fill", "image_orientation": "exif"}
    stated = replace(model, extra={**model.extra, **ways})
    config = to_config_json(stated, layout, dtype="float32")
    assert {key: config[key] for key in ways} == ways
    own = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**own, **ways}))
    flags = data_flags(read_model_config(source))
    assert (flags.image_transparency, flags.image_orientation) == ("fill", "exif")
    (source / "config.json").write_text(json.dumps({**own, "image_orientation": "upright"}))
    with pytest.raises(ValueError, match=r"config.json: image_orientation is 'upright'; this trainer supports"):
        read_model_config(source)


# ---- blank pictures are counted


@pytest.mark.parametrize("shards", [False, True])
def test_verifying_counts_pictures_of_one_colour_and_names_them(tmp_path, shards):
    """Catches an all-black set that prepares without a word; a second start still knows what the first one saw."""
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 5, (60, 80, 3), dtype=np.uint8))
    dot = Image.new("RGB", (100, 100))
    dot.putpixel((3, 3), (255, 255, 255))
    text = Image.new("RGB", (100, 100), (255, 255, 255))
    text.paste((0, 0, 0), (10, 10, 40, 14))
    pictures = {
        "black icon.png": icon(), "almost black.png": noisy, "dot.png": dot, "page with a line.png": text,
        "cat.jpg": drawing(80, 60), "other cat.png": drawing(60, 90),
    }  # fmt: skip
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    records = [{"id": str(n), "image": name, "conversations": turns} for n, name in enumerate([*pictures, "cat.jpg"])]
    (tmp_path / "a.json").write_text(json.dumps(records))
    settings = PrepareSettings(
        inputs=[str(tmp_path / "a.json")], output=str(tmp_path / "out"), image_folder=str(folder), verify_images=True,
        write_shards=shards, progress_bar=False,
    )  # fmt: skip
    report = run_prepare(settings)
    assert report["images (nearly) of one colour"] == 3 and report["bad images"] == 0
    (line,) = [line for line in report["to look at"] if "one colour" in line]
    assert line.startswith("3 images") and all(name in line for name in list(pictures)[:3])
    unverified = run_prepare(replace(settings, verify_images=False, output=f"{tmp_path}/b"))
    assert "images (nearly) of one colour" not in unverified


def test_a_second_start_remembers_the_blank_pictures_of_the_first(tmp_path, monkeypatch):
    """Its parts are taken over unmeasured, so that they cannot be counted again."""
    Image.new("RGB", (9, 9)).save(tmp_path / "black.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "image": "black.png", "conversations": turns}]))
    settings = PrepareSettings(
        inputs=[str(tmp_path / "a.json")], output=str(tmp_path / "out"), image_folder=str(tmp_path), verify_images=True,
        progress_bar=False,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("hacl_megatron.data.prepare.run.merge_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_prepare(settings)
    assert list((Path(settings.output) / ".partial").glob("*.arrow"))
    monkeypatch.setattr(ImageDecoder, "measure", lambda *_, **__: pytest.fail("measured twice"))
    assert run_prepare(settings)["images (nearly) of one colour"] == 1
