"""The contract between data and model: one packed micro-batch, and the records that travel with it.

Everything that depends on text (lengths, labels, segment borders, where images and EOS tokens stand) is
fixed by the packer (`hacl_megatron.data.packing`). The model only scatters image features, runs, and picks
rows; nothing in it looks for a special token.

Shape legend, used throughout the package:

    T  packed rows (tokens of all segments, then padding)     S  segments, the padding segment included
    I  images          V  visual tokens an image              R  rows that take an image feature
    K  target rows     N  image-caption pairs                 M  hallucinated captions of those pairs

A sample gives up to four segments, laid out one after another:

    dialogue       [prompt, image tokens, answer ...]    rows with a target enter the language-model loss
    image + EOS    [image tokens, EOS]                   its last row is the image's global representation
    caption + EOS  [BOS, caption, EOS]                   its last row is the caption's
    hallucinated   [BOS, hallucinated caption, EOS]      its last row is a hard negative of the pair

Worked example: one pair, V = 2, dialogue `[BOS, img, img, "cat", </s>]`, caption `[BOS, "cat", EOS]`, no
hallucination, padded to a multiple of 4:

    row            0    1    2    3    4      5    6    7      8    9    10     11
    token_ids      BOS  0    0    cat  </s>   0    0    EOS    BOS  cat  EOS    0
    position_ids   0    1    2    3    4      0    1    2      0    1    2      0
    cu_seqlens     [0, 5, 8, 11, 12]          image_rows   [1, 2, 5, 6]
    target_rows    [2, 3]                     feature_rows [0, 1, 0, 1]
    target_ids     [cat, </s>]                image_eos_rows [7], caption_eos_rows [10]

A target sits on the row that *predicts* it: `target_rows[k]` is the row whose logits are compared with
`target_ids[k]`, so no shift remains to be done anywhere else.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch of one data-parallel rank. All tensors are contiguous and on the host when packed."""

    sample_ids: Tensor
    """int64 [B]: manifest indices of the samples in this micro-batch, bad ones included."""

    token_ids: Tensor
    """int64 [T]: token ids; 0 on image rows (overwritten by features) and on padding rows."""
    position_ids: Tensor
    """int64 [T]: rotary position of each row, restarting at 0 in every segment."""
    cu_seqlens: Tensor
    """int32 [S + 1]: segment borders, from 0 to T. Attention never crosses one. Padding is the last segment."""
    max_seqlen: int
    """Length of the longest segment."""

    pixel_values: Tensor
    """float32 [I, 3, H, W]: normalised images. Of the same shape but on the meta device where no vision tower is."""
    image_rows: Tensor
    """int64 [R]: packed rows that take an image feature. An image may stand in two segments (dialogue, EOS)."""
    feature_rows: Tensor
    """int64 [R]: for each of `image_rows`, the row of the flattened features [I * V, hidden] it takes."""

    target_rows: Tensor
    """int64 [K]: rows whose logits enter the language-model loss, ascending."""
    target_ids: Tensor
    """int64 [K]: the token that each target row must predict."""

    image_eos_rows: Tensor
    """int64 [N]: EOS row of each pair's image segment."""
    caption_eos_rows: Tensor
    """int64 [N]: EOS row of each pair's caption segment."""
    hallucinated_eos_rows: Tensor
    """int64 [M]: EOS row of each hallucinated caption's segment."""
    hallucinated_owner: Tensor
    """int64 [M]: which of this micro-batch's N pairs each hallucinated caption belongs to, ascending."""

    image_keys: Tensor
    """int64 [N]: 64-bit hash of each pair's image; equal keys mean equal images (`--mask-duplicates`)."""
    caption_keys: Tensor
    """int64 [N]: 64-bit hash of each pair's caption token ids."""
    hallucinated_keys: Tensor
    """int64 [M]: 64-bit hash of each hallucinated caption's token ids, comparable with `caption_keys`."""

    num_padding_rows: int
    """Rows at the end of the pack that belong to no sample."""

    @property
    def num_pairs(self) -> int:
        return self.image_eos_rows.numel()

    @property
    def num_targets(self) -> int:
        return self.target_rows.numel()

    @property
    def num_images(self) -> int:
        return self.pixel_values.shape[0]

    @property
    def num_rows(self) -> int:
        return self.token_ids.numel()

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            moved[item.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return PackedBatch(**moved)


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be used; its slot contributes no target token and no pair."""

    sample_id: int
    """Manifest index."""
    name: str
    """The sample's own `id`, as its file gives it."""
    source: str
    """Image or JSON file at fault."""
    reason: str
    """One line for `bad_samples.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """All micro-batches that one data-parallel rank runs in one optimiser step, and the state *after* them.

    The state travels with its batches so that prefetching cannot skew a resume: a checkpoint stores the
    `data_state` of the last step that was trained on, whatever the loader has read ahead since.
    """

    micro_batches: list[PackedBatch]
    data_state: dict[str, Any]
    """What `Sampler.load_state_dict` takes; the same on every rank, plain ints and strings only."""
    bad_samples: list[BadSample] = field(default_factory=list)
    num_tokenization_mismatches: int = 0
    """Dialogues whose labels were all ignored by LLaVA's mismatch rule."""
    num_truncated: int = 0
    """Dialogues cut at `--model-max-length`."""
