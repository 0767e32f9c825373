"""Reads optimiser steps ahead in a background thread: from sample ids to packed micro-batches.

    Sampler ─ids→ split_for_rank ─┬ Manifest ─→ encode ───────────────┐
                                  └ ReadAhead ──bytes→ ImageDecoder ──┴→ pack ─→ StepBatches ─queue→ next(loader)
             (threads: `io_threads` read files, `num_workers` decode; one draws, encodes and packs)

A sample that cannot be used leaves an empty slot in its micro-batch and a `BadSample` with the step; nothing else
of the step changes. The sampler's state travels with its step, so a checkpoint never sees what was read ahead.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hacl_megatron.batch import BadSample, StepBatches
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.data.conversation import EncodedSample, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.images import ImageDecoder, resolve_backend
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.packing import PackSlot, pack
from hacl_megatron.data.read_ahead import ReadAhead
from hacl_megatron.data.sampler import Sampler, split_for_rank
from hacl_megatron.data.store import ImageStore, UnusableImage
from hacl_megatron.data.tokenizer import Tokenizer

CLOSE_TIMEOUT_S = 30
"""How long `close` waits for a read or decode in progress; a thread that hangs longer dies with the process."""


@dataclass
class _Drawn:
    """One sample of a step on its way into a slot."""

    sample_id: int
    sample: Sample
    file: "Future[tuple[bytes, int]] | None"
    """The image's bytes and key, being read; None for a text-only sample."""
    encoded: EncodedSample | None = None
    image_key: int | None = None
    bad: BadSample | None = None

    def refuse(self, source: str, error: object) -> None:
        """Makes it a bad sample: an empty slot, and a record of why."""
        self.encoded = self.image_key = None
        self.bad = BadSample(sample_id=self.sample_id, name=self.sample.name, source=source, reason=str(error))


