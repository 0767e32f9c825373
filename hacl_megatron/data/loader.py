"""Reads optimiser steps ahead in a background thread: from sample ids to packed micro-batches.

    Sampler ─ids→ Manifest ─→ encode ─→ assignment ─┬ ReadAhead ─bytes→ ImageDecoder ─┬→ pack ─→ StepBatches
                                                    └─────────── this rank's ─────────┘       ─queue→ next(loader)
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
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from hacl_megatron.batch import BadSample, MicroBatch, PackedBatch, PackPlan, Parts, StepBatches
from hacl_megatron.config.console import notify
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.assignment import balanced, in_order, within_tokens
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.packing import PackSlot, num_packed_rows, pack
from hacl_megatron.data.read_ahead import ReadAhead
from hacl_megatron.data.sampler import OnceThrough, Sampler
from hacl_megatron.data.store import ImageStore, UnusableImage
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer

References = Callable[[int], "np.ndarray | None"]
CLOSE_TIMEOUT_S = 30
"""How long `close` waits for a read or decode; a thread that hangs longer dies with the process."""


@dataclass
class _Drawn:
    """One sample of a step on its way into a slot."""

    sample_id: int
    sample: Sample
    encoded: EncodedSample | None = None
    file: "Future[tuple[bytes, int]] | None" = None
    """The image's bytes and key, being read; None for a text-only sample."""
    image_key: int | None = None
    references: np.ndarray | None = None  # `PackSlot.references`
    bad: BadSample | None = None
    left_out: bool = False
    """An empty slot behind the only epoch's end."""

    def refuse(self, source: str, error: object) -> None:
        """Makes it a bad sample: an empty slot, and a record of why."""
        self.encoded = self.image_key = None
        self.bad = BadSample(sample_id=self.sample_id, name=self.sample.name, source=source, reason=str(error))

    def record(self, reason: str) -> BadSample:
        """Of a sample that was used, and of which something trains nothing."""
        return BadSample(sample_id=self.sample_id, name=self.sample.name, source=self.sample.source, reason=reason)


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How a global batch becomes the micro-batches of each data-parallel rank, and those become packs."""

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    """Rows of a micro-batch at most; decides the number of micro-batches, and `micro_batch_size` then plays no part."""
    balance: bool = False
    """Even out the rows of micro-batches; never with negatives of one micro-batch, whose pool it would change."""
    plan: Callable[[int], PackPlan] = field(default=lambda num_micro_batches: PackPlan())
    """The packs of each micro-batch, by the number of micro-batches in the step."""


class StepMaker:
    """Makes one `StepBatches` after another, for one data-parallel rank; `StepLoader` runs it in its thread.

    Args:
        manifests: the ordinary samples, then the contrastive ones; the sampler's ids count through both.
        sampler: what is drawn, at which global batch size.
        pad_multiple: every pack's number of rows is a multiple of it.
        io_threads: threads that read files, this step's and the next one's.
        one_epoch: slots beyond the first epoch stay empty.
        references: by sample id, float64 [P, 2], what the reference of a likelihood objective makes of the sample's
            twins, or None; default: the objective has no reference.

    Raises ValueError when the global batch does not divide into the ranks' micro-batches.
    """

    def __init__(
        self,
        *,
        manifests: Sequence[Manifest],
        sampler: Sampler | OnceThrough,
        store: ImageStore,
        decoder: ImageDecoder,
        tokenizer: Tokenizer,
        settings: EncodingSettings,
        micro_batching: MicroBatching,
        data_parallel_rank: int,
        data_parallel_size: int,
        pad_multiple: int,
        io_threads: int,
        one_epoch: bool = False,
        references: References | None = None,
    ) -> None:
        self.sampler = sampler
        self.references = references
        self.store = store
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.settings = settings
        self.pad_multiple = pad_multiple
        self.one_epoch = one_epoch
        self.micro_batching = micro_batching
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        if micro_batching.micro_batch_tokens is None:
            self._assign([1] * sampler.global_batch_size)  # complain now, not in the thread
        self._files = ReadAhead(manifests, store, io_threads)
        self._planned: tuple[list[tuple[int, int]], list[list[_Drawn]]] = ([], [])

    def make(self) -> StepBatches:
        """The next step's micro-batches on this rank."""
        global_batch = self.sampler.next_batch()
        data_state = self.sampler.state_dict()
        planned_for, micro_batches = self._planned
        if planned_for != global_batch:
            micro_batches = self._share(global_batch)
        # The next step's files are read while this one's images are decoded.
        upcoming = self.sampler.peek(len(global_batch))
        self._planned = (upcoming, self._share(upcoming))
        step = [drawn for micro_batch in micro_batches for drawn in micro_batch]
        plan = self.micro_batching.plan(len(micro_batches))
        pixels = self._decode(step)
        return StepBatches(
            micro_batches=[self._pack(micro_batch, plan, *pixels) for micro_batch in micro_batches],
            data_state=data_state,
            bad_samples=[drawn.bad for drawn in step if drawn.bad],
            untrained_samples=[
                drawn.record(drawn.encoded.untrained) for drawn in step if drawn.encoded and drawn.encoded.untrained
            ],
            uncompared_twins=[
                drawn.record(reason) for drawn in step if drawn.encoded for reason in drawn.encoded.uncompared
            ],
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

    def _share(self, global_batch: list[tuple[int, int]]) -> list[list[_Drawn]]:
        """This rank's samples of the global batch by micro-batch, encoded, their files being read."""
        settings = self.micro_batching
        several = len(global_batch) > settings.micro_batch_size
        if settings.micro_batch_tokens is not None or (settings.balance and several):
            # Every rank needs every sample's length, so it encodes them all; it reads the images of its own alone.
            drawn = [self._drawn(*draw) for draw in global_batch]
            for item in drawn:
                self._encode(item)
            main = settings.plan(1).main
            parts = replace(main, texts=main.has_pairs)  # whichever of the two packs texts are in
            shares = self._assign([num_packed_rows(item.encoded, parts) for item in drawn])
            micro_batches = [[drawn[at] for at in micro_batch] for micro_batch in shares]
            for micro_batch in micro_batches:
                for item in micro_batch:
                    self._read(item)
            return micro_batches
        shares = self._assign([1] * len(global_batch))
        micro_batches = [[self._drawn(*global_batch[at]) for at in micro_batch] for micro_batch in shares]
        own = [item for micro_batch in micro_batches for item in micro_batch]
        for item in own:
            self._read(item)
        for item in own:  # while the readers read
            self._encode(item)
        return micro_batches

    def _assign(self, costs: list[int]) -> list[list[int]]:
        """Positions in the global batch of this rank's micro-batches."""
        settings, size = self.micro_batching, self.data_parallel_size
        if settings.micro_batch_tokens is not None:
            ranks = within_tokens(costs, micro_batch_tokens=settings.micro_batch_tokens, data_parallel_size=size)
        elif settings.balance:
            ranks = balanced(costs, micro_batch_size=settings.micro_batch_size, data_parallel_size=size)
        else:
            ranks = in_order(len(costs), micro_batch_size=settings.micro_batch_size, data_parallel_size=size)
        return ranks[self.data_parallel_rank]

    def _drawn(self, epoch: int, sample_id: int) -> _Drawn:
        left_out = self.one_epoch and epoch > 0
        return _Drawn(sample_id, self._files.sample(sample_id), left_out=left_out)

    def _read(self, drawn: _Drawn) -> None:
        if not drawn.left_out:
            drawn.file = self._files.read(drawn.sample)

    def _encode(self, drawn: _Drawn) -> None:
        if drawn.left_out:
            return
        try:
            drawn.encoded = encode(drawn.sample, self.tokenizer, self.settings)
        except UnusableSample as error:
            drawn.refuse(drawn.sample.source, error)
            return
        if self.references is not None and (twins := len(drawn.encoded.rejected)):
            drawn.references = self.references(drawn.sample_id)
            if drawn.references is None:  # it could not be used when the reference was scored
                uncompared = (*drawn.encoded.uncompared, *["the reference has no score of it"] * twins)
                drawn.encoded = replace(drawn.encoded, rejected=(), uncompared=uncompared)
            assert drawn.references is None or len(drawn.references) == twins, "bound to data and template"

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

    def _pack(
        self, micro_batch: list[_Drawn], plan: PackPlan, pixel_values: torch.Tensor, places: dict[int, int]
    ) -> MicroBatch:
        slots = [
            PackSlot(
                sample_id=drawn.sample_id,
                encoded=drawn.encoded,
                image_key=drawn.image_key,
                references=drawn.references,
            )
            for drawn in micro_batch
        ]
        chosen = torch.tensor([places[s.image_key] for s in slots if s.image_key is not None], dtype=torch.int64)

        def packed(parts: Parts, pixels: torch.Tensor) -> PackedBatch:
            return pack(
                slots,
                pixels,
                visual_tokens=self.settings.visual_tokens,
                pad_multiple=self.pad_multiple,
                parts=parts,
            )

        return MicroBatch(
            main=packed(plan.main, pixel_values[chosen]),
            ahead=None if plan.ahead is None else packed(plan.ahead, pixel_values[:0]),
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
        store=ImageStore(data.image_folder),
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
