"""From image files to normalised pixels, the way LLaVA-1.5 does it, by NVIDIA DALI or by Pillow.

    bytes ─inspect─→ size, format ─┬ JPEG, PNG, WebP ────── DALI ─┬→ levels ─pad→ square ─resize, normalise→ [3, S, S]
             │                     └ GIF, AVIF, TIFF …  ─ Pillow ─┘
             └ not an image, cut off, too large → a reason instead of pixels

`pad` (`--image-aspect-ratio pad`) is `expand2square` of LLaVA's `llava/mm_utils.py`: the image is centred on a square
of the mean colour, then CLIP's processor resizes it (bicubic) to S x S. `square` is CLIP's processor alone: the
shortest edge is resized to S, then the centre S x S is cut out. Neither ever stretches an image. Where the tower's
processor resizes to more than it cuts out (DINOv2: 256 and 224), both do. `stretch` resizes both edges to S whatever
their ratio: the processors of BLIP-2, MiniGPT-4 and SigLIP. A picture in tiles (`config.tiles`) gives several squares:
itself, stretched, and those of S x S that a grid cuts it into when it is resized into the grid that fits it best, the
rest black: the processors of LLaVA-NeXT and of LLaVA-OneVision, which pads an image among several as `pad` does. All
end in `(level / 255 - mean) / std`. As in LLaVA, which decodes by Pillow's `open` and `convert`, a picture's EXIF
orientation is ignored and its transparency dropped, unless `--image-orientation` and `--image-transparency` say
otherwise.

DALI and Pillow decode to the same levels. The back end `pillow` resizes by Pillow too, as LLaVA did; `dali` by torch's
kernel for uint8, which takes a quarter of the time and differs from Pillow's by 2 of 255 levels at most, by 5 where it
enlarges noise. Decoding on the GPU (`mixed`) DALI resizes, and differs by 2 too, but for the outermost pixels of an
image that is enlarged: there Pillow cuts the filter off at the border, and DALI repeats the border, which is 5 levels
in photographs and 16 at worst.

What no decoder can tell. PNG has checksums, which are checked; the other formats have none (lossless WebP, zlib-packed
TIFF and APNG apart). A cut file of any format is refused, and so is a JPEG whose markers, tables or headers are broken.
But a flipped bit in the coded data of a JPEG, WebP or GIF, or in the levels of a BMP or TIFF, mostly decodes without
complaint to a picture that is wrong from there on, in every library; so does a JPEG that lost a piece of its middle.
Of small JPEGs with one flipped bit a tenth is refused, and three fifths look different and pass.

An image's pixels depend on its bytes alone, not on the batch it comes in, its place there or the number of threads.
"""

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hacl_megatron.config.architecture import ImageConfig
from hacl_megatron.config.flags import MAX_IMAGE_PIXELS
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.dali import HOST_BATCH, Frame, Graph, dali_is_installed, host_graph, mixed_graph
from hacl_megatron.data.image_levels import ImageFile, ImageReader, Orientation, Transparency, is_nearly_constant
from hacl_megatron.data.store import UnusableImage

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""Pillow's, by the names of `ImageConfig.interpolation`, which are torch's."""


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
    """float32 [views of all images, 3, S, S]: normalised pixels on the host; zeros for an unusable image. An image in
    tiles has the view of the whole picture first, then its tiles, row by row; any other has one view."""
    first_views: list[int]
    """[n + 1]: where each image's views begin, and the number of all views. An unusable image has as many as its size
    asks for, or one where its header tells no usable size."""
    reasons: list[str | None]
    """[n]: why an image is unusable, in one line, or None."""


def square_window(width: int, height: int) -> tuple[int, int, int, int]:
    """`expand2square`'s square in pixels of the image: (top, left, side, side), top and left ≤ 0.

    640 x 480 gives (-80, 0, 640, 640). With an odd difference the extra row is the lower (right) one.
    """
    side = max(width, height)
    return -((side - height) // 2), -((side - width) // 2), side, side


def centre_region(width: int, height: int, size: int, shortest: int) -> tuple[float, float, float, float]:
    """The part of the image that "shortest edge to `shortest`, then centre crop to `size`" shows.

    (top, left, bottom, right) in pixels of the unresized image. Resizing this region alone gives the same pixels and
    never builds the rest: a 1 x 4000 image is 1.3 million rows long once its shortest edge is 336.
    """
    edges = []
    for edge in (height, width):
        resized = shortest * edge // min(width, height)  # rounded down, as CLIPImageProcessor does it
        start = (resized - size) // 2
        edges.append((start * edge / resized, (start + size) * edge / resized))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


class ImageDecoder:
    """Decodes, pads or crops, resizes and normalises batches of image files.

    Args:
        config: size S, mean, std and interpolation of the vision tower's processor.
        aspect_ratio: `pad`, `square` or `stretch`, see the module's description.
        backend: what `resolve_backend` returned.
        device: `cpu`, or `mixed`, where DALI's graph decodes JPEGs and works on the GPU `device_id`.
        num_threads: threads that decode.
        max_image_pixels: images with more pixels, or more when padded to a square, are refused undecoded.
        transparency, orientation: see `ImageReader`; what is seen through shows `pad`'s colour.
        device_id: CUDA device of `mixed`.
        layout: of a model whose images become tiles. `aspect_ratio` then has no meaning.

    One thread at a time may call `decode`.
    """

    def __init__(
        self,
        config: ImageConfig,
        *,
        aspect_ratio: Literal["pad", "square", "stretch"],
        backend: Literal["dali", "pillow"],
        device: Literal["cpu", "mixed"] = "cpu",
        num_threads: int = 2,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        transparency: Transparency = "drop",
        orientation: Orientation = "ignore",
        device_id: int | None = None,
        layout: ImageLayout | None = None,
    ) -> None:
        if aspect_ratio not in ("pad", "square", "stretch"):
            raise ValueError(f"--image-aspect-ratio {aspect_ratio!r} is unknown; it is pad, square or stretch")
        if device == "mixed" and backend != "dali":
            raise ValueError(f"decoding images on the GPU needs DALI, but the image backend is {backend}")
        if device == "mixed" and device_id is None:
            raise ValueError("decoding images on the GPU needs the number of the CUDA device")
        resolve_backend(backend)
        self.config = config
        self.layout = layout if layout is not None and layout.tiles is not None else None
        if self.layout is not None:
            assert config.size == config.resized == self.layout.view_size, "tiles are cut without a margin"
            aspect_ratio = "pad"  # of what is not cut
        self.aspect_ratio = aspect_ratio
        self.backend = backend
        self.device = device
        self.num_threads = max(1, num_threads)
        self.max_image_pixels = max_image_pixels
        self.device_id = device_id if device == "mixed" else None
        self.fill = tuple(min(max(int(mean * 255), 0), 255) for mean in config.mean)
        mean, std = (np.array(value, dtype=np.float64).reshape(3, 1, 1) for value in (config.mean, config.std))
        self._scale, self._shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        self.reader = ImageReader(
            max_image_pixels=max_image_pixels,
            padded=aspect_ratio == "pad",
            transparency=transparency,
            orientation=orientation,
            fill=self.fill,
        )
        self._resample = INTERPOLATIONS[config.interpolation]
        self._one_large = threading.Lock()
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="image-decoder")
        self._graphs = self._make_graphs()
        self._free_graphs: queue.SimpleQueue[Graph] = queue.SimpleQueue()
        for graph in self._graphs:
            self._free_graphs.put(graph)

    @classmethod
    def of(cls, config: RunConfig, *, device: Literal["cpu", "mixed"] = "cpu") -> "ImageDecoder":
        """As a run of this configuration decodes.

        Args:
            device: `mixed` lets DALI, where it is the back end, decode on the current CUDA device.

        Raises:
            ValueError: `mixed` without a CUDA device, or a back end that is not here.
        """
        data, backend = config.data, resolve_backend(config.data.image_backend)
        if backend == "pillow":
            device = "cpu"
        if device == "mixed" and not torch.cuda.is_available():
            raise ValueError("decoding images on the GPU needs a CUDA device, and there is none; decode on the CPU")
        return cls(
            config.architecture.image,
            aspect_ratio=data.image_aspect_ratio,
            backend=backend,
            device=device,
            num_threads=data.num_workers,
            max_image_pixels=data.max_image_pixels,
            transparency=data.image_transparency,
            orientation=data.image_orientation,
            device_id=torch.cuda.current_device() if device == "mixed" else None,
            layout=config.architecture.image_layout,
        )

    def _make_graphs(self) -> list[Graph]:
        """A graph for each thread, or one for the GPU; none without DALI."""
        fill = self.fill if self.aspect_ratio == "pad" else None
        if self.backend == "pillow":
            return []
        if self.device == "cpu":
            return [host_graph() for _ in range(self.num_threads)]
        tiles = self.layout is not None
        return [
            mixed_graph(self.config, fill=fill, num_threads=self.num_threads, device_id=self.device_id, tiles=tiles)
        ]

    def decode(self, images: Sequence[bytes], alone: Sequence[bool] | None = None) -> DecodedImages:
        """Normalised pixels of each of `images` (whole files), and a reason where there are none.

        Args:
            alone: of each, whether it is the only image of its record; default: all are.
        """
        in_tiles = [self._in_tiles(only) for only in (alone if alone is not None else [True] * len(images))]
        num_views = [self._num_views(data) if cut else 1 for data, cut in zip(images, in_tiles, strict=True)]
        first_views = [0, *accumulate(num_views)]
        size = self.config.size
        pixel_values = torch.empty(first_views[-1], 3, size, size)
        views = pixel_values.numpy()
        work = [
            _Work(data, cut, views[start:end])
            for data, cut, start, end in zip(images, in_tiles, first_views, first_views[1:], strict=False)
        ]
        at_once = self._graphs[0].batch_size if self._graphs else HOST_BATCH
        parts = [work[start : start + at_once] for start in range(0, len(work), at_once)]
        reasons = [reason for part in self._threads.map(self._decode_part, parts) for reason in part]
        return DecodedImages(pixel_values=pixel_values, first_views=first_views, reasons=reasons)

    def size_of(self, file: bytes | BinaryIO, *, alone: bool = True) -> tuple[int, int]:
        """(width, height) of an image as `decode` will show it, by its header alone. Any thread may call it.

        Args:
            file: the whole of it, or an open one at its start.
            alone: whether it is the only image of its record.

        Raises:
            UnusableImage: where the header shows what `decode` would give as a reason; the image then has one view.
        """
        opened = io.BytesIO(file) if isinstance(file, bytes) else file
        return self.reader.size_of(opened, in_tiles=self._in_tiles(alone))

    def measure(self, data: bytes, *, decode: bool) -> tuple[int, int, bool | None]:
        """Width and height of an image file, and with `decode` whether it is nearly of one colour, else None.

        Any thread may call it. Raises UnusableImage where `decode` would give a reason for an image alone.
        """
        file = self.reader.inspect(data, in_tiles=self._in_tiles(True))
        if not decode:
            return file.width, file.height, None
        with self._room_for(file):
            return file.width, file.height, is_nearly_constant(self.reader.levels(file))

    def close(self) -> None:
        """Ends the threads and frees DALI's buffers."""
        self._threads.shutdown(cancel_futures=True)
        self._graphs, self._free_graphs = [], queue.SimpleQueue()

    def _in_tiles(self, alone: bool) -> bool:
        return self.layout is not None and self.layout.has_tiles(alone=alone)

    def _num_views(self, data: bytes) -> int:
        """Of an image in tiles."""
        try:
            tall, wide = self.layout.cut(*self.size_of(data)).grid
        except UnusableImage:
            return 1
        return 1 + tall * wide

    def _decode_part(self, part: "Sequence[_Work]") -> list[str | None]:
        """One thread's work: fills the outputs; returns the reasons of unusable images."""
        reasons: list[str | None] = [None] * len(part)
        for_dali: dict[int, tuple[ImageFile, _Work]] = {}
        for index, work in enumerate(part):
            try:
                file = self.reader.inspect(work.data, in_tiles=work.in_tiles)
                if self._graphs and self._is_for_dali(file, work.in_tiles):
                    for_dali[index] = file, work
                else:
                    self._decode_by_pillow(file, work)
            except UnusableImage as error:
                reasons[index], work.output[...] = str(error), 0
        if for_dali:
            graph = self._free_graphs.get()
            try:
                failed = self._run_graph(graph, for_dali)
            finally:
                self._free_graphs.put(graph)
            for index, error in failed.items():
                reasons[index], part[index].output[...] = str(error), 0
        return reasons

    # ---- what both ways share

    def _decode_by_pillow(self, file: ImageFile, work: "_Work") -> None:
        """Fills the output from a file. Raises UnusableImage when it does not decode."""
        with self._room_for(file):
            levels = self.reader.levels(file)
            if work.in_tiles and levels.shape[:2] != (file.height, file.width):  # the packer counts by the header
                raise UnusableImage(
                    f"it decodes to {levels.shape[1]} x {levels.shape[0]} pixels, but its header tells "
                    f"{file.width} x {file.height}"
                )
            self._finish(levels, work)

    def _room_for(self, file: ImageFile) -> contextlib.AbstractContextManager[object]:
        """Held while a file is decoded: one large image at a time, whatever the number of threads."""
        return self._one_large if file.is_large else contextlib.nullcontext()

    def _finish(self, image: np.ndarray, work: "_Work") -> None:
        """Fills the output from levels, uint8 [H, W, 3]: resized, cut as the image is to be, normalised."""
        resize = partial(
            _resize_by_pillow if self.backend == "pillow" else _resize_by_torch, interpolation=self.config.interpolation
        )
        views = self._views(image, resize) if work.in_tiles else [self._resized(image, resize)]
        for levels, output in zip(views, work.output, strict=True):
            # numpy, since torch would start threads of its own for this in each of ours
            np.multiply(levels.transpose(2, 0, 1), self._scale, out=output)
            np.add(output, self._shift, out=output)

    def _views(self, image: np.ndarray, resize: "Resize") -> list[np.ndarray]:
        """uint8 [S, S, 3] of each view of a picture in tiles."""
        size = self.config.size
        height, width = image.shape[:2]
        cut = self.layout.cut(width, height)
        (tall, wide), (top, left), resized = cut.grid, cut.offset, cut.resized
        plane = np.zeros((tall * size, wide * size, 3), dtype=np.uint8)
        plane[top : top + resized[0], left : left + resized[1]] = self._stretched(image, *resized, resize)
        tiles = plane.reshape(tall, size, wide, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        return [self._stretched(image, size, size, resize), *tiles]

    def _stretched(self, image: np.ndarray, height: int, width: int, resize: "Resize") -> np.ndarray:
        """uint8 [height, width, 3]. Resizing goes through all rows in the new width, with the weights of all pixels of
        an edge; where that is too much, small boxes are averaged before, which moves levels by a few."""
        if image.shape[0] * width > self.max_image_pixels or max(image.shape) > self.max_image_pixels // 16:
            return np.asarray(Image.fromarray(image).resize((width, height), self._resample, reducing_gap=3.0))
        return resize(image, height, width)

    def _resized(self, image: np.ndarray, resize: "Resize") -> np.ndarray:
        """uint8 [S, S, 3], padded, cropped or stretched."""
        size = self.config.size
        height, width = image.shape[:2]
        if self.aspect_ratio == "stretch":
            return self._stretched(image, size, size, resize)
        if self.aspect_ratio == "pad" and height != width:
            top, left, side, _ = square_window(width, height)
            square = np.empty((side, side, 3), dtype=np.uint8)
            square[...] = self.fill
            square[-top : height - top, -left : width - left] = image
            image, height, width = square, side, side
        shortest = self.config.resized
        resized = [shortest * edge // min(height, width) for edge in (height, width)]
        if resized[0] * resized[1] > self.max_image_pixels:  # the same picture without its far ends, within 2 levels
            top, left, bottom, right = centre_region(width, height, size, shortest)
            box = (left, top, right, bottom)
            return np.asarray(Image.fromarray(image).resize((size, size), self._resample, box=box))
        top, left = ((edge - size) // 2 for edge in resized)
        return resize(image, *resized)[top : top + size, left : left + size]

    # ---- DALI

    def _run_graph(self, graph: Graph, files: "dict[int, tuple[ImageFile, _Work]]") -> dict[int, UnusableImage]:
        """Decodes files into their outputs, by their numbers; returns those that failed.

        DALI does not say which image of a batch it failed on: the batch is then repeated one by one, and what fails
        again goes to Pillow, which accepts it or has a reason.
        """
        frames = None if self.device == "cpu" else [self._frame(file, work.in_tiles) for file, work in files.values()]
        try:
            results = graph.run([file.data for file, _ in files.values()], frames)
        except RuntimeError:
            if len(files) > 1:
                return {k: e for i, f in files.items() for k, e in self._run_graph(graph, {i: f}).items()}
            ((index, (file, work)),) = files.items()
            try:
                self._decode_by_pillow(file, work)
            except UnusableImage as error:
                return {index: error}
            return {}
        for (_, work), (image, *planes) in zip(files.values(), results, strict=True):
            if image.dtype != np.float32:
                self._finish(image, work)
                continue
            work.output[0] = image  # finished on the GPU
            if work.in_tiles:
                size, (plane,) = self.config.size, planes
                tall, wide = plane.shape[1] // size, plane.shape[2] // size
                tiles = plane.reshape(3, tall, size, wide, size).transpose(1, 3, 0, 2, 4)
                work.output[1:].reshape(tall, wide, 3, size, size)[...] = tiles
        return {}

    def _is_for_dali(self, file: ImageFile, in_tiles: bool) -> bool:
        if self.device == "cpu":
            return file.for_dali
        # Its graph resizes the width of all rows first.
        width = max(self.config.size, self.layout.cut(file.width, file.height).resized[1] if in_tiles else 0)
        return file.for_dali and file.for_gpu and width * file.height <= self.max_image_pixels

    def _frame(self, file: ImageFile, in_tiles: bool) -> Frame:
        """What the graph for the GPU wants to know."""
        size, width, height = self.config.size, file.width, file.height
        if in_tiles:
            cut = self.layout.cut(width, height)
            return (0, 0, height, width, *cut.resized, *cut.offset, *(edge * size for edge in cut.grid))
        if self.aspect_ratio == "pad":
            no_plane = (size, size, 0, 0, 1, 1) if self.layout is not None else ()
            return (*square_window(width, height), *no_plane)
        if self.aspect_ratio == "stretch":
            return (0.0, 0.0, float(height), float(width), float(height))
        return (*centre_region(width, height, size, self.config.resized), float(height))


@dataclass(frozen=True, eq=False)
class _Work:
    """An image to decode."""

    data: bytes
    in_tiles: bool
    output: np.ndarray
    """float32 [views, 3, S, S] to fill."""


Resize = Callable[[np.ndarray, int, int], np.ndarray]
"""uint8 [H, W, 3], height, width → uint8 [height, width, 3], with antialiasing."""


def _resize_by_pillow(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))


def _resize_by_torch(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Its kernel for uint8 is Pillow-SIMD's: the same fixed-point arithmetic, rounded in another place."""
    channels_last = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(channels_last, size=(height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
