"""Makes the micro-batches of optimiser steps, from sample ids to packed rows.

    Sampler ─ids→ Manifest ─→ encode ─→ assignment ─┬ ReadAhead ─bytes→ ImageDecoder ─┬→ pack ─→ StepBatches
                                                    └─────────── this rank's ─────────┘

Where an image's size decides its rows, a sample is encoded when its files are there; where the samples of all ranks are
to be weighed against one another, sizes are read from the files' heads before.

A sample that cannot be used leaves an empty slot in its micro-batch and a `BadSample` with the step; nothing else
of the step changes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hacl_megatron.batch import BadSample, MicroBatch, PackedBatch, PackPlan, Parts, StepBatches
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings, UnusableSample, encode, rows_key
from hacl_megatron.data.images import ImageDecoder
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.order.assignment import balanced, evened, evened_within_tokens, in_order, within_tokens
from hacl_megatron.data.order.sampler import OnceThrough, Sampler
from hacl_megatron.data.packing import PackSlot, num_packed_rows, pack
from hacl_megatron.data.read_ahead import ReadAhead
from hacl_megatron.data.store import ImageStore, UnusableImage
from hacl_megatron.data.tokenizer import Tokenizer

References = Callable[[int], "np.ndarray | None"]
"""By sample id, what the reference of a likelihood objective makes of the sample's twins."""


@dataclass
class _Drawn:
    """One sample of a step on its way into a slot."""

    sample_id: int
    sample: Sample
    encoded: EncodedSample | None = None
    files: "list[Future[tuple[bytes, int]]]" = field(default_factory=list)
    """Its images' bytes and keys, being read."""
    image_keys: tuple[int, ...] = ()
    references: np.ndarray | None = None  # `PackSlot.references`
    bad: BadSample | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of its images that `encoded` was made for, where their rows follow from them."""
    left_out: bool = False
    """An empty slot behind the only epoch's end."""

    def refuse(self, source: str, error: object) -> None:
        """Makes it a bad sample: an empty slot, and a record of why."""
        self.encoded, self.image_keys = None, ()
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
    """Even out the work of micro-batches; never with negatives of one micro-batch, whose pool it would change."""
    cost: Callable[[EncodedSample, PackPlan], tuple[float, ...]] | None = None
    """FLOPs of a sample on the stages of a pipeline whose slowest is what counts, with the vision tower's, for samples
    that give it different work; None: rows alone are evened out."""
    plan: Callable[[int], PackPlan] = field(default=lambda num_micro_batches: PackPlan())
    """The packs of each micro-batch, by the number of micro-batches in the step."""