class StepMaker:
    """Makes one `StepBatches` after another, for one data-parallel rank; `StepLoader` runs it in its thread.

    Args:
        manifests: the ordinary samples, then the contrastive ones; the sampler's ids count through both.
        sampler: what is drawn, at which global batch size.
        pad_multiple: every pack's number of rows is a multiple of it.
        io_threads: threads that read files, this step's and the next one's.

    Raises ValueError when the global batch does not divide into the ranks' micro-batches.
    """

    def __init__(
        self,
        *,
        manifests: Sequence[Manifest],
        sampler: Sampler,
        store: ImageStore,
        decoder: ImageDecoder,
        tokenizer: Tokenizer,
        settings: EncodingSettings,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        pad_multiple: int,
        io_threads: int,
    ) -> None:
        self.sampler = sampler
        self.store = store
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.settings = settings
        self.pad_multiple = pad_multiple
        self._split = {
            "micro_batch_size": micro_batch_size,
            "data_parallel_rank": data_parallel_rank,
            "data_parallel_size": data_parallel_size,
        }
        split_for_rank(range(sampler.global_batch_size), **self._split)  # complain now, not in the thread
        self._files = ReadAhead(manifests, store, io_threads)

    def make(self) -> StepBatches:
        """The next step's micro-batches on this rank."""
        global_batch = self.sampler.next_batch()
        data_state = self.sampler.state_dict()
        self._files.want([*self._mine(global_batch), *self._mine(self.sampler.peek(len(global_batch)))])
        micro_batches = [
            [self._draw(sample_id) for _, sample_id in micro_batch]
            for micro_batch in split_for_rank(global_batch, **self._split)
        ]
        step = [drawn for micro_batch in micro_batches for drawn in micro_batch]
        for drawn in step:  # while the readers read
            try:
                drawn.encoded = encode(drawn.sample, self.tokenizer, self.settings)
            except UnusableSample as error:
                drawn.refuse(drawn.sample.source, error)
        pixels = self._decode(step)
        return StepBatches(
            micro_batches=[self._pack(micro_batch, *pixels) for micro_batch in micro_batches],
            data_state=data_state,
            bad_samples=[drawn.bad for drawn in step if drawn.bad],
            num_tokenization_mismatches=sum(drawn.encoded.tokenization_mismatch for drawn in step if drawn.encoded),
            num_truncated=sum(drawn.encoded.truncated for drawn in step if drawn.encoded),
        )

    def close(self) -> None:
        """Ends the threads. No `make` may be under way."""
        self.cancel()
        self.decoder.close()

    def cancel(self) -> None:
        """Makes a `make` that is under way in another thread fail soon."""
        self._files.cancel()

    def _mine(self, global_batch: Sequence[tuple[int, int]]) -> list[int]:
        """The sample ids that this rank takes of a global batch, in the order it draws them."""
        return [sample_id for batch in split_for_rank(global_batch, **self._split) for _, sample_id in batch]

    def _draw(self, sample_id: int) -> _Drawn:
        return _Drawn(sample_id, *self._files.take(sample_id))

    def _decode(self, step: list[_Drawn]) -> tuple[torch.Tensor, dict[int, int]]:
        """float32 [I, 3, S, S], each distinct image of the step once, and the place of each image's key in it."""
        files: dict[int, bytes] = {}
        users: dict[int, list[_Drawn]] = {}
        for drawn in step:
            if drawn.file is None or drawn.bad:
                continue
            try:
                data, drawn.image_key = drawn.file.result()
            except UnusableImage as error:
                drawn.refuse(self._source(drawn), error)
                continue
            files[drawn.image_key] = data
            users.setdefault(drawn.image_key, []).append(drawn)
        decoded = self.decoder.decode(list(files.values()))
        for key, reason in zip(files, decoded.reasons, strict=True):
            if reason is not None:
                for drawn in users[key]:
                    drawn.refuse(self._source(drawn), reason)
        return decoded.pixel_values, {key: place for place, key in enumerate(files)}

    def _source(self, drawn: _Drawn) -> str:
        return self.store.source(drawn.sample.image, drawn.sample.stored)

    def _pack(self, micro_batch: list[_Drawn], pixel_values: torch.Tensor, places: dict[int, int]) -> Any:
        slots = [
            PackSlot(sample_id=drawn.sample_id, encoded=drawn.encoded, image_key=drawn.image_key)
            for drawn in micro_batch
        ]
        chosen = torch.tensor([places[s.image_key] for s in slots if s.image_key is not None], dtype=torch.int64)
        return pack(
            slots,
            pixel_values[chosen],
            visual_tokens=self.settings.visual_tokens,
            pad_multiple=self.pad_multiple,
        )


