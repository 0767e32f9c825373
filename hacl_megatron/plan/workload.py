"""How many rows one micro-batch has, of which kind, in which pass they run and which of them the last layer reads.

Packs follow `training.packs`, their segments `data.packing`. No data is read: the lengths are averages (`Samples`),
printed with the plan and changed by flags.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hacl_megatron.batch import Parts
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.training.packs import pack_plan

PUBLISHED_SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
"""Entries of LLaVA-1.5's two published files, so that a run can be planned before they are downloaded."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Averages over the samples of a run: assumptions, unless they were given."""

    num_samples: int | None
    """Samples of one epoch; None: unknown."""
    image_share: float
    """Share of the samples with an image."""
    images_per_sample: float = 1
    """Images of a sample that has any."""
    image_size: tuple[int, int] = (640, 480)
    """(width, height) in pixels, from which a picture's tiles follow. Default: most of COCO's."""
    text_tokens: float
    """Rows of a dialogue beside its image."""
    target_tokens: float
    """Rows of a dialogue with a target."""
    question_tokens: float
    """Rows of a dialogue's text in front of its first target; the last layer runs for the rest."""
    pair_share: float
    """Share of the samples that are an image-caption pair."""
    caption_tokens: float
    """Rows of a caption's segment, BOS and EOS included; a hallucinated one is as long."""
    hallucinated_per_pair: float


