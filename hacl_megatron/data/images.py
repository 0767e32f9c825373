"""From image files to normalised pixels, the way LLaVA-1.5 does it, by NVIDIA DALI or by Pillow.

    bytes ─inspect─→ size, format ─┬ JPEG, PNG, WebP ───────────────┬→ DALI graph ─→ float32 [3, S, S]
             │                     └ GIF, AVIF, TIFF …  ─Pillow→ PPM ┘   decode → pad → resize → normalise
             └ not an image, cut off, too large → a reason instead of pixels

`pad` (`--image-aspect-ratio pad`) is `expand2square` of LLaVA's `llava/mm_utils.py`: the image is centred on a square
of the mean colour, then CLIP's processor resizes it (bicubic) to S x S. `square` is CLIP's processor alone: the
shortest edge is resized to S, then the centre S x S is cut out. Neither ever stretches an image. Both end in
`(level / 255 - mean) / std`. EXIF orientation is ignored, as Pillow's `open` does.

An image's pixels depend on its bytes alone, not on the batch it comes in, its place there or the number of threads.
DALI and Pillow decode to the same levels but round differently in the resize: they agree within a few of 255 levels.

The only file that imports DALI; without it everything still works through Pillow.
"""

import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.data.store import UnusableImage

MAX_DALI_BATCH = 32
"""Images that go through the DALI graph at once; it keeps buffers for as many of the largest images it has seen."""

_DALI_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "MPO": ("RGB", "L", "CMYK"),  # JPEGs with a second picture behind them
    "PNG": ("RGB", "RGBA", "P", "L", "LA", "1"),
    "WEBP": ("RGB", "RGBA"),
}
"""Formats and Pillow modes that DALI decodes to Pillow's very levels (tests/data/test_images.py)."""

