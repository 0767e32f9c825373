"""Reads optimiser steps ahead in a background thread.

    StepMaker ─→ StepBatches ─queue→ next(loader)
    (threads: `io_threads` read files, `num_workers` decode; one draws, encodes and packs)

The sampler's state travels with its step, so a checkpoint never sees what was read ahead.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from hacl_megatron.batch import StepBatches
from hacl_megatron.config.console import notify
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import Manifest, refuse_where_no_image_is
from hacl_megatron.data.node_cache import NodeCache
from hacl_megatron.data.order.sampler import OnceThrough, Sampler
from hacl_megatron.data.step_maker import MicroBatching, References, StepMaker
from hacl_megatron.data.store import ImageStore
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer

CLOSE_TIMEOUT_S = 30
"""How long `close` waits for a read or decode; a thread that hangs longer dies with the process."""


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
        digests: of the content of the ordinary and the contrastive samples (`Manifest.digest`).
    """

    def __init__(
        self,
        make: Callable[[], StepBatches],
        *,
        prefetch_steps: int,
        num_samples: int,
        digests: tuple[str, ...] = ("", ""),
        cancel: Callable[[], None] = lambda: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        if prefetch_steps < 1:
            raise ValueError(f"--prefetch-steps is {prefetch_steps}, expected at least 1")
        self.num_samples, self.digests = num_samples, digests
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
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    micro_batching: MicroBatching,
    data_parallel_rank: int,
    data_parallel_size: int,
    pad_multiple: int,
    for_validation: bool = False,
    data_state: dict[str, Any] | None = None,
    decode_device: Literal["cpu", "mixed"] = "cpu",
    only: Sequence[int] | None = None,
    references: References | None = None,
) -> StepLoader:
    """The loader of one data-parallel rank over JSON files or prepared folders, going on from `data_state`.

    Mixture, groups and blocks hold where samples are shuffled: with `for_validation`, `--valid-data-path` is read once
    in the files' order, without `--contrastive-data-path`; slots beyond its end are empty. `decode_device="mixed"` lets
    DALI, if it is the back end, decode on the CUDA device; pixels come back. `only`: these sample ids instead, once.
    Raises ValueError for whatever is wrong with files, folder, sizes, state or back end, before any thread starts.
    """
    data = config.data
    check_template(data.version, tokenizer)
    paths = (data.valid_data_path, []) if for_validation else (data.data_path, data.contrastive_data_path)
    manifests = [Manifest.read(some, version=data.version, cache_dir=data.data_cache_dir) for some in paths]
    if data.max_bad_fraction < 1:
        for manifest in manifests:
            refuse_where_no_image_is(manifest, data.image_folder)
    for line in (line for manifest in manifests for line in manifest.remarks(config.preference.preference_loss)):
        notify(f"note: {line}")
    ordering: dict[str, Any] = {}
    if not for_validation:
        ordering = {
            "source_sizes": manifests[0].samples_per_file,
            "weights": data.data_weights,
            "modality_lengths": manifests[0].modality_lengths() if data.group_by_modality_length else None,
            "shuffle_block": data.shuffle_block,
        }
    digests = tuple(manifest.digest for manifest in manifests)
    sampler = Sampler(
        *map(len, manifests),
        seed=config.training.seed,
        global_batch_size=global_batch_size,
        shuffle=not for_validation,
        digests=digests,
        **ordering,
    )
    if data_state is not None:
        sampler.load_state_dict(data_state)
    if only is not None:
        sampler = OnceThrough(only, global_batch_size)
    maker = StepMaker(
        manifests=manifests,
        sampler=sampler,
        store=ImageStore(data.image_folder, NodeCache.of(data)),
        decoder=ImageDecoder.of(config, device=decode_device),
        tokenizer=tokenizer,
        settings=EncodingSettings.of(config),
        micro_batching=micro_batching,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        pad_multiple=pad_multiple,
        io_threads=data.io_threads,
        one_epoch=for_validation or only is not None,
        references=references,
    )
    return StepLoader(
        maker.make,
        prefetch_steps=data.prefetch_steps,
        num_samples=sampler.epoch_size,
        digests=digests,
        cancel=maker.cancel,
        close=maker.close,
    )
