"""Packs the segments of one micro-batch into the rows of a `PackedBatch`.

    dialogue 0 | image 0 + EOS | dialogue 1 | image 1 + EOS | ... | captions | hallucinated captions | padding

or whichever of these kinds `Parts` asks for. Where an image shares its dialogue's prefix, "image + EOS" is one row.
Rejected answers, where a likelihood objective asks for them, stand behind their dialogue. Which features an image's
rows take, its `ImageRows` say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hacl_megatron.batch import PackedBatch, Parts, SegmentLengths, rows_to_read
from hacl_megatron.config.tiles import NEWLINE, ImageRows
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodedPair, EncodedSample
from hacl_megatron.data.preferences import RejectedAnswer, little_left


@dataclass(frozen=True, kw_only=True)
class PackSlot:
    """One sample's place in a micro-batch."""

    sample_id: int
    """Manifest index."""
    encoded: EncodedSample | None
    """None for a bad sample: its slot contributes nothing."""
    image_keys: tuple[int, ...] = ()
    """64-bit hash of each of its images' bytes as a signed integer."""
    references: np.ndarray | None = None
    """float64 [P of the sample, 2]: `PackedBatch.reference_likelihoods`, where the objective has a reference."""


def pack(
    slots: Sequence[PackSlot],
    pixel_values: Tensor,
    *,
    visual_tokens: int,
    pad_multiple: int,
    parts: Parts = Parts(),  # noqa: B008 -- frozen
    shared_out_by: int = 0,
) -> PackedBatch:
    """One micro-batch's `PackedBatch` from its samples' segments.

    Args:
        slots: the micro-batch's samples in order, bad ones included.
        pixel_values: float32 [I, 3, H, W], the views of the good slots' images, in slot order; [0, 3, H, W] on a rank
            that holds no vision tower.
        visual_tokens: V.
        pad_multiple: T is a multiple of it, and at least that even if nothing else is in the pack.
        parts: the kinds of segments that go in. A `branch` needs its dialogue: an image whose dialogue does not start
            with its context, or is not in the pack, gets a segment of its own.
        shared_out_by: `PackedBatch.shared_out_by`.
    """
    good = [(slot, slot.encoded) for slot in slots if slot.encoded is not None]
    images = _Images([rows for _, encoded in good for rows in encoded.images], visual_tokens)
    assert pixel_values.dtype == torch.float32 and pixel_values.dim() == 4, (pixel_values.dtype, pixel_values.shape)
    assert pixel_values.shape[0] in (0, images.num_views), f"{pixel_values.shape[0]} views of {images.num_views}"

    rows = _Rows(images)
    targets = _Targets()
    image_eos, image_keys = [], []
    twin_sample_ids, references = [], []
    crops: list[tuple[int, int]] = []  # of the images of these numbers, with their keys
    first_image = 0
    for slot, encoded in good:
        assert len(encoded.images) == len(slot.image_keys), f"sample {slot.sample_id}: images without keys"
        own_images = range(first_image, first_image + len(encoded.images))
        begin = None
        if parts.dialogues:
            begin = rows.append(encoded.dialogue, own_images)
            places = targets.append(encoded.labels, begin)
            behind_crop: dict[bytes, np.ndarray] = {}
            if parts.preferences != "none" and encoded.rejected and encoded.answers_per_twin == 3:
                crops.append((own_images[0], slot.image_keys[0]))
                crop = images.add_crop()
                for chosen in _distinct_answers(encoded):
                    own = rows.append(encoded.dialogue[: chosen[-1]], [crop])
                    behind_crop[chosen.tobytes()] = targets.append_alone(chosen, encoded.dialogue[chosen], own)
            for answer in encoded.rejected if parts.preferences != "none" else ():
                shared = answer.shared if parts.preferences == "branch" else 0
                own = rows.append_behind(answer.rows, shared, begin, own_images)
                targets.append_rejected(answer, shared, begin, own, places)
                if behind_crop:
                    targets.answers.append(behind_crop[answer.chosen.tobytes()])
                twin_sample_ids.append(slot.sample_id)
            if slot.references is not None and parts.preferences != "none":
                references.append(slot.references.reshape(-1))
        for pair in encoded.pairs if parts.has_pairs else ():
            image_keys.append(slot.image_keys[pair.image])
            if parts.images == "branch" and begin is not None and _starts_with_context(encoded, pair):
                image_eos.append(rows.append_branch(pair.image_segment, begin))
            elif parts.images != "none":
                own = rows.append(pair.image_segment, own_images[pair.image :])
                image_eos.append(own + len(pair.image_segment) - 1)
        first_image += len(encoded.images)

    if crops and len(pixel_values):
        pixel_values = torch.cat([pixel_values, *(little_left(pixel_values[at], key)[None] for at, key in crops)])
    pairs = [pair for _, encoded in good for pair in encoded.pairs] if parts.has_pairs else []
    hallucinated = [(owner, segment) for owner, pair in enumerate(pairs) for segment in pair.hallucinated_segments]
    caption_eos, hallucinated_eos, texts_at = [], [], rows.length
    if parts.texts:
        caption_eos = [rows.append(pair.caption_segment) + len(pair.caption_segment) - 1 for pair in pairs]
        hallucinated_eos = [rows.append(segment) + len(segment) - 1 for _, segment in hallucinated]
    num_text_rows = rows.length - texts_at

    num_padding_rows = -rows.length % pad_multiple if rows.length else pad_multiple
    if num_padding_rows:
        rows.append(np.zeros(num_padding_rows, dtype=np.int64))

    cu_seqlens = torch.tensor(rows.borders, dtype=torch.int32)
    target_rows, rejected_rows = _joined(targets.rows), _joined(targets.rejected_rows)
    eos = [_int64(image_eos), _int64(caption_eos), _int64(hallucinated_eos)]
    branch_rows = _joined(rows.branch_rows)
    read_rows, read_lengths = rows_to_read(cu_seqlens, target_rows, rejected_rows, branch_rows, *eos)
    return PackedBatch(
        sample_ids=_int64([slot.sample_id for slot in slots]),
        token_ids=_joined(rows.token_ids),
        position_ids=_joined(rows.position_ids),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(np.diff(rows.borders).tolist()),
        pixel_values=pixel_values.contiguous(),
        image_rows=_joined(rows.image_rows),
        feature_rows=_joined(rows.feature_rows),
        pooled_rows=torch.from_numpy(images.pooled),
        pooled_weights=torch.from_numpy(images.weights),
        target_rows=target_rows,
        target_ids=_joined(targets.ids),
        image_eos_rows=eos[0],
        caption_eos_rows=eos[1],
        hallucinated_eos_rows=eos[2],
        hallucinated_owner=_int64([owner for owner, _ in hallucinated]),
        image_keys=_int64(image_keys),
        caption_keys=_int64([pair.caption_key for pair in pairs]),
        hallucinated_keys=_int64([key for pair in pairs for key in pair.hallucinated_keys]),
        read_rows=read_rows,
        read_lengths=read_lengths,
        branch_rows=branch_rows,
        branch_sizes=torch.tensor([len(own) for own in rows.branch_rows], dtype=torch.int32),
        branch_lengths=torch.tensor([len(context) for context in rows.branch_contexts], dtype=torch.int32),
        branch_context_rows=_joined(rows.branch_contexts),
        rejected_rows=rejected_rows,
        rejected_ids=_joined(targets.rejected_ids),
        preference_tokens=_joined(targets.compared()),
        preference_lengths=_int64([len(tokens) for tokens in targets.answers]),
        answers_per_twin=3 if crops else 2,
        reference_likelihoods=torch.tensor(np.concatenate(references) if references else [], dtype=torch.float64),
        twin_sample_ids=_int64(twin_sample_ids),
        shared_out_by=shared_out_by,
        num_padding_rows=num_padding_rows,
        num_text_rows=num_text_rows,
    )


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """What a sample adds to a pack."""

    lengths: SegmentLengths
    """Of its segments, in no order."""
    num_logits: int
    """Rows with logits."""
    num_views: int
    """Views that the vision tower sees, crops included."""