class StepMaker:
    """Makes one `StepBatches` after another, for one data-parallel rank.

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
        self._files = ReadAhead(manifests, store, io_threads, decoder.size_of)
        self._planned: tuple[list[tuple[int, int]], _Share] = ([], _Share([]))

    def make(self) -> StepBatches:
        """The next step's micro-batches on this rank."""
        global_batch = self.sampler.next_batch()
        data_state = self.sampler.state_dict()
        planned_for, share = self._planned
        if planned_for != global_batch:
            share = self._share(global_batch)
        # The next step's files are read while this one's images are decoded.
        upcoming = self.sampler.peek(len(global_batch))
        self._planned = (upcoming, self._share(upcoming))
        step = [drawn for micro_batch in share.micro_batches for drawn in micro_batch]
        for drawn in step:
            self._encode_if_not_yet(drawn)
        plan = self.micro_batching.plan(len(share.micro_batches))
        views = self._decode(step)
        return StepBatches(
            micro_batches=[self._pack(own, plan, views, share.shared_out_by) for own in share.micro_batches],
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

    def _share(self, global_batch: list[tuple[int, int]]) -> "_Share":
        """This rank's samples of the global batch by micro-batch, encoded, their files being read."""
        settings = self.micro_batching
        several = len(global_batch) > settings.micro_batch_size
        if settings.micro_batch_tokens is not None or (settings.balance and several):
            # Every rank needs every sample's length, so it encodes them all; it reads the images of its own alone.
            drawn = [self._drawn(*draw) for draw in global_batch]
            sizes = [self._files.sizes(item.sample) if self.settings.image_layout.needs_sizes else [] for item in drawn]
            for item, of_images in zip(drawn, sizes, strict=True):
                self._encode(item, of_images)
            main = settings.plan(1).main
            parts = replace(main, texts=main.has_pairs)  # whichever of the two packs texts are in
            rows = [num_packed_rows(item.encoded, parts) for item in drawn]
            views = [sum(image.num_views for image in item.encoded.images) if item.encoded else 0 for item in drawn]
            shares = self._assign(rows, self._costs(drawn, views, sum(rows)))
            micro_batches = [[drawn[at] for at in micro_batch] for micro_batch in shares]
            for micro_batch in micro_batches:
                for item in micro_batch:
                    self._read(item)
            return _Share(micro_batches, rows_key(np.array([rows, views])) % (1 << 20))
        shares = self._assign([1] * len(global_batch))
        micro_batches = [[self._drawn(*global_batch[at]) for at in micro_batch] for micro_batch in shares]
        own = [item for micro_batch in micro_batches for item in micro_batch]
        for item in own:
            self._read(item)
        if not self.settings.image_layout.needs_sizes:
            for item in own:  # while the readers read
                self._encode(item)
        return _Share(micro_batches)

    def _costs(self, drawn: list[_Drawn], views: list[int], num_rows: int) -> np.ndarray | None:
        """float64 [samples, stages]: `MicroBatching.cost` of each; None where rows alone tell samples apart."""
        settings = self.micro_batching
        if settings.cost is None or len({views[at] for at, item in enumerate(drawn) if item.encoded}) < 2:
            return None
        of_rank = len(drawn) / self.data_parallel_size / settings.micro_batch_size
        if settings.micro_batch_tokens is not None:
            of_rank = num_rows / self.data_parallel_size / settings.micro_batch_tokens
        plan = settings.plan(max(1, round(of_rank)))
        costs = [settings.cost(item.encoded, plan) if item.encoded else () for item in drawn]
        nothing = (0.0,) * max(map(len, costs))
        return np.array([cost or nothing for cost in costs])

    def _assign(self, rows: list[int], costs: np.ndarray | None = None) -> list[list[int]]:
        """Positions in the global batch of this rank's micro-batches."""
        settings, size, tokens = self.micro_batching, self.data_parallel_size, self.micro_batching.micro_batch_tokens
        by_number = {"micro_batch_size": settings.micro_batch_size, "data_parallel_size": size}
        if tokens is not None and costs is not None:
            ranks = evened_within_tokens(costs, rows, micro_batch_tokens=tokens, data_parallel_size=size)
        elif tokens is not None:
            ranks = within_tokens(rows, micro_batch_tokens=tokens, data_parallel_size=size)
        elif costs is not None:
            weights = rows if costs.shape[1] == 1 else costs.max(axis=1).tolist()
            ranks = evened(costs, weights, **by_number)
        elif settings.balance:
            ranks = balanced(rows, **by_number)
        else:
            ranks = in_order(len(rows), **by_number)
        return ranks[self.data_parallel_rank]

    def _drawn(self, epoch: int, sample_id: int) -> _Drawn:
        left_out = self.one_epoch and epoch > 0
        return _Drawn(sample_id, self._files.sample(sample_id), left_out=left_out)

    def _read(self, drawn: _Drawn) -> None:
        if not drawn.left_out and not drawn.bad:
            drawn.files = self._files.read(drawn.sample)

    def _encode_if_not_yet(self, drawn: _Drawn) -> None:
        """What could not be encoded before its files were read."""
        if drawn.encoded is not None or drawn.bad:
            return
        sizes: list[Future[tuple[int, int]]] = []
        for file in drawn.files:
            sizes.append(size := Future())
            try:
                size.set_result(self.decoder.size_of(file.result()[0], alone=len(drawn.files) == 1))
            except UnusableImage as error:
                size.set_exception(error)
        self._encode(drawn, sizes)

    def _encode(self, drawn: _Drawn, sizes: "Sequence[Future[tuple[int, int]]]" = ()) -> None:
        """Encodes a sample.

        Args:
            sizes: of its images, where their rows follow from them.
        """
        if drawn.left_out:
            return
        known = []
        for number, size in enumerate(sizes):
            try:
                known.append(size.result())
            except UnusableImage as error:
                drawn.refuse(self._source(drawn, number), error)
                return
        try:
            drawn.encoded = encode(drawn.sample, self.tokenizer, self.settings, known)
        except UnusableSample as error:
            drawn.refuse(drawn.sample.source, error)
            return
        drawn.sizes = known
        if self.references is not None and (twins := len(drawn.encoded.rejected)):
            drawn.references = self.references(drawn.sample_id)
            if drawn.references is None:  # it could not be used when the reference was scored
                uncompared = (*drawn.encoded.uncompared, *["the reference has no score of it"] * twins)
                drawn.encoded = replace(drawn.encoded, rejected=(), uncompared=uncompared)
            assert drawn.references is None or len(drawn.references) == twins, "bound to data and template"

    def _decode(self, step: list[_Drawn]) -> "_Views":
        """Views of each distinct image of the step, decoded once."""
        files: dict[_Image, bytes] = {}
        users: dict[_Image, list[tuple[_Drawn, int]]] = {}
        for drawn in step:
            if drawn.bad:
                continue
            keys = []
            for number, file in enumerate(drawn.files):
                try:
                    data, key = file.result()
                    self._refuse_another_size(drawn, number, data)
                except UnusableImage as error:
                    drawn.refuse(self._source(drawn, number), error)
                    break
                keys.append(key)
                image = key, len(drawn.files) == 1
                files[image] = data
                users.setdefault(image, []).append((drawn, number))
            else:
                drawn.image_keys = tuple(keys)
        decoded = self.decoder.decode([*files.values()], [alone for _, alone in files])
        for image, reason in zip(files, decoded.reasons, strict=True):
            if reason is not None:
                for drawn, number in users[image]:
                    if not drawn.bad:
                        drawn.refuse(self._source(drawn, number), reason)
        borders = zip(decoded.first_views, decoded.first_views[1:], strict=False)
        return _Views(decoded.pixel_values, {image: range(*views) for image, views in zip(files, borders, strict=True)})

    def _refuse_another_size(self, drawn: _Drawn, number: int, data: bytes) -> None:
        """UnusableImage for a file that is no longer what its rows were counted for."""
        if drawn.sizes and (size := self.decoder.size_of(data, alone=len(drawn.files) == 1)) != drawn.sizes[number]:
            before = drawn.sizes[number]
            raise UnusableImage(
                f"was {before[0]} x {before[1]} pixels when its rows were counted, and is {size[0]} x {size[1]} now: "
                "it was replaced while the run was reading"
            )

    def _source(self, drawn: _Drawn, number: int) -> str:
        return self.store.source(drawn.sample.images[number], drawn.sample.stored[number])

    def _pack(self, micro_batch: list[_Drawn], plan: PackPlan, views: "_Views", shared_out_by: int) -> MicroBatch:
        slots = [
            PackSlot(
                sample_id=drawn.sample_id,
                encoded=drawn.encoded,
                image_keys=drawn.image_keys,
                references=drawn.references,
            )
            for drawn in micro_batch
        ]
        images = [(key, len(slot.image_keys) == 1) for slot in slots for key in slot.image_keys]
        pixel_values = views.take([view for image in images for view in views.of[image]])

        def packed(parts: Parts, pixels: torch.Tensor) -> PackedBatch:
            return pack(
                slots,
                pixels,
                visual_tokens=self.settings.image_layout.visual_tokens,
                pad_multiple=self.pad_multiple,
                parts=parts,
                shared_out_by=shared_out_by,
            )

        return MicroBatch(
            main=packed(plan.main, pixel_values),
            ahead=None if plan.ahead is None else packed(plan.ahead, views.pixel_values[:0]),
        )


@dataclass(frozen=True)
class _Share:
    """This rank's samples of a global batch."""

    micro_batches: list[list[_Drawn]]
    shared_out_by: int = 0
    """`PackedBatch.shared_out_by`."""


_Image = tuple[int, bool]
"""Key of an image's bytes, and whether it is the only one of its record."""


@dataclass(frozen=True)
class _Views:
    """The decoded images of a step."""

    pixel_values: torch.Tensor
    """float32 [I, 3, S, S]"""
    of: dict[_Image, range]
    """Which views each image's are."""

    def take(self, chosen: list[int]) -> torch.Tensor:
        """Those views; without a copy where they lie in a row, as those of images that are used once do."""
        if chosen and chosen == [*range(chosen[0], chosen[0] + len(chosen))]:
            return self.pixel_values[chosen[0] : chosen[0] + len(chosen)]
        return self.pixel_values[torch.tensor(chosen, dtype=torch.int64)]
