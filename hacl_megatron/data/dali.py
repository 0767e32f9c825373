"""The only file that imports NVIDIA DALI: its graphs, which turn image files into levels or, on the GPU, into pixels.

    host     JPEG … ─decode─→ uint8 [H, W, 3]                                                images.py does the rest
    mixed    JPEG … ─decode on the GPU─→ pad → resize → normalise ─→ float32 [3, S, S]       copied to the host
                           for tiles  └→ resize → pad → normalise ─→ float32 [3, grid]       likewise, and cut there

DALI's resize is for the GPU: on the CPU it takes three times as long as the decoding.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from hacl_megatron.config.architecture import ImageConfig

HOST_BATCH = 4
"""Images that go through a host graph at once; it keeps buffers for as many of the largest images it has seen."""
MIXED_BATCH = 32
"""The same of the mixed graph, where more at once keep the GPU busy."""
TILES_BATCH = 8
"""The same where pictures become tiles: LLaVA-OneVision's largest grid is 64 MB."""

Frame = tuple[float, ...]


def dali_is_installed() -> bool:
    """Whether `nvidia.dali` can be imported; tries it."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):  # OSError: a wheel for another system's libraries
        return False
    return True


class Graph:
    """A DALI pipeline over up to `batch_size` image files at a time. One thread at a time may run it.

    A pipeline that has failed is unusable, so that the next run builds a new one (16 ms).
    """

    def __init__(self, define: Callable[[Any, Any], Any], *, batch_size: int, num_threads: int, device_id: int | None):
        self.batch_size = batch_size
        self.num_failures = 0
        self._define, self._num_threads, self._device_id = define, num_threads, device_id
        self._pipeline: Any = None

    def run(self, files: Sequence[bytes], frames: Sequence[Frame] | None) -> list[tuple[np.ndarray, ...]]:
        """The graph's outputs for each file, valid until the next run.

        Args:
            frames: for each file what the graph's definition wants to know of it; None if it wants nothing.

        Raises:
            RuntimeError: a file does not decode. DALI does not say which.
        """
        if self._pipeline is None:
            self._pipeline = self._build(frames is not None)
        try:
            self._pipeline.feed_input("files", [np.frombuffer(data, dtype=np.uint8) for data in files])
            if frames is not None:
                self._pipeline.feed_input("frames", [np.array(frame, dtype=np.float32) for frame in frames])
            outputs = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            self.num_failures += 1
            raise
        outputs = [output.as_cpu() for output in outputs]
        return [tuple(np.asarray(output.at(index)) for output in outputs) for index in range(len(files))]

    def _build(self, with_frames: bool) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,  # reading ahead is the loader's business
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.FLOAT, ndim=1) if with_frames else None
            pipeline.set_outputs(*self._define(files, frames))
        pipeline.build()
        return pipeline


def host_graph() -> Graph:
    """uint8 [H, W, 3], the levels of the image, by one thread. Its frames are None."""
    return Graph(lambda files, frames: (_decoded(files, "cpu"),), batch_size=HOST_BATCH, num_threads=1, device_id=None)


def mixed_graph(
    config: ImageConfig,
    *,
    fill: tuple[int, ...] | None,
    num_threads: int,
    device_id: int | None,
    decoder: Literal["mixed", "cpu"] = "mixed",
    tiles: bool = False,
) -> Graph:
    """float32 [3, S, S], normalised; with `tiles`, which go with `fill`, a plane too, float32 [3, height, width].

    A frame is a part of its image: with `fill` (top, left, height, width), `fill` outside the image; else
    (top, left, bottom, right) in which borders may run through pixels, and the image's height. For the plane there
    follow (height, width) to resize the whole image to, (top, left) of it in the plane, else black, and the plane's
    (height, width).

    Each edge has a resize of its own, the width first: Pillow rounds to levels in between, and so cuts off what bicubic
    filters overshoot. Without that a picture of black and white pixels differs from Pillow's by 29 levels.

    Args:
        decoder: `cpu` makes the same graph for a machine without a GPU, where it is slow but can be looked at.
    """
    from nvidia.dali import fn, types

    size = config.size
    resizing = {
        "interp_type": {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[config.interpolation],
        "antialias": True,
        "subpixel_scale": False,
        "mode": "stretch",  # what is not named keeps its size
    }

    def define(files: Any, frames: Any) -> tuple[Any, ...]:
        images = _decoded(files, decoder)
        if fill is None:
            top, left, bottom, right, height = (frames[index : index + 1] for index in range(5))
            zero = 0 * top
            of_width = {"roi_start": fn.cat(zero, left), "roi_end": fn.cat(height, right)}
            of_height = {"roi_start": fn.cat(top, zero), "roi_end": fn.cat(bottom, zero + float(size))}
            view = images
        else:
            of_width = of_height = {}
            if config.resized > size:
                start = (config.resized - size) // 2 / config.resized
                end = start + size / config.resized
                of_width = {"roi_start": [0.0, start], "roi_end": [1.0, end], "roi_relative": True}
                of_height = {"roi_start": [start, 0.0], "roi_end": [end, 1.0], "roi_relative": True}
            view = window(images, frames[0:2], frames[2:4], fill)
        view = fn.resize(view, resize_x=float(size), **of_width, **resizing)
        view = normalised(fn.resize(view, resize_y=float(size), **of_height, **resizing))
        if not tiles:
            return (view,)
        plane = fn.resize(fn.resize(images, resize_x=frames[5], **resizing), resize_y=frames[4], **resizing)
        return view, normalised(window(plane, -frames[6:8], frames[8:10], (0, 0, 0)))

    def window(images: Any, start: Any, shape: Any, outside: tuple[int, ...]) -> Any:
        return fn.slice(
            images,
            start=fn.cast(start, dtype=types.INT32),
            shape=fn.cast(shape, dtype=types.INT32),
            axes=(0, 1),
            out_of_bounds_policy="pad",
            fill_values=[float(level) for level in outside],
        )

    def normalised(images: Any) -> Any:
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
        )

    batch_size = TILES_BATCH if tiles else MIXED_BATCH
    return Graph(define, batch_size=batch_size, num_threads=num_threads, device_id=device_id)


def _decoded(files: Any, device: str) -> Any:
    from nvidia.dali import fn, types

    return fn.decoders.image(
        files,
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # libjpeg's chroma upsampling on the GPU too
    )
