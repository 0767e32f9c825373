"""Hostile images by the hundred, through every way that this package opens one: nothing crashes, swells or hangs.

    python tests/measure/fuzz_images.py [--count 300] [--seed 0] [--backend dali pillow]

Whole files of eight formats are mutated as tests/data/test_damaged_images.py does it, and bombs made by hand (small
files that unfold to as many pixels as the default of `--max-image-pixels` takes, or claim more) are always among them.
Each goes, in a process of its own kind, through training's decoder by DALI and by Pillow, with transparency and EXIF
counted and not, and through prepare's `--verify-images`. A file that kills the process, takes it beyond 2 GB, or is not
answered for within 10 s is named, and the exit status is then 1.

Most of the time goes to the bombs that are small enough to be decoded.
"""

import argparse
import io
import itertools
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, features

from hacl_megatron.config.flags import MAX_IMAGE_PIXELS
from hacl_megatron.config.tiles import ImageLayout, TilesConfig
from hacl_megatron.data.images import ImageDecoder, dali_is_installed
from tests.data.drawn_images import CONFIG, png_of, with_thumbnail
from tests.data.test_damaged_images import MUTATIONS, WHOLE

SIDE = int(MAX_IMAGE_PIXELS**0.5)
"""Of the largest square that is decoded."""
SECONDS, BYTES = 10, 2_000_000_000
"""Of the processor, for one file by one way; of memory."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int, colour: int, interlaced: bool = False, row_bytes: int = 0) -> bytes:
    """Zeros: `row_bytes` a row of them, in as few bytes as zlib makes of them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + row_bytes)) for _ in range(height)) + packer.flush()
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def vp8l(width: int, height: int) -> bytes:
    """One colour, losslessly: no transform, no cache, five codes of one symbol each."""
    bits = f"{width - 1:014b}"[::-1] + f"{height - 1:014b}"[::-1] + "0" + "000" + "000" + "1000" * 5
    return b"\x2f" + bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))


def solid_webp(width: int, height: int) -> bytes:
    """28 bytes, whatever the size."""
    return riff((b"VP8L", vp8l(width, height)))