def sample_shape(encoded: EncodedSample, parts: Parts = Parts()) -> SampleShape:  # noqa: B008 -- frozen
    """What `pack` makes of the sample with these parts, counted without packing it."""
    segments: list[int] = []
    read: list[int] = []
    branches: list[tuple[int, int]] = []  # with their prefix, alone
    num_logits, num_views = 0, sum(image.num_views for image in encoded.images)
    if parts.dialogues:
        (targets,) = np.nonzero(encoded.labels[1:] != IGNORE)
        num_logits += len(targets)
        first_read = int(targets[0]) if len(targets) else len(encoded.dialogue)
        twins = encoded.rejected if parts.preferences != "none" else ()
        if twins and encoded.answers_per_twin == 3:
            num_views += 1
            for chosen in _distinct_answers(encoded):
                segments.append(int(chosen[-1]))
                read.append(int(chosen[-1] - chosen[0]) + 1)
                num_logits += len(chosen)
        for answer in twins:
            shared = answer.shared if parts.preferences == "branch" else 0
            is_target = np.zeros(len(answer.rows) + 2, dtype=bool)  # the last token compared stands behind the rows
            is_target[targets[targets < shared - 1] + 1] = True
            new = answer.rejected[~is_target[answer.rejected]]
            num_logits += len(new)
            if len(new) and new[0] - 1 < shared:
                first_read = min(first_read, int(new[0]) - 1)
            if own := len(answer.rows) - shared:
                segments.append(own)
                read.append(own if shared else own - int(new[0]) + 1)
                if shared:
                    branches.append((len(answer.rows), own))
        segments.append(len(encoded.dialogue))
        read.append(len(encoded.dialogue) - first_read)
    for pair in encoded.pairs if parts.has_pairs else ():
        if parts.images == "branch" and parts.dialogues and _starts_with_context(encoded, pair):
            segments.append(1)
            branches.append((len(pair.image_segment), 1))
        elif parts.images != "none":
            segments.append(len(pair.image_segment))
        if parts.texts:
            segments += [len(pair.caption_segment), *map(len, pair.hallucinated_segments)]
        read += [1] * (len(segments) - len(read))  # their EOS
    return SampleShape(
        lengths=SegmentLengths(
            segments=tuple(segments),
            read=tuple(read),
            branches=tuple(length for length, _ in branches),
            branch_sizes=tuple(size for _, size in branches),
        ),
        num_logits=num_logits,
        num_views=num_views,
    )


