"""The contract between data and model: one packed micro-batch, and the records that travel with it.

Everything that depends on text (lengths, labels, segment borders, where images and EOS tokens stand) is
fixed by the packer (`hacl_megatron.data.packing`). The model only scatters image features, runs, and picks
rows; nothing in it looks for a special token.

Shape legend, used throughout the package:

    T  packed rows (tokens of all segments, then padding)     S  segments, the padding segment included
    I  views of images V  visual tokens a view                R  rows that take an image feature
    K  target rows     N  image-caption pairs                 M  hallucinated captions of those pairs
    Q  rows that are read                                     B  branches (segments that share a prefix)
    P  twins that a likelihood objective compares             J  rows that predict tokens of rejected answers alone

A sample gives up to four kinds of segments, laid out one after another:

    dialogue       [prompt, image tokens, answer ...]    rows with a target enter the language-model loss
    image + EOS    [image tokens, EOS]                   its last row is the image's global representation
    caption + EOS  [BOS, caption, EOS]                   its last row is the caption's
    hallucinated   [BOS, hallucinated caption, EOS]      of each; its last row is a hard negative of the pair
    rejected       [prompt, image tokens, twin ...]      of each twin, for a likelihood objective (`--preference-loss`)

Worked example: one pair, V = 2, dialogue `[BOS, img, img, "cat", </s>]`, caption `[BOS, "cat", EOS]`, no
hallucination, padded to a multiple of 4:

    row            0    1    2    3    4      5    6    7      8    9    10     11
    token_ids      BOS  0    0    cat  </s>   0    0    EOS    BOS  cat  EOS    0
    position_ids   0    1    2    3    4      0    1    2      0    1    2      0
    cu_seqlens     [0, 5, 8, 11, 12]          image_rows   [1, 2, 5, 6]
    target_rows    [2, 3]                     feature_rows [0, 1, 0, 1]
    target_ids     [cat, </s>]                image_eos_rows [7], caption_eos_rows [10]
    read_lengths   [3, 1, 1, 0]               read_rows    [2, 3, 4, 7, 10]

A target sits on the row that *predicts* it: `target_rows[k]` is the row whose logits are compared with
`target_ids[k]`, so no shift remains to be done anywhere else.

Only targets and EOS rows of the last layer are ever read, so its query, output and MLP run for those rows alone: of
each segment, from its first such row to its end (`read_rows`).

Where the image's EOS sees the very prefix that the dialogue has (`--contrastive-image-context prompt`), that prefix
is computed once. The EOS is a *branch*: a segment whose rows attend to the dialogue's first rows and to their own
segment's earlier ones, and which nothing else sees. In the example, with the prefix `[BOS, img, img]`:

    row            0    1    2    3    4      5      6    7    8      9 ...
    token_ids      BOS  0    0    cat  </s>   EOS    BOS  cat  EOS    0
    position_ids   0    1    2    3    4      3      0    1    2      0
    branch_rows    [5]     branch_sizes [1]   branch_lengths [4]      branch_context_rows [0, 1, 2, 5]

A rejected answer is a branch of the rows that it does not share with the true one: of the answer "a cat." and its twin
"a dog.", the rows `dog` and `.` hang on the prefix `[BOS, img, img, a]`. The row of `a` predicts `cat` and, as one of
`rejected_rows`, `dog` too.

A picture of any resolution becomes several views (`config.tiles`), a base view and tiles; else an image is one view.
Its rows then take features of its views, a learned newline row, or pooled features, each a weighted mean of four. The
model lays them in one table, whose rows `feature_rows` name: all features of the I views, the newline, the pooled ones.

A micro-batch may be cut into two packs (`MicroBatch`): one that runs ahead, forward only, and the main one.

The ranks of a context-parallel group (`--context-parallel-size`) all have the whole pack and run the layers for the
rows of their own `RowShare`.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

HOST_FIELDS = ("sample_ids", "hallucinated_owner", "image_keys", "caption_keys", "hallucinated_keys", "twin_sample_ids")
"""Fields of a pack that stay on the host: the model does not need them, and what is made of them decides sizes."""


def _no_integers() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _no_numbers() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


def _nothing_pooled() -> Tensor:
    return torch.empty(0, 4, dtype=torch.int64)


def _no_weights() -> Tensor:
    return torch.empty(0, 4, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One pack of one data-parallel rank's micro-batch. All tensors are contiguous and on the host when packed; when it
    runs, all but `HOST_FIELDS` are on the model's device.

    A pack that leaves out a kind of segment (`Parts`) has no EOS rows of that kind; the pairs' keys and owners are
    there all the same.
    """

    sample_ids: Tensor
    """int64 [samples]: manifest indices of the samples in this micro-batch, bad ones included."""

    token_ids: Tensor
    """int64 [T]: token ids; 0 on image rows (overwritten by features) and on padding rows."""
    position_ids: Tensor
    """int64 [T]: rotary position of each row, restarting at 0 in every segment."""
    cu_seqlens: Tensor
    """int32 [S + 1]: segment borders, from 0 to T. Attention never crosses one. Padding is the last segment."""
    max_seqlen: int
    """Length of the longest segment."""

    pixel_values: Tensor
    """float32 [I, 3, H, W]: normalised views, the samples' own and then crops of some. Of the same shape but on the
    meta device where no vision tower is."""
    image_rows: Tensor
    """int64 [R]: packed rows that take an image feature. An image may stand in two segments (dialogue, EOS)."""
    feature_rows: Tensor
    """int64 [R]: for each of `image_rows`, the row of the table of features that it takes: below I * V one of the
    flattened features [I * V, hidden]; I * V the newline; from I * V + 1 on the pooled features."""

    target_rows: Tensor
    """int64 [K]: rows whose logits enter the language-model loss, ascending."""
    target_ids: Tensor
    """int64 [K]: the token that each target row must predict."""

    image_eos_rows: Tensor
    """int64 [N or 0]: EOS row of each pair's image."""
    caption_eos_rows: Tensor
    """int64 [N or 0]: EOS row of each pair's caption segment."""
    hallucinated_eos_rows: Tensor
    """int64 [M or 0]: EOS row of each hallucinated caption's segment."""
    hallucinated_owner: Tensor
    """int64 [M]: which of this micro-batch's N pairs each hallucinated caption belongs to, ascending."""

    image_keys: Tensor
    """int64 [N]: 64-bit hash of each pair's image; equal keys mean equal images (`--mask-duplicates`)."""
    caption_keys: Tensor
    """int64 [N]: 64-bit hash of each pair's caption token ids."""
    hallucinated_keys: Tensor
    """int64 [M]: 64-bit hash of each hallucinated caption's token ids, comparable with `caption_keys`."""

    read_rows: Tensor
    """int64 [Q]: rows whose last-layer state is read, ascending: of each segment, its first target or EOS row and all
    behind it. At least one."""
    read_lengths: Tensor
    """int32 [S]: how many rows at the end of each segment are read."""

    branch_rows: Tensor
    """int64 [sum of branch_sizes]: rows of segments that share a dialogue's first rows, branch after branch, ascending;
    all are read. Each branch is a segment of its own."""
    branch_sizes: Tensor
    """int32 [B]: rows of each branch."""
    branch_lengths: Tensor
    """int32 [B]: how many rows each branch's last row attends to: its prefix and the branch."""
    branch_context_rows: Tensor
    """int64 [sum of branch_lengths]: those rows, branch after branch, each branch's own rows last."""

    pooled_rows: Tensor = field(default_factory=_nothing_pooled)
    """int64 [pooled features, 4]: flattened features that each is a mean of."""
    pooled_weights: Tensor = field(default_factory=_no_weights)
    """float32 [pooled features, 4]: with these weights."""

    rejected_rows: Tensor = field(default_factory=_no_integers)
    """int64 [J]: rows whose logits enter the likelihood objective alone, for tokens that the true answers lack."""
    rejected_ids: Tensor = field(default_factory=_no_integers)
    """int64 [J]: the token whose likelihood is wanted of each."""
    preference_tokens: Tensor = field(default_factory=_no_integers)
    """int64 [E]: which of the K targets, then the J rejected tokens, enter the sums that are compared: for each twin
    the true answer's tokens, then the twin's."""
    preference_lengths: Tensor = field(default_factory=_no_integers)
    """int64 [A P]: how many of them are the true answer's, how many the twin's, and, where A is 3, how many the true
    answer's behind a crop of the image; twin after twin."""
    answers_per_twin: int = 2
    """A"""
    reference_likelihoods: Tensor = field(default_factory=_no_numbers)
    """float64 [A P]: what the weights that the run started from make of those sums, for an objective with a reference;
    else empty."""
    twin_sample_ids: Tensor = field(default_factory=_no_integers)
    """int64 [P]: manifest index of each twin's sample; a sample's twins stand in their own order."""

    shared_out_by: int = 0
    """20 bits of hash of the lengths by which the global batch was shared out among ranks; 0: by number alone."""
    num_padding_rows: int
    """Rows at the end of the pack that belong to no sample."""
    num_text_rows: int
    """Rows of caption and hallucinated-caption segments."""
    lengths: "SegmentLengths" = None  # type: ignore[assignment]
    """Lengths on the host, wherever the tensors are; left out, they are read from the tensors of a pack on the host."""
    share: "RowShare | None" = None
    """The rows of this context-parallel rank; None: all of them."""

    def __post_init__(self) -> None:
        if self.lengths is None:
            assert not self.cu_seqlens.is_cuda, "to read the lengths back would wait for the device"
            object.__setattr__(self, "lengths", SegmentLengths.of(self))

    @property
    def num_pairs(self) -> int:
        return self.image_keys.numel()

    @property
    def num_targets(self) -> int:
        return self.target_rows.numel()

    @property
    def num_preferences(self) -> int:
        return self.preference_lengths.numel() // self.answers_per_twin

    @property
    def wanted_rows(self) -> Tensor:
        """int64 [K + J + 2N + M]: rows whose final states are wanted: targets', rejected tokens', and `eos_rows`."""
        return torch.cat([self.target_rows, self.rejected_rows, *self.eos_rows])

    @property
    def eos_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """EOS rows of images, captions and hallucinated captions."""
        return self.image_eos_rows, self.caption_eos_rows, self.hallucinated_eos_rows

    @property
    def num_images(self) -> int:
        return self.pixel_values.shape[0]

    @property
    def num_rows(self) -> int:
        return self.token_ids.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor but `HOST_FIELDS` on `device`."""
        names = [item.name for item in fields(self) if item.type is Tensor and item.name not in HOST_FIELDS]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, kw_only=True)
class SegmentLengths:
    """Lengths of a pack on the host, for loops over segments."""

    segments: tuple[int, ...]
    """[S]: rows of each segment."""
    read: tuple[int, ...]
    """[S]: `PackedBatch.read_lengths`."""
    branches: tuple[int, ...]
    """[B]: `PackedBatch.branch_lengths`."""
    branch_sizes: tuple[int, ...]
    """[B]: `PackedBatch.branch_sizes`."""

    @classmethod
    def of(cls, batch: PackedBatch) -> "SegmentLengths":
        """The lengths of a pack on the host; on a device `PackedBatch.lengths` has them."""
        return cls.of_tensors(batch.cu_seqlens, batch.read_lengths, batch.branch_lengths, batch.branch_sizes)

    @classmethod
    def of_tensors(
        cls, cu_seqlens: Tensor, read_lengths: Tensor, branch_lengths: Tensor, branch_sizes: Tensor
    ) -> "SegmentLengths":
        """The same from the four fields of a pack, on the host."""
        return cls(
            segments=tuple(cu_seqlens.diff().tolist()),
            read=tuple(read_lengths.tolist()),
            branches=tuple(branch_lengths.tolist()),
            branch_sizes=tuple(branch_sizes.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The rows of a pack that one context-parallel rank runs, and whom each may see (`assemble.row_shares`).

    A rank holds *pieces* of segments, in the pack's order: T' = T / ranks rows in all, counted from 0 on here. A piece
    sees its segment from the beginning (of a branch its prefix first) to its own end. These rows stand on all ranks, so
    keys and values are gathered.
    """

    group: ProcessGroup
    """The ranks that share the pack."""
    token_ids: Tensor
    """int64 [T'], as the pack's of this name; so are the next three."""
    position_ids: Tensor
    """int64 [T']"""
    image_rows: Tensor
    """int64 [R']"""
    feature_rows: Tensor
    """int64 [R']"""
    read_rows: Tensor
    """int64 [Q']: own rows that are read, at the end of each piece; at least one on every rank."""
    wanted_rows: Tensor
    """int64 [W']: own rows whose final states are wanted, of the pack's `PackedBatch.wanted_rows`."""
    wanted_places: Tensor
    """int64 [W']: which of these they are."""
    token_places: Tensor
    """int64 [K' + J']: which of the pack's targets, then rejected tokens, this rank makes logits of: an equal part of
    all, whoever has their rows."""
    context_rows: Tensor
    """int64 [sum of lengths]: rows that each piece's last row sees, piece after piece, its own rows last; as they are
    numbered where all ranks' rows stand one after another."""
    sizes: Tensor
    """int32 [pieces]: rows of each piece."""
    reads: Tensor
    """int32 [pieces]: how many rows at its end are read."""
    lengths: Tensor
    """int32 [pieces]: how many rows its last row sees."""
    on_host: "PieceLengths"