def animated_webp(width: int, height: int) -> bytes:
    """A canvas of that size with a frame of one pixel."""
    canvas = struct.pack("<I", 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + bytes(6) + (100).to_bytes(3, "little") + b"\0"
    inner = vp8l(1, 1)
    frame += b"VP8L" + struct.pack("<I", len(inner)) + inner + bytes(len(inner) % 2)
    return riff((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame))


def gif(width: int, height: int, *, frame: tuple[int, int] | None = None) -> bytes:
    """One colour by LZW, its dictionary filled once and cleared again and again."""
    inner = Image.new("P", frame or (width, height))
    file = io.BytesIO()
    inner.save(file, "GIF")
    data = bytearray(file.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def saved(mode: str, size: tuple[int, int], format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format, **options)
    return file.getvalue()


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last pass comes `scans` times more."""
    data = saved("RGB", (side, side), "JPEG", progressive=True, subsampling=0)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


def tiff(*tags: tuple[int, int, int], data: bytes = bytes(64), after: int = 0) -> bytes:
    """An uncompressed TIFF of these tags (number, kind, value); `after` is the next directory's place."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", after) + data


def tiff_of(width: int, height: int, **more: int) -> bytes:
    names = {"bits": 258, "compression": 259, "rows": 278, "tile_width": 322, "tile_height": 323, "samples": 277}
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64}
    values |= {names[name]: value for name, value in more.items()}
    if "tile_width" in more:
        values |= {324: 200, 325: 64}
    return tiff(*((tag, 4, value) for tag, value in sorted(values.items())))


def rle_bmp(width: int, height: int) -> bytes:
    """Runs of 255 pixels in two bytes each."""
    row = b"\xff\0" * (width // 255) + bytes([width % 255, 0]) + b"\0\0"
    data = row * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(data), 0, 0, 54 + 1024) + header + bytes(1024) + data


def jpeg2000_of_tiles(side: int) -> bytes:
    """A code stream of one-pixel tiles."""
    data = bytearray(saved("RGB", (64, 64), "JPEG2000", no_jp2=True, tile_size=(64, 64)))
    at = data.index(b"\xff\x51") + 6
    data[at : at + 32] = struct.pack(">8I", side, side, 0, 0, 1, 1, 0, 0)
    return bytes(data)


def bombs(only: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Names and files, each made when it is asked for; all of them, or `only` some."""
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(50_000_000)))
    small = WHOLE["png"]
    makers = {
        "webp beyond the bound": lambda: solid_webp(16383, 16383),
        "webp at the bound": lambda: solid_webp(SIDE, SIDE),
        "webp of one row": lambda: solid_webp(16383, 1),
        "moving webp beyond the bound": lambda: animated_webp(1 << 24, 255),
        "moving webp far beyond the bound": lambda: animated_webp(1 << 24, 1 << 24),
        "moving webp at the bound": lambda: animated_webp(SIDE, SIDE),
        "png beyond the bound": lambda: png(100_000, 2, bits=8, colour=2, row_bytes=9).replace(
            struct.pack(">II", 100_000, 2), struct.pack(">II", 100_000, 100_000)
        ),
        "png at the bound": lambda: png(SIDE, SIDE, bits=8, colour=2, row_bytes=3 * SIDE),
        "png at the bound, transparent": lambda: png(SIDE, SIDE, bits=8, colour=6, row_bytes=4 * SIDE),
        "png at the bound, 16 bits": lambda: png(SIDE, SIDE, bits=16, colour=6, row_bytes=8 * SIDE),
        "png at the bound, 16 bits of grey": lambda: png(SIDE, SIDE, bits=16, colour=0, row_bytes=2 * SIDE),
        "png at the bound, 1 bit": lambda: png(SIDE, SIDE, bits=1, colour=3, row_bytes=-(-SIDE // 8)),
        "png at the bound, interlaced": lambda: png_of(SIDE, SIDE, bits=8, interlaced=True, raw=bytes(4 * SIDE * SIDE)),
        "png of one row": lambda: png(MAX_IMAGE_PIXELS, 1, bits=1, colour=0, row_bytes=-(-MAX_IMAGE_PIXELS // 8)),
        "png of one column": lambda: png(1, 1_000_000, bits=1, colour=0, row_bytes=1),
        "png with a comment that explodes": lambda: small[:33] + comment + small[33:],
        "png with a profile that explodes": lambda: small[:33] + profile + small[33:],
        "png with a million chunks": lambda: small[:33] + chunk(b"abCd", b"") * 1_000_000 + small[33:],
        "gif beyond the bound": lambda: gif(65535, 65535, frame=(1, 1)),
        "gif at the bound": lambda: gif(SIDE, SIDE),
        "gif at the bound, its frame of one pixel": lambda: gif(SIDE, SIDE, frame=(1, 1)),
        "jpeg at the bound": lambda: saved("RGB", (SIDE, SIDE), "JPEG", subsampling=0),
        "cmyk jpeg at the bound": lambda: saved("CMYK", (SIDE, SIDE), "JPEG"),
        "progressive jpeg at the bound": lambda: many_scans(SIDE, 1),
        "progressive jpeg at the bound, 60 scans": lambda: many_scans(SIDE, 50),
        "progressive jpeg of 60 scans": lambda: many_scans(2000, 50),
        "jpeg with a thumbnail": lambda: with_thumbnail(WHOLE["jpeg"]),
        "bmp at the bound, without pixels": lambda: saved("RGB", (8, 8), "BMP").replace(
            struct.pack("<II", 8, 8), struct.pack("<II", SIDE, SIDE)
        ),
        "bmp of runs at the bound": lambda: rle_bmp(SIDE, SIDE),
        "tiff at the bound": lambda: saved("RGB", (SIDE, SIDE), "TIFF", compression="tiff_adobe_deflate"),
        "tiff of floats at the bound": lambda: saved("F", (SIDE, SIDE), "TIFF", compression="tiff_adobe_deflate"),
        "tiff by lzw at the bound": lambda: saved("RGBA", (SIDE, SIDE), "TIFF", compression="tiff_lzw"),
        "tiff without pixels": lambda: tiff_of(SIDE, SIDE),
        "tiff of huge tiles": lambda: tiff_of(64, 64, tile_width=1 << 20, tile_height=1 << 20),
        "tiff of huge packed tiles": lambda: tiff_of(64, 64, compression=8, tile_width=65536, tile_height=65536),
        "tiff of a huge strip": lambda: tiff_of(64, 64, compression=5, rows=0xFFFFFFFF),
        "tiff of many samples": lambda: tiff_of(64, 64, samples=65535),
        "tiff whose directory is its own next": lambda: tiff((256, 4, 8), (257, 4, 8), after=8),
        "ppm without pixels": lambda: b"P6 %d %d 255\n" % (SIDE, SIDE),
        "ppm in words without pixels": lambda: b"P3 %d %d 255\n" % (SIDE, SIDE) + b"1 " * 10,
        "ppm in words": lambda: b"P3 1000 1000 255\n" + b"1 " * 3_000_000,
        "ppm beyond the bound": lambda: b"P6 99999999999 99999999999 255\n",
        "pfm without pixels": lambda: b"Pf %d %d -1.0\n" % (SIDE, SIDE),
        "jpeg 2000 at the bound": lambda: saved("RGB", (SIDE, SIDE), "JPEG2000"),
        "jpeg 2000 of a million tiles": lambda: jpeg2000_of_tiles(1000),
        "jpeg 2000 of small tiles": lambda: jpeg2000_of_tiles(250),
    }
    if features.check("avif"):
        makers["avif"] = lambda: saved("RGB", (4000, 4000), "AVIF", speed=10)
    for name, make in makers.items():
        if not only or name in only:
            yield name, make()


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files of every format with a few bits, bytes or pieces other than they were, or larger by their headers."""
    whole = dict(WHOLE)
    if features.check("jpg_2000"):
        whole["jpeg 2000"] = saved("RGB", (40, 30), "JPEG2000")
    if features.check("avif"):
        whole["avif"] = saved("RGB", (40, 30), "AVIF", speed=10)
    whole["ppm"] = saved("RGB", (20, 16), "PPM")
    whole["deep tiff"] = saved("I;16", (20, 16), "TIFF")
    whole["moving webp"] = animated_webp(40, 30)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        kind = list(whole)[index % len(whole)]
        data = bytearray(whole[kind])
        for _ in range(rng.integers(1, 4)):
            if len(data) > 3:  # what some of them need
                mutate = MUTATIONS[rng.integers(len(MUTATIONS))]
                mutate(rng, data)
        if len(data) > 40 and rng.random() < 0.3:  # numbers of the header as large as they can be
            at = rng.integers(4, 36)
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0"])
        yield f"{index}: {kind}", bytes(data)


# ------------------------------------------------------------------------------------------------ what opens the files


def work(folder: Path, backends: list[str]) -> None:
    """The process that may die: one line of JSON on standard output for each file whose number comes in."""
    decoders = {
        f"{backend}, {aspect}, {transparency}, {orientation}": ImageDecoder(
            CONFIG,
            aspect_ratio=aspect,
            backend=backend,
            transparency=transparency,
            orientation=orientation,
        )
        for backend in backends
        for aspect, transparency, orientation in (("pad", "drop", "ignore"), ("square", "fill", "exif"))
    }
    grids = TilesConfig(pinpoints=tuple((112 * tall, 112 * wide) for tall in range(1, 7) for wide in range(1, 7)))
    layout = ImageLayout(visual_tokens=64, view_size=112, tiles=grids)
    decoders["tiles"] = ImageDecoder(CONFIG, aspect_ratio="pad", backend=backends[0], layout=layout)
    verifier = ImageDecoder(CONFIG, aspect_ratio="square", backend="pillow")
    print("ready", flush=True)
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        data = (folder / line.strip()).read_bytes()
        answers = {}
        for name, decoder in decoders.items():
            begin = time.process_time()
            (reason,) = decoder.decode([data]).reasons
            answers[name] = (reason, time.process_time() - begin)
        begin = time.process_time()
        try:
            reason = None
            verifier.measure(data, decode=True)
        except ValueError as error:
            reason = str(error)
        answers["verify"] = (reason, time.process_time() - begin)
        print(json.dumps({"answers": answers, "peak": peak()}), flush=True)


def peak() -> int:
    """Most bytes of memory that this process held for a file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def told(found: dict) -> str:
    """A file's answers in a few words."""
    reasons = {reason for reason, _ in found["answers"].values()}
    seconds = max(seconds for _, seconds in found["answers"].values())
    said = " / ".join(sorted(reason or "decoded" for reason in reasons))
    return f"{found['peak'] / 1e9:.2f} GB, {seconds:.1f} s, {said[:150]}"


class Worker:
    """A process that opens files until it dies."""

    def __init__(self, folder: Path, backends: list[str]) -> None:
        command = [sys.executable, __file__, "--work", str(folder), "--backend", *backends]
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the tests are not installed
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=here
        )
        self.process.stdout.readline()  # its imports are done

    def open(self, name: str, *, seconds: float) -> dict | str:
        """Its answers, or what became of the process, which is over then."""
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.close()
            return f"no answer within {seconds:.0f} s"
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"the process died with status {self.process.wait()}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def fuzz(count: int, seed: int, backends: list[str], *, with_bombs: bool = True) -> int:
    """Prints counts and every fault; returns their number."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    largest, slowest = (0, ""), (0.0, "")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-images-") as name:
        folder, worker = Path(name), None
        made = [(f"bomb: {name}", data) for name, data in bombs()] if with_bombs else []
        rest = mutated(max(0, count - len(made)), seed)
        for case, (what, data) in enumerate(itertools.chain(made, rest)):
            (folder / str(case)).write_bytes(data)
            worker = worker or Worker(folder, backends)
            # Each of the ways that a file goes has its own seconds of the processor, which others may use too.
            found = worker.open(str(case), seconds=4 * SECONDS * (2 * len(backends) + 2))
            (folder / str(case)).unlink()
            counts["files"] += 1
            if what.startswith("bomb") or counts["files"] % 50 == 0:
                print(
                    f"{time.monotonic() - begin:4.0f} s  {what}: {found if isinstance(found, str) else told(found)}",
                    flush=True,
                )
            if isinstance(found, str):
                faults.append(f"{what}: {found}")
                worker = None
                continue
            for way, (reason, seconds) in found["answers"].items():
                counts["decoded" if reason is None else "refused"] += 1
                slowest = max(slowest, (seconds, f"{what}, {way}"))
                if seconds > SECONDS:
                    faults.append(f"{what}, {way}: {seconds:.1f} s")
                if reason is not None and ("\n" in reason or not reason or len(reason) > 300):
                    faults.append(f"{what}, {way}: its reason is {reason!r}")
            largest = max(largest, (found["peak"], what))
            if found["peak"] > BYTES:
                faults.append(f"{what}: {found['peak'] / 1e9:.2f} GB")
        if worker is not None:
            worker.close()
    print(f"{counts['files']} files, {len(made)} of them bombs, in {time.monotonic() - begin:.0f} s: {dict(counts)}")
    print(f"most memory: {largest[0] / 1e9:.2f} GB, {largest[1]}; slowest: {slowest[0]:.1f} s, {slowest[1]}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return len(faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="hostile images, the bombs included")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument(
        "--backend", nargs="+", choices=("dali", "pillow"), default=["dali", "pillow"][not dali_is_installed() :]
    )
    parser.add_argument("--no-bombs", action="store_true", help="mutated files alone, which take seconds")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work, args.backend)
        return 0
    return 1 if fuzz(args.count, args.seed, args.backend, with_bombs=not args.no_bombs) else 0


if __name__ == "__main__":
    sys.exit(main())