def num_packed_rows(encoded: EncodedSample | None, parts: Parts = Parts()) -> int:  # noqa: B008 -- frozen
    """Rows that a sample takes in a pack."""
    return 0 if encoded is None else sum(sample_shape(encoded, parts).lengths.segments)


def with_views(batch: PackedBatch, pixel_values: Tensor, views: Tensor, *, visual_tokens: int) -> PackedBatch:
    """The batch with other pixels, for views that several of its images share.

    Args:
        pixel_values: float32 [I', 3, H, W].
        views: int64 [I], which of these each view of the batch is.
    """
    num_features, moved = len(views) * visual_tokens, (len(pixel_values) - len(views)) * visual_tokens

    def of_table(rows: Tensor) -> Tensor:
        # Behind the features of views stand newline and pooled features.
        view = views[(rows // visual_tokens).clamp(max=len(views) - 1)] if len(views) else rows
        return torch.where(rows < num_features, view * visual_tokens + rows % visual_tokens, rows + moved)

    return replace(
        batch,
        pixel_values=pixel_values,
        feature_rows=of_table(batch.feature_rows),
        pooled_rows=of_table(batch.pooled_rows),
    )


def _distinct_answers(encoded: EncodedSample) -> list[np.ndarray]:
    """Positions of the true answers that its twins are compared with: nearly always one."""
    return list({answer.chosen.tobytes(): answer.chosen for answer in encoded.rejected}.values())


def _starts_with_context(encoded: EncodedSample, pair: EncodedPair) -> bool:
    """Whether the dialogue begins with all that the image's EOS sees. Not so if it never mentions its image."""
    context = pair.image_segment[:-1]
    return pair.image == 0 and np.array_equal(encoded.dialogue[: len(context)], context)


class _Images:
    """The images of the pack, and where their features lie in the table that `PackedBatch.feature_rows` counts in."""

    def __init__(self, images: Sequence[ImageRows], visual_tokens: int) -> None:
        self.num_views = sum(image.num_views for image in images)
        self._visual_tokens, self._num_crops = visual_tokens, 0
        self._features: list[np.ndarray] = []
        pooled, weights = [np.empty((0, 4), dtype=np.int64)], [np.empty((0, 4), dtype=np.float32)]
        newline, num_pooled, first = self.num_views * visual_tokens, 0, 0
        for image in images:
            end = image.num_views * visual_tokens
            of_views = image.sources + first
            of_pooled = image.sources - end + newline + 1 + num_pooled
            features = np.where(image.sources < end, of_views, of_pooled)
            self._features.append(np.where(image.sources == NEWLINE, newline, features))
            pooled.append(image.pooled + first)
            weights.append(image.weights)
            first, num_pooled = first + end, num_pooled + len(image.pooled)
        self.pooled, self.weights = np.concatenate(pooled), np.concatenate(weights)

    def add_crop(self) -> int:
        """The number of one more image, of one view behind all others."""
        at = self.num_views + self._num_crops
        self._num_crops += 1
        self._features.append(np.arange(self._visual_tokens, dtype=np.int64) + at * self._visual_tokens)
        return len(self._features) - 1

    def features(self, numbers: Sequence[int], count: int, skipped: int = 0) -> np.ndarray:
        """int64 [count]: rows of the table that the rows of these images take, one after another, the first `skipped`
        left out. Images never break off: what is asked for ends with one."""
        found, length = [], 0
        for number in numbers:
            if length >= skipped + count:
                break
            found.append(self._features[number])
            length += len(found[-1])
        assert length == skipped + count, f"{count} rows behind {skipped} for images of {length}"
        return np.concatenate(found)[skipped:]


class _Rows:
    """The rows of the pack, segment after segment."""

    def __init__(self, images: _Images):
        self._images = images
        self.borders = [0]
        self.token_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.image_rows: list[np.ndarray] = []
        self.feature_rows: list[np.ndarray] = []
        self.branch_rows: list[np.ndarray] = []
        self.branch_contexts: list[np.ndarray] = []

    @property
    def length(self) -> int:
        return self.borders[-1]

    def append(self, segment: np.ndarray, images: Sequence[int] = (), shared: int = 0) -> int:
        """Adds a segment's rows behind its first `shared`; returns the first one added.

        Args:
            images: numbers of the images whose features its image rows take, in their order; those behind its last
                image row are not used.
        """
        begin = self.length
        is_image = segment[shared:] == IMAGE
        (positions,) = np.nonzero(is_image)
        if len(positions):
            self.image_rows.append(positions + begin)
            skipped = int(np.count_nonzero(segment[:shared] == IMAGE)) if shared else 0
            self.feature_rows.append(self._images.features(images, len(positions), skipped))
        self.token_ids.append(np.where(is_image, 0, segment[shared:]))
        self.position_ids.append(np.arange(shared, len(segment), dtype=np.int64))
        self.borders.append(begin + len(segment) - shared)
        return begin

    def append_branch(self, image_segment: np.ndarray, dialogue: int) -> int:
        """Adds the EOS of an image segment whose other rows are the first of the segment at row `dialogue`."""
        return self.append_behind(image_segment, len(image_segment) - 1, dialogue)

    def append_behind(self, segment: np.ndarray, shared: int, dialogue: int, images: Sequence[int] = ()) -> int:
        """Adds a segment's rows behind its first `shared`, which are those of the segment at row `dialogue`, as a
        branch of these; without any, as a segment of its own. Returns the first row added."""
        if shared == len(segment):  # all that is read is the dialogue's
            return self.length
        begin = self.append(segment, images, shared)
        if shared:
            own = np.arange(begin, self.length, dtype=np.int64)
            self.branch_rows.append(own)
            self.branch_contexts.append(np.concatenate([np.arange(dialogue, dialogue + shared, dtype=np.int64), own]))
        return begin


class _Targets:
    """Tokens whose likelihoods are wanted, and the rows that predict them: the row in front of a token does."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.rejected_rows: list[np.ndarray] = []
        self.rejected_ids: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []
        """Of each twin the true answer's tokens, the twin's, and maybe those behind a crop: places among targets, or
        -1 - places among rejected tokens."""
        self._num_targets = self._num_rejected = 0

    def append(self, labels: np.ndarray, begin: int) -> np.ndarray:
        """The targets of a dialogue at row `begin`; returns int64 [L]: the place of each position among all targets,
        -1 where there is none. A segment's first token has no row in front of it."""
        (positions,) = np.nonzero(labels[1:] != IGNORE)
        self.rows.append(positions + begin)
        self.ids.append(labels[1:][positions])
        places = np.full(len(labels), -1, dtype=np.int64)
        places[positions + 1] = np.arange(len(positions)) + self._num_targets
        self._num_targets += len(positions)
        return places

    def append_rejected(self, answer: RejectedAnswer, shared: int, dialogue: int, own: int, places: np.ndarray) -> None:
        """A twin of the dialogue at row `dialogue`, whose rows behind the `shared` ones begin at row `own`.

        places: what `append` gave for the dialogue: a token in the shared rows is the true answer's own.
        """
        positions = answer.rejected
        known = np.full(len(positions), -1, dtype=np.int64)
        is_shared = positions < shared
        known[is_shared] = places[positions[is_shared]]
        new = known < 0
        predicting = positions - 1
        rows = np.where(predicting < shared, predicting + dialogue, predicting - shared + own)
        self.rejected_rows.append(rows[new])
        self.rejected_ids.append(answer.rejected_ids[new])
        known[new] = -1 - self._num_rejected - np.arange(new.sum())
        self._num_rejected += int(new.sum())
        self.answers += [places[answer.chosen], known]

    def append_alone(self, positions: np.ndarray, ids: np.ndarray, begin: int) -> np.ndarray:
        """Tokens at these positions of a segment at row `begin`, for a likelihood objective alone; their places, as
        `answers` has them."""
        self.rejected_rows.append(positions - 1 + begin)
        self.rejected_ids.append(ids)
        self._num_rejected += len(positions)
        return -1 - self._num_rejected + len(positions) - np.arange(len(positions))

    def compared(self) -> list[np.ndarray]:
        """`answers`, with the rejected tokens counted behind all targets."""
        return [np.where(answer < 0, self._num_targets - 1 - answer, answer) for answer in self.answers]


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)) if parts else _int64([])


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
