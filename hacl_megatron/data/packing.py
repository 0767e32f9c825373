"""Packs the segments of one micro-batch into the rows of a `PackedBatch`.

    dialogue 0 | image 0 + EOS | dialogue 1 | image 1 + EOS | ... | captions | hallucinated captions | padding

Captions and hallucinated captions come last, so that what no image feature and no language-model target touches is
one contiguous run of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hacl_megatron.batch import PackedBatch
from hacl_megatron.data.conversation import IGNORE, IMAGE, EncodedSample


@dataclass(frozen=True, kw_only=True)
class PackSlot:
    """One sample's place in a micro-batch."""

    sample_id: int
    """Manifest index."""
    encoded: EncodedSample | None
    """None for a bad sample: its slot contributes nothing."""
    image_key: int | None
    """64-bit hash of the image's bytes as a signed integer; None without an image."""


def pack(slots: Sequence[PackSlot], pixel_values: Tensor, *, visual_tokens: int, pad_multiple: int) -> PackedBatch:
    """One micro-batch's `PackedBatch` from its samples' segments.

    Args:
        slots: the micro-batch's samples in order, bad ones included.
        pixel_values: float32 [I, 3, H, W], the images of the good slots that have one, in slot order; [0, 3, H, W]
            on a rank that holds no vision tower.
        visual_tokens: V.
        pad_multiple: T is a multiple of it, and at least that even if every slot is bad.
    """
    good = [(slot, slot.encoded) for slot in slots if slot.encoded is not None]
    num_images = sum(encoded.has_image for _, encoded in good)
    assert pixel_values.dtype == torch.float32 and pixel_values.dim() == 4, (pixel_values.dtype, pixel_values.shape)
    assert pixel_values.shape[0] in (0, num_images), f"{pixel_values.shape[0]} images for {num_images} slots with one"

    rows = _Rows(visual_tokens)
    targets: list[np.ndarray] = []
    target_ids: list[np.ndarray] = []
    image_eos, image_keys = [], []
    image = 0
    for slot, encoded in good:
        assert encoded.has_image == (slot.image_key is not None), f"sample {slot.sample_id}: image without key"
        begin = rows.append(encoded.dialogue, image)
        # The row in front of a token predicts it; a segment's first token has none.
        (positions,) = np.nonzero(encoded.labels[1:] != IGNORE)
        targets.append(positions + begin)
        target_ids.append(encoded.labels[1:][positions])
        if encoded.image_segment is not None:
            image_eos.append(rows.append(encoded.image_segment, image) + len(encoded.image_segment) - 1)
            image_keys.append(slot.image_key)
        image += encoded.has_image

    pairs = [encoded for _, encoded in good if encoded.image_segment is not None]
    caption_eos = [rows.append(pair.caption_segment) + len(pair.caption_segment) - 1 for pair in pairs]
    hallucinated = [(owner, segment) for owner, pair in enumerate(pairs) for segment in pair.hallucinated_segments]
    hallucinated_eos = [rows.append(segment) + len(segment) - 1 for _, segment in hallucinated]

    num_padding_rows = -rows.length % pad_multiple if rows.length else pad_multiple
    if num_padding_rows:
        rows.append(np.zeros(num_padding_rows, dtype=np.int64))

    return PackedBatch(
        sample_ids=_int64([slot.sample_id for slot in slots]),
        token_ids=_joined(rows.token_ids),
        position_ids=_joined(rows.position_ids),
        cu_seqlens=torch.tensor(rows.borders, dtype=torch.int32),
        max_seqlen=max(np.diff(rows.borders).tolist()),
        pixel_values=pixel_values.contiguous(),
        image_rows=_joined(rows.image_rows),
        feature_rows=_joined(rows.feature_rows),
        target_rows=_joined(targets),
        target_ids=_joined(target_ids),
        image_eos_rows=_int64(image_eos),
        caption_eos_rows=_int64(caption_eos),
        hallucinated_eos_rows=_int64(hallucinated_eos),
        hallucinated_owner=_int64([owner for owner, _ in hallucinated]),
        image_keys=_int64(image_keys),
        caption_keys=_int64([pair.caption_key for pair in pairs]),
        hallucinated_keys=_int64([key for pair in pairs for key in pair.hallucinated_keys]),
        num_padding_rows=num_padding_rows,
    )


class _Rows:
    """The rows of the pack, segment after segment."""

    def __init__(self, visual_tokens: int):
        self.visual_tokens = visual_tokens
        self.borders = [0]
        self.token_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.image_rows: list[np.ndarray] = []
        self.feature_rows: list[np.ndarray] = []

    @property
    def length(self) -> int:
        return self.borders[-1]

    def append(self, segment: np.ndarray, image: int | None = None) -> int:
        """Adds a segment, whose image rows take the features of the `image`-th image; returns its first row."""
        begin = self.length
        is_image = segment == IMAGE
        (positions,) = np.nonzero(is_image)
        if len(positions):
            assert image is not None and len(positions) == self.visual_tokens, (image, len(positions))
            self.image_rows.append(positions + begin)
            self.feature_rows.append(np.arange(self.visual_tokens, dtype=np.int64) + image * self.visual_tokens)
        self.token_ids.append(np.where(is_image, 0, segment))
        self.position_ids.append(np.arange(len(segment), dtype=np.int64))
        self.borders.append(begin + len(segment))
        return begin


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)) if parts else _int64([])


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