def assumed_samples(config: RunConfig) -> Samples:
    """What LLaVA-1.5's data looks like, by template; `num_samples` from the names of its published files.

    plain: one short caption an image, every sample a pair. v1: dialogues of several turns, the first answer behind
    some 55 rows of system prompt and question, 40,688 of 665,298 without an image; pairs are what
    `--contrastive-data-path` mixes in, taken to be as many. With a likelihood objective and without that flag, every
    sample is taken to be one question about an image and an answer of 150 rows, with one twin as long.
    """
    names = [Path(path).name for path in config.data.data_path]
    known = [PUBLISHED_SAMPLES.get(name) for name in names]
    total = sum(known) if known and None not in known else None
    uses_twins = config.objective.contrastive_weight > 0 or config.preference.preference_loss != "none"
    hallucinated = 1.0 if uses_twins else 0.0
    if config.data.version == "plain":
        return Samples(
            num_samples=total, image_share=1.0, text_tokens=20, target_tokens=19, question_tokens=0, pair_share=1.0,
            caption_tokens=20, hallucinated_per_pair=hallucinated,
        )  # fmt: skip
    if config.preference.preference_loss != "none" and not config.data.contrastive_data_path:
        return Samples(
            num_samples=total, image_share=1.0, text_tokens=205, target_tokens=150, question_tokens=55, pair_share=1.0,
            caption_tokens=152, hallucinated_per_pair=hallucinated,
        )  # fmt: skip
    return Samples(
        num_samples=total, image_share=0.94, text_tokens=330, target_tokens=150, question_tokens=55,
        pair_share=0.5 if config.data.contrastive_data_path else 0.0, caption_tokens=20,
        hallucinated_per_pair=hallucinated,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Segments:
    """`count` segments of `length` rows."""

    kind: Literal["dialogue", "image", "text", "rejected", "padding"]
    count: float
    length: float
    read: float
    """Rows at the end of each that the last layer runs for."""
    context: float = 0
    """For branches (see `hacl_megatron.batch`): how many rows each's last row attends to."""

    @property
    def rows(self) -> float:
        return self.length * self.count

    @property
    def read_rows(self) -> float:
        return self.read * self.count

    @property
    def context_rows(self) -> float:
        """Rows that the branches' last rows attend to."""
        return self.context * self.count


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """One pack, in averages (or exactly, made from a real one)."""

    segments: tuple[Segments, ...]
    images: float
    """Views of images that the vision tower sees."""
    image_rows: float
    """Rows that take an image feature."""
    target_rows: float
    """Rows with logits: of targets, and of rejected answers' tokens."""

    def of_kind(self, kind: str) -> tuple[Segments, ...]:
        return tuple(part for part in self.segments if part.kind == kind)

    @property
    def rows(self) -> float:
        return sum(part.rows for part in self.segments)

    @property
    def read_rows(self) -> float:
        return sum(part.read_rows for part in self.segments)

    @property
    def branches(self) -> tuple[Segments, ...]:
        """The segments that hang on another."""
        return tuple(part for part in self.segments if part.context)


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """The packs of a micro-batch, and its pairs."""

    main: PackShape
    """What runs with gradients."""
    ahead: PackShape | None
    """What runs before, forward only."""
    pairs: float
    hallucinated: float

    @property
    def eos_rows(self) -> float:
        """Rows that the heads see."""
        return 2 * self.pairs + self.hallucinated

    @property
    def runs_once_ahead(self) -> tuple[Segments, ...]:
        """Texts that run ahead and not again: those of a frozen LLM."""
        return () if self.ahead is None or self.main.of_kind("text") else self.ahead.of_kind("text")

    @property
    def runs_twice(self) -> tuple[Segments, ...]:
        """Segments of `ahead` that the main pass repeats: the price of gradient caching."""
        if self.ahead is None:
            return ()
        once = (*self.runs_once_ahead, *self.ahead.of_kind("padding"))
        return tuple(part for part in self.ahead.segments if part not in once)


def num_micro_batches(config: RunConfig, layout: Layout, samples: Samples) -> int:
    """Micro-batches of one replica in one step; with `--micro-batch-tokens`, as many as the average step takes."""
    if layout.num_micro_batches is not None:
        return layout.num_micro_batches
    parts = replace(pack_plan(config, 1, with_gradients=True).main, texts=config.objective.contrastive_weight > 0)
    rows = _pack_shape(config, samples, layout.global_batch_size / layout.dp, parts).rows
    return max(1, math.ceil(rows / config.training.micro_batch_tokens))


def micro_batch_shape(
    config: RunConfig, samples: Samples, micro_batch_size: float, num_micro_batches: int
) -> MicroBatchShape:
    """The average micro-batch of `micro_batch_size` samples in a step of `num_micro_batches`."""
    plan = pack_plan(config, num_micro_batches, with_gradients=True)
    ahead = None
    if plan.ahead is not None:
        ahead = _pack_shape(config, samples, micro_batch_size, plan.ahead)
    pairs = samples.pair_share * micro_batch_size if plan.main.has_pairs else 0.0
    return MicroBatchShape(
        main=_pack_shape(config, samples, micro_batch_size, plan.main),
        ahead=ahead,
        pairs=pairs,
        hallucinated=pairs * samples.hallucinated_per_pair,
    )


def views_and_rows(config: RunConfig, samples: Samples) -> tuple[int, int]:
    """(views that the tower sees, rows) of one image."""
    alone = samples.images_per_sample == 1
    rows = config.architecture.image_layout.rows(samples.image_size, alone=alone)
    return rows.num_views, len(rows)


def _pack_shape(config: RunConfig, samples: Samples, micro_batch_size: float, parts: Parts) -> PackShape:
    views, visual = views_and_rows(config, samples)
    images = samples.image_share * samples.images_per_sample * micro_batch_size
    pairs = samples.pair_share * micro_batch_size
    prefix = 0
    if config.objective.contrastive_image_context == "prompt":
        prefix = 1 if config.data.version == "plain" else 40  # BOS, or the system prompt and `USER: ` behind it
    segments, image_rows = [], 0.0
    if parts.dialogues:
        of_images = samples.image_share * samples.images_per_sample * visual
        length = min(samples.text_tokens + of_images, config.data.model_max_length)
        read = min(max(samples.text_tokens - samples.question_tokens, samples.target_tokens), length)
        segments.append(Segments(kind="dialogue", count=micro_batch_size, length=length, read=read))
        image_rows += visual * images
    twins, twin_rows = 0.0, 0.0
    if parts.dialogues and parts.preferences != "none":
        # Nothing is taken to be shared but the prompt: twins that begin as their captions do take less.
        twins, twin_rows = pairs * samples.hallucinated_per_pair, max(samples.caption_tokens - 2, 1)
        before = visual + (1 if config.data.version == "plain" else samples.question_tokens)
        segments.append(
            Segments(kind="rejected", count=twins, length=twin_rows, read=twin_rows, context=before + twin_rows)
        )
    crops = pairs if twins and config.preference.preference_loss == "mdpo" else 0.0
    if crops:  # the true answer once more, behind a crop of its image
        segments.append(Segments(kind="rejected", count=crops, length=before + twin_rows, read=twin_rows))
        image_rows += visual * crops
    context = prefix + visual + 1
    if parts.images == "branch":
        segments.append(Segments(kind="image", count=pairs, length=1, read=1, context=context))
    elif parts.images == "segment":
        segments.append(Segments(kind="image", count=pairs, length=context, read=1))
        image_rows += visual * pairs
    if parts.texts:
        texts = pairs * (1 + samples.hallucinated_per_pair)
        segments.append(Segments(kind="text", count=texts, length=samples.caption_tokens, read=1))
    return PackShape(
        segments=tuple(part for part in segments if part.count),
        images=images * views + crops,
        image_rows=image_rows,
        target_rows=samples.target_tokens * micro_batch_size + (twins + crops) * twin_rows if parts.dialogues else 0.0,
    )