class StepLoader(Iterator[StepBatches]):
    """Endless iterator over steps that a thread prepares ahead, at most `prefetch_steps` of them.

    An exception of the thread is raised by `next`, with the thread's traceback, after the steps made before it.
    Use it as a context manager or call `close`; a forgotten loader is closed when it is collected or at exit.

    Args:
        make: returns the next step; called in the thread alone.
        close: frees what `make` uses, once the thread has ended.
        cancel: makes a call of `make` that is under way end soon.
        prefetch_steps: steps kept ready, at least 1.
        num_samples: samples of one epoch, the contrastive ones included.
    """

    def __init__(
        self,
        make: Callable[[], StepBatches],
        *,
        prefetch_steps: int,
        num_samples: int,
        cancel: Callable[[], None] = lambda: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        if prefetch_steps < 1:
            raise ValueError(f"--prefetch-steps is {prefetch_steps}, expected at least 1")
        self.num_samples = num_samples
        self.wait_seconds = 0.0
        """Time that `next` has waited for the thread, in all."""
        self._ready: queue.SimpleQueue[StepBatches | BaseException | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(prefetch_steps)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # The thread and the finalizer hold no reference to the loader, so that a forgotten one can be collected. A
        # daemon thread, since others are waited for at exit *before* anything has told them to stop.
        self._thread = threading.Thread(
            target=_read_ahead, args=(make, self._ready, self._free, self._stop), name="step-loader", daemon=True
        )
        self.close = weakref.finalize(self, _end, self._thread, self._ready, self._free, self._stop, cancel, close)
        """Ends the thread. May be called from any thread, and again."""
        self._thread.start()

    def __next__(self) -> StepBatches:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if item is None:  # closed while we waited
            raise StopIteration
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self._free.release()
        return item

    def __enter__(self) -> "StepLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read_ahead(
    make: Callable[[], StepBatches], ready: queue.SimpleQueue, free: threading.Semaphore, stop: threading.Event
) -> None:
    """The thread: a step into `ready` for every place `free`, until told to stop or something fails."""
    while True:
        free.acquire()
        if stop.is_set():
            return
        try:
            step = make()
        except BaseException as error:
            if not stop.is_set():  # else it is what `cancel` caused
                ready.put(error)
            return
        ready.put(step)


def _end(
    thread: threading.Thread,
    ready: queue.SimpleQueue,
    free: threading.Semaphore,
    stop: threading.Event,
    cancel: Callable[[], None],
    close: Callable[[], None],
) -> None:
    stop.set()
    free.release()  # the thread may wait for a place,
    ready.put(None)  # a consumer for a step
    cancel()
    if thread is not threading.current_thread():  # which may be what collects a forgotten loader
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive():
            return  # it still uses what `close` would free
    close()


def build_loader(
    *,
    data_paths: Sequence[str],
    contrastive_paths: Sequence[str],
    data: DataFlags,
    model: ModelConfig,
    tokenizer: Tokenizer,
    image_context: Literal["image", "prompt"],
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    pad_multiple: int,
    shuffle: bool = True,
    data_state: dict[str, Any] | None = None,
    decode_device: Literal["cpu", "mixed"] = "cpu",
) -> StepLoader:
    """The loader of one data-parallel rank over LLaVA JSON files or prepared folders, going on from `data_state`.

    Mixture, groups and blocks of `data` hold where samples are shuffled: validation reads the files in their order.
    `decode_device="mixed"` lets DALI, where it is the back end, decode on the current CUDA device; pixels come back to
    the host all the same.
    Raises ValueError for whatever is wrong with files, folder, sizes, state or back end, before any thread starts.
    """
    manifests = [
        Manifest.read(paths, version=data.version, cache_dir=data.data_cache_dir)
        for paths in (data_paths, contrastive_paths)
    ]
    ordering: dict[str, Any] = {}
    if shuffle:
        ordering = {
            "source_sizes": manifests[0].samples_per_file,
            "weights": data.data_weights,
            "modality_lengths": manifests[0].modality_lengths() if data.group_by_modality_length else None,
            "shuffle_block": data.shuffle_block,
        }
    sampler = Sampler(
        *map(len, manifests),
        seed=seed,
        global_batch_size=global_batch_size,
        shuffle=shuffle,
        digests=tuple(manifest.digest for manifest in manifests),
        **ordering,
    )
    if data_state is not None:
        sampler.load_state_dict(data_state)
    backend = resolve_backend(data.image_backend)
    if backend == "pillow":
        decode_device = "cpu"
    if decode_device == "mixed" and not torch.cuda.is_available():
        raise ValueError("decoding images on the GPU needs a CUDA device, and there is none; decode on the CPU")
    maker = StepMaker(
        manifests=manifests,
        sampler=sampler,
        store=ImageStore(data.image_folder),
        decoder=ImageDecoder(
            model.image,
            aspect_ratio=data.image_aspect_ratio,
            backend=backend,
            device=decode_device,
            num_threads=data.num_workers,
            max_image_pixels=data.max_image_pixels,
            device_id=torch.cuda.current_device() if decode_device == "mixed" else None,
        ),
        tokenizer=tokenizer,
        settings=EncodingSettings(
            version=data.version,
            model_max_length=data.model_max_length,
            visual_tokens=model.vision.num_patches,
            image_context=image_context,
        ),
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        pad_multiple=pad_multiple,
        io_threads=data.io_threads,
    )
    return StepLoader(
        maker.make,
        prefetch_steps=data.prefetch_steps,
        num_samples=sampler.epoch_size,
        cancel=maker.cancel,
        close=maker.close,
    )
