"""Damaged images by the thousand: nothing crashes or hangs, and whatever is refused has a reason.

Everything derives from seeds, so that a failure's number names its file again.
"""

import io
import json
import re
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from hacl_megatron.data.image_levels import MAX_JPEG_SCANS
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.step_maker import MicroBatching
from tests.data import drawn_images
from tests.data.drawn_images import BACKENDS, CONFIG, drawing, encode, jpeg, png16, with_alpha, with_thumbnail
from tests.data.loader_runs import draw, image_bytes, sample
from tests.data.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of tags that a damaged TIFF lacks

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
HEADERS = (*(data[:12] for data in WHOLE.values()), b"%!PS-Adobe", bytes(12), b"<!DOCTYPE ht")
NUM_IMAGES = 2000
MAX_PIXELS = 1_000_000


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


MUTATIONS = (flip_bits, flip_header_bits, cut, remove_bytes, insert_bytes, overwrite, swap_header, move_end)


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


def pillows_verdict(data: bytes) -> Image.Image | None:
    """The image as Pillow decodes it, by any of its readers; None where it refuses, or finds a wrong checksum."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            decoded = image.convert("RGB")
            if image.format == "PNG" and b"IEND\xaeB`\x82" in data:  # else `verify` complains of the missing end
                Image.open(io.BytesIO(data)).verify()
            return decoded
    except Exception:
        return None


def expected_levels(image: Image.Image) -> np.ndarray:
    file = encode(image, "PNG")
    return drawn_images.llava_pad(file)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_images_are_refused_where_pillow_refuses_and_look_the_same_elsewhere(backend):
    files = mutated_images(NUM_IMAGES)
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend, max_image_pixels=MAX_PIXELS)
    decoded = decoder.decode(list(files.values()))
    decoder.close()
    accepted = refused = 0
    for (name, data), pixels, reason in zip(files.items(), decoded.pixel_values, decoded.reasons, strict=True):
        verdict = pillows_verdict(data)
        if reason is not None:
            refused += 1
            assert reason and "\n" not in reason and len(reason) <= 300, name
            assert not pixels.any(), name
            # Nothing is refused without need: too large, or no image to Pillow either.
            assert verdict is None or "--max-image-pixels" in reason, (name, reason)
            continue
        accepted += 1
        assert verdict is not None, f"{name}: Pillow refuses it"
        difference = np.abs(drawn_images.levels(pixels) - expected_levels(verdict))
        assert difference.max() <= 2.001, (name, difference.max())
    assert accepted > NUM_IMAGES / 5 and refused > NUM_IMAGES / 5, (accepted, refused)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if "png" in kind])
def test_a_flipped_bit_of_a_png_is_always_found(backend, kind):
    """Every chunk has a checksum, so nothing but a bit behind the pixels may pass, and then the pixels are the same."""
    data = WHOLE[kind]
    rng = np.random.default_rng(SEED)
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend)
    whole = decoder.decode([data]).pixel_values[0]
    flipped = [bytearray(data) for _ in range(200)]
    for file in flipped:
        file[rng.integers(len(data))] ^= 1 << rng.integers(8)
    decoded = decoder.decode(list(map(bytes, flipped)))
    for pixels, reason in zip(decoded.pixel_values, decoded.reasons, strict=True):
        assert reason is not None or np.array_equal(pixels, whole)
    decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_file_never_passes_with_other_pixels(backend, kind):
    data = WHOLE[kind]
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend)
    whole = decoder.decode([data]).pixel_values[0]
    decoded = decoder.decode([data[:end] for end in np.linspace(0, len(data) - 1, 40).astype(int)])
    for pixels, reason in zip(decoded.pixel_values, decoded.reasons, strict=True):
        assert reason is not None or np.array_equal(pixels, whole)
    decoder.close()


def with_size(kind: str, width: int, height: int) -> bytes:
    """A small whole file whose header claims another size."""
    data = bytearray(WHOLE[kind])
    if kind.endswith("jpeg"):
        at = re.search(rb"\xff[\xc0\xc2]\0", data).start()
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif kind == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "bmp":
        data[18:26] = struct.pack("<II", width, height)
    else:
        assert kind == "tiff", kind
        directory = int.from_bytes(data[4:8], "little")
        for at in range(
            directory + 2, directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little"), 12
        ):
            tag = int.from_bytes(data[at : at + 2], "little")
            if tag in (256, 257):
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "cmyk jpeg", "grey jpeg", "png", "gif", "bmp", "tiff"])
def test_bombs_are_refused_by_their_declared_size(backend, kind):
    """The limit counts, below Pillow's own limit and far above it; and no time is spent on decoding."""
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend, max_image_pixels=MAX_PIXELS)
    sizes = [(1001, 1000), (1, 1001), (65535, 1), (14_000, 14_000), (65535, 65535)]
    begin = time.process_time()
    for size in sizes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            (reason,) = decoder.decode([with_size(kind, *size)]).reasons
        assert re.search("pixels.* more than .*--max-image-pixels 1000000", reason), (size, reason)
    assert time.process_time() - begin < 2
    decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_png_whose_texts_explode_is_harmless(backend):
    """20 MB of zeros in a compressed text before the pixels, and behind them."""
    bomb = b"Comment\0\0" + zlib.compress(bytes(20_000_000))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    png = WHOLE["png"]
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend)
    begin = time.process_time()
    before, behind = decoder.decode([png[:33] + chunk + png[33:], png[:-12] + chunk + png[-12:]]).reasons
    assert time.process_time() - begin < 2
    assert before and "does not decode" not in before, before
    assert behind is None or "png" in behind.lower(), behind
    decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_of_thousands_of_scans_is_refused(backend):
    """Each scan is a pass over all pixels: a megabyte of them takes minutes on a large image."""
    data = WHOLE["progressive jpeg"]
    at = data.rindex(b"\xff\xda")
    repeated = data[:at] + data[at:-2] * MAX_JPEG_SCANS + data[-2:]
    decoder = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backend)
    assert re.fullmatch(r"a JPEG of 1\d\d scans; expected at most 100", decoder.decode([repeated]).reasons[0])
    assert decoder.decode([data]).reasons == [None]
    decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_damaged_file_of_a_run_is_listed_with_its_reason(tmp_path, backend):
    """Through store and loader, under names whose endings say nothing; no other sample of the run is lost."""
    endings = ("jpg", "png", "gif", "webp", "txt", "")
    files = [*mutated_images(160).items(), ("empty", b""), *WHOLE.items()]
    records = []
    for index, (_, data) in enumerate(files):
        records.append(sample(index, "train", image=f"train/{index}.{endings[index % len(endings)]}", text="a red cat"))
        path = tmp_path / "images" / records[-1]["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    records.append(sample(len(files), "train", image="train/missing.jpg"))
    (tmp_path / "train.json").write_text(json.dumps(records))
    write_tokenizer(tmp_path / "tokenizer", legacy=True)
    (step,) = draw(
        1,
        tmp_path,
        flags={"image_backend": backend, "max_image_pixels": MAX_PIXELS},
        contrastive_paths=[],
        global_batch_size=len(records),
        micro_batching=MicroBatching(micro_batch_size=len(records)),
    )
    unusable = {index for index, (_, data) in enumerate(files) if pillows_verdict(data) is None} | {len(files)}
    assert {bad.sample_id for bad in step.bad_samples} == unusable
    for bad in step.bad_samples:
        assert bad.reason and bad.source == str(tmp_path / "images" / records[bad.sample_id]["image"])
        assert bad.name == f"train-{bad.sample_id}"
    batch = step.micro_batches[0].main
    distinct = {data for index, (_, data) in enumerate(files) if index not in unusable}
    assert batch.num_pairs == len(records) - len(unusable) and batch.num_images in (batch.num_pairs, len(distinct))


def test_the_undamaged_images_are_all_used():
    """What the damage is done to is sound, so that a refusal is the damage's doing."""
    assert all(pillows_verdict(data) is not None for data in WHOLE.values())
    assert pillows_verdict(image_bytes(1)) is not None