_OTHER_FORMATS = ("GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats left to Pillow. A list, since some that Pillow knows start other programs (EPS) or make no sense here."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""A marker in entropy-coded data, where 0xff is followed by 0 (stuffing) or D0-D7 (restart) otherwise."""


def dali_is_installed() -> bool:
    """Whether `nvidia.dali` can be imported; tries it."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):  # OSError: a wheel for another system's libraries
        return False
    return True


def resolve_backend(backend: Literal["auto", "dali", "pillow"]) -> Literal["dali", "pillow"]:
    """What `--image-backend` means on this machine. Raises ValueError when DALI is asked for and absent."""
    if backend == "pillow":
        return "pillow"
    if backend not in ("auto", "dali"):
        raise ValueError(f"--image-backend {backend!r} is unknown; it is auto, dali or pillow")
    if dali_is_installed():
        return "dali"
    if backend == "auto":
        return "pillow"
    raise ValueError(
        "--image-backend dali needs NVIDIA DALI, which cannot be imported here: "
        "pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120), or use --image-backend pillow"
    )


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """Pixels of n image files, in their order."""

    pixel_values: Tensor
    """float32 [n, 3, S, S]: normalised pixels on the host; zeros for an unusable image."""
    reasons: list[str | None]
    """[n]: why an image is unusable, in one line, or None."""


@dataclass(frozen=True)
class _ImageFile:
    """An image file that looks whole."""

    data: bytes
    width: int
    height: int
    format: str
    for_dali: bool
    """Whether DALI may decode `data` as it stands."""


def square_window(width: int, height: int) -> tuple[int, int, int, int]:
    """`expand2square`'s square in pixels of the image: (top, left, side, side), top and left ≤ 0.

    640 x 480 gives (-80, 0, 640, 640). With an odd difference the extra row is the lower (right) one.
    """
    side = max(width, height)
    return -((side - height) // 2), -((side - width) // 2), side, side


def centre_region(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The part of the image that "shortest edge to `size`, then centre crop" shows: (top, left, bottom, right).

    In pixels of the unresized image. Resizing this region alone gives the same pixels and never builds the rest:
    a 1 x 4000 image is 1.3 million rows long once its shortest edge is 336.
    """
    short, long = min(width, height), max(width, height)
    resized = size * long // short  # rounded down, as CLIPImageProcessor does it
    scale = long / resized
    start = (resized - size) // 2
    along = start * scale, (start + size) * scale
    if width >= height:
        return 0.0, along[0], float(height), along[1]
    return along[0], 0.0, along[1], float(width)


class ImageDecoder:
    """Decodes, pads or crops, resizes and normalises batches of image files.

    Args:
        config: size S, mean and std of the vision tower's processor.
        aspect_ratio: `pad` or `square`, see the module's description.
        backend: what `resolve_backend` returned.
        device: `cpu`, or `mixed`, where DALI's graph decodes JPEGs and works on the GPU `device_id`.
        num_threads: threads that decode.
        max_image_pixels: images with more pixels, or more when padded to a square, are refused undecoded.
        device_id: CUDA device of `mixed`.

    One thread at a time may call `decode`.
    """

    def __init__(
        self,
        config: ImageConfig,
        *,
        aspect_ratio: Literal["pad", "square"],
        backend: Literal["dali", "pillow"],
        device: Literal["cpu", "mixed"] = "cpu",
        num_threads: int = 2,
        max_image_pixels: int = 178_956_970,
        device_id: int | None = None,
    ) -> None:
        if aspect_ratio not in ("pad", "square"):
            raise ValueError(f"--image-aspect-ratio {aspect_ratio!r} is unknown; it is pad or square")
        if device == "mixed" and backend != "dali":
            raise ValueError(f"decoding images on the GPU needs DALI, but the image backend is {backend}")
        if device == "mixed" and device_id is None:
            raise ValueError("decoding images on the GPU needs the number of the CUDA device")
        resolve_backend(backend)
        self.config = config
        self.aspect_ratio = aspect_ratio
        self.backend = backend
        self.device = device
        self.num_threads = max(1, num_threads)
        self.max_image_pixels = max_image_pixels
        self.device_id = device_id if device == "mixed" else None
        self.fill = tuple(int(mean * 255) for mean in config.mean)
        # Pillow's own limit is per process; ours, checked below, is the one that counts.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_image_pixels)
        Image.init()
        self._formats = [name for name in (*_DALI_MODES, *_OTHER_FORMATS) if name in Image.OPEN and name != "MPO"]
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="image-decoder")
        self._pipeline: Any = None
        if backend == "dali":
            self._build_pipeline()

    def decode(self, images: Sequence[bytes]) -> DecodedImages:
        """Normalised pixels of each of `images` (whole files), and a reason where there are none."""
        size = self.config.size
        pixel_values = torch.zeros(len(images), 3, size, size)
        prepare = self._prepare_for_dali if self.backend == "dali" else self._pixels_by_pillow
        prepared = list(self._threads.map(partial(_or_reason, prepare), images))
        reasons: list[str | None] = [str(item) if isinstance(item, UnusableImage) else None for item in prepared]
        good = [index for index, reason in enumerate(reasons) if reason is None]
        if self.backend == "pillow":
            for index in good:
                pixel_values[index] = prepared[index]
            return DecodedImages(pixel_values=pixel_values, reasons=reasons)
        for start in range(0, len(good), MAX_DALI_BATCH):
            chunk = good[start : start + MAX_DALI_BATCH]
            for index, item in zip(chunk, self._pixels_by_dali([prepared[i] for i in chunk]), strict=True):
                if isinstance(item, UnusableImage):
                    reasons[index] = str(item)
                else:
                    pixel_values[index] = item
        return DecodedImages(pixel_values=pixel_values, reasons=reasons)

    def measure(self, data: bytes, *, decode: bool) -> tuple[int, int]:
        """Width and height of an image file, and with `decode` the certainty that all of it can be decoded.

        Any thread may call it. Raises UnusableImage where `decode` would give a reason.
        """
        file = self._inspect(data)
        if decode:
            self._load(file)
        return file.width, file.height

    def close(self) -> None:
        """Ends the threads and frees DALI's buffers."""
        self._threads.shutdown(cancel_futures=True)
        self._pipeline = None

    # ---- what both ways share

    def _inspect(self, data: bytes) -> _ImageFile:
        """Format and size from the header. Raises UnusableImage for what is no image, or too large a one."""
        if not data:
            raise UnusableImage("the file is empty")
        try:
            with self._open(data) as image:
                width, height, format, mode = *image.size, image.format, image.mode
        except Exception as error:  # Pillow's readers raise many kinds on broken headers
            if isinstance(error, Image.UnidentifiedImageError):
                raise UnusableImage(f"not an image in a known format: it starts with {data[:12]!r}") from None
            raise UnusableImage(_one_line(f"not a readable image: {error}")) from None
        if width < 1 or height < 1:
            raise UnusableImage(f"an image of {width} x {height} pixels")
        if width * height > self.max_image_pixels:
            raise UnusableImage(f"{width} x {height} pixels are more than --max-image-pixels {self.max_image_pixels}")
        side = max(width, height)
        if self.aspect_ratio == "pad" and side * side > self.max_image_pixels:
            raise UnusableImage(
                f"{width} x {height} pixels, padded to a square, are more than --max-image-pixels "
                f"{self.max_image_pixels}"
            )
        deep_png = format == "PNG" and data[24] == 16  # bits a sample; Pillow and DALI shorten them differently
        return _ImageFile(data, width, height, format, mode in _DALI_MODES.get(format, ()) and not deep_png)

    def _open(self, data: bytes) -> Image.Image:
        """Pillow's image, of which only the header has been read."""
        return Image.open(io.BytesIO(data), formats=self._formats)

    def _load(self, file: _ImageFile) -> Image.Image:
        """The whole image as RGB levels, by Pillow. Raises UnusableImage when it does not decode."""
        try:
            with self._open(file.data) as image:
                return image.convert("RGB")
        except Exception as error:  # as in _inspect
            what = "does not decode" if _ends_properly(file) else "is cut off, its end marker is missing"
            raise UnusableImage(_one_line(f"the {file.format} file {what}: {error}")) from None

    # ---- Pillow

    def _pixels_by_pillow(self, data: bytes) -> Tensor:
        """float32 [3, S, S] by the steps of LLaVA-1.5's own preprocessing."""
        file = self._inspect(data)
        image, size = self._load(file), self.config.size
        if self.aspect_ratio == "pad":
            top, left, side, _ = square_window(*image.size)
            if image.width != image.height:
                square = Image.new("RGB", (side, side), self.fill)
                square.paste(image, (-left, -top))
                image = square
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            image = self._shortest_edge_and_crop(image)
        levels = torch.from_numpy(np.array(image))
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return ((levels / 255 - mean) / std).permute(2, 0, 1)

    def _shortest_edge_and_crop(self, image: Image.Image) -> Image.Image:
        """CLIP's processor: shortest edge to S, then the centre S x S."""
        size = self.config.size
        short, long = min(image.size), max(image.size)
        resized = size * long // short
        if size * resized > self.max_image_pixels:  # the same picture without its far ends, within 2 levels
            top, left, bottom, right = centre_region(*image.size, size)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        wide = image.width >= image.height
        image = image.resize((resized, size) if wide else (size, resized), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    # ---- DALI

    def _prepare_for_dali(self, data: bytes) -> _ImageFile:
        """The file itself where DALI decodes it as Pillow does, else its levels as a PPM file."""
        file = self._inspect(data)
        if file.for_dali and _ends_properly(file):
            return file
        return self._as_ppm(file)  # Pillow decides about files without an end marker: some are whole but for it

    def _as_ppm(self, file: _ImageFile) -> _ImageFile:
        image = self._load(file)
        data = b"P6 %d %d 255\n" % image.size + image.tobytes()
        return _ImageFile(data, image.width, image.height, "PPM", for_dali=True)

    def _pixels_by_dali(self, files: list[_ImageFile]) -> list[Tensor | UnusableImage]:
        """float32 [3, S, S] of each of at most MAX_DALI_BATCH files, or why there is none.

        DALI does not say which image of a batch it failed on, and its pipeline is unusable afterwards: the batch is
        then repeated one by one on a new one, and what fails again goes in as the levels that Pillow reads.
        """
        try:
            return list(self._run_pipeline(files))
        except RuntimeError:
            self._build_pipeline()
        if len(files) > 1:
            return [self._pixels_by_dali([file])[0] for file in files]
        try:
            return list(self._run_pipeline([self._as_ppm(files[0])]))
        except UnusableImage as error:
            return [error]

    def _run_pipeline(self, files: list[_ImageFile]) -> Tensor:
        """float32 [n, 3, S, S]. Raises RuntimeError, and then needs a new pipeline, when DALI cannot decode a file."""
        pad = self.aspect_ratio == "pad"
        frames = [
            np.array(
                square_window(file.width, file.height)
                if pad
                else centre_region(file.width, file.height, self.config.size),
                dtype=np.int32 if pad else np.float32,
            )
            for file in files
        ]
        self._pipeline.feed_input("files", [np.frombuffer(file.data, dtype=np.uint8) for file in files])
        self._pipeline.feed_input("frames", frames)
        (pixels,) = self._pipeline.run()
        return torch.from_numpy(pixels.as_cpu().as_array())  # a copy: DALI reuses its own buffers in the next run

    def _build_pipeline(self) -> None:
        """DALI's graph; the same definition runs on the CPU and, decoding on the GPU, as `mixed`."""
        from nvidia.dali import Pipeline, fn, types

        size, pad = self.config.size, self.aspect_ratio == "pad"
        bicubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "subpixel_scale": False, "size": [size, size]}
        self._pipeline = None  # frees the buffers of the old one first
        pipeline = Pipeline(
            batch_size=MAX_DALI_BATCH,
            num_threads=self.num_threads,
            device_id=self.device_id,
            prefetch_queue_depth=1,  # reading ahead is the loader's business
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32 if pad else types.FLOAT, ndim=1)
            images = fn.decoders.image(
                files,
                device=self.device,
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # libjpeg's chroma upsampling on the GPU too
            )
            if pad:
                images = fn.slice(
                    images,
                    start=frames[0:2],
                    shape=frames[2:4],
                    axes=(0, 1),
                    out_of_bounds_policy="pad",
                    fill_values=[float(level) for level in self.fill],
                )
                images = fn.resize(images, **bicubic)
            else:
                images = fn.resize(images, roi_start=frames[0:2], roi_end=frames[2:4], **bicubic)
            pixels = fn.crop_mirror_normalize(
                images,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * mean for mean in self.config.mean],
                std=[255 * std for std in self.config.std],
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        self._pipeline = pipeline


def _or_reason(function: Callable[[bytes], Any], data: bytes) -> Any:
    """`function(data)`, or the UnusableImage that it raises."""
    try:
        return function(data)
    except UnusableImage as error:
        return error


def _one_line(text: str) -> str:
    """`text` without line breaks, at most 200 characters."""
    return " ".join(text.split())[:200]


def _ends_properly(file: _ImageFile) -> bool:
    """Whether the file reaches its format's end marker; True for formats that have none we look for."""
    if file.format in ("JPEG", "MPO"):
        return _jpeg_ends(file.data)
    if file.format == "PNG":
        return b"IEND\xaeB`\x82" in file.data[-4096:]  # some programs write a little behind it
    if file.format == "WEBP":
        return len(file.data) >= 8 + int.from_bytes(file.data[4:8], "little")
    return True


def _jpeg_ends(data: bytes) -> bool:
    """Whether a JPEG has its end-of-image marker.

    Walks the segments, because an EXIF thumbnail carries an end-of-image marker of its own, and looks no further than
    the first one at this level, because some cameras write on behind it.
    """
    position = 2  # behind the start-of-image marker
    while match := _JPEG_MARKER.search(data, position):
        marker = data[match.end() - 1]
        if marker == 0xD9:
            return True
        length = 0 if marker == 0x01 else int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + length
    return False