@dataclass(frozen=True, kw_only=True)
class PieceLengths:
    """The last three of a `RowShare` on the host."""

    sizes: tuple[int, ...]
    reads: tuple[int, ...]
    lengths: tuple[int, ...]


def rows_to_read(cu_seqlens: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
    """(`read_rows`, `read_lengths`) of a pack with borders `cu_seqlens` [S + 1] in which `rows` are read.

    From a segment's first such row on everything is read: varlen attention kernels take queries from the end of a
    segment, and behind the first target there is seldom much else. Without any row the last row is read, since
    kernels do not like to be called for nothing.
    """
    borders = cu_seqlens.long()
    wanted = torch.cat([*rows]).long()
    segment = torch.searchsorted(borders, wanted, right=True) - 1
    first = borders[1:].scatter_reduce(0, segment, wanted, "amin")
    if wanted.numel() == 0:
        first[-1] = borders[-1] - 1
    lengths = borders[1:] - first
    is_read = torch.arange(int(borders[-1])) >= first.repeat_interleave(borders.diff())
    return is_read.nonzero().flatten(), lengths.int()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Which segments of its samples a pack holds."""

    dialogues: bool = True
    images: Literal["none", "segment", "branch"] = "segment"
    """The pairs' images: not at all, as segments of their own, or, where the image's context is the dialogue's prefix,
    as branches of it."""
    texts: bool = True
    """Captions and hallucinated captions."""
    preferences: Literal["none", "segment", "branch"] = "none"
    """Rejected answers of a likelihood objective: not at all, each as a segment of its own with prompt and image once
    more (to measure against), or as branches of their dialogues."""

    @property
    def has_pairs(self) -> bool:
        """Without images and texts the samples count as dialogues alone."""
        return self.images != "none" or self.texts


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """How a micro-batch is cut into packs."""

    main: Parts = Parts()
    """What runs with gradients."""
    ahead: Parts | None = None
    """What runs before, forward only: text whose path holds no trained parameter, and, for negatives over several
    micro-batches, whatever embeddings are needed before the first gradient."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The packs of one micro-batch."""

    main: PackedBatch
    ahead: PackedBatch | None = None
    """Its `pixel_values` are empty [0, 3, H, W]: its images are the main pack's."""

    @property
    def num_rows_once(self) -> int:
        """Rows of its samples, padding left out and what runs twice counted once."""
        rows = self.main.num_rows - self.main.num_padding_rows
        if self.ahead is not None and not self.main.num_text_rows:
            rows += self.ahead.num_text_rows
        return rows


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

    micro_batches: list[MicroBatch]
    data_state: dict[str, Any]
    """What `Sampler.load_state_dict` takes; the same on every rank, plain ints and strings only."""
    bad_samples: list[BadSample] = field(default_factory=list)
    untrained_samples: list[BadSample] = field(default_factory=list)
    """Samples that were used and train nothing: no target token and no pair."""
    uncompared_twins: list[BadSample] = field(default_factory=list)
    """Twins of samples that were used which give a likelihood objective nothing."""
    num_tokenization_mismatches: int = 0
    """Dialogues whose labels were all ignored by LLaVA's mismatch rule."""
    num_truncated: int = 0
    """Dialogues cut at `--model-max-length`."""
