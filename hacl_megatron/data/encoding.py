"""Where a sample's tokens are made: its dialogue in a conversation template, and the contrastive segments beside it.

    Sample ─checked_dialogue─→ Dialogue ─Template.pieces─→ ids, labels ─images expanded, cut─→ dialogue, labels
       ├ the same with a twin in an answer's place ──────────────────────────────────────────→ rejected answers
       └ its pairs ┬ image ──────────────────────────────────────────────────────────────────→ image rows, EOS
                   └ caption, hallucinated captions ─────────────────────────────────────────→ BOS, caption, EOS

The templates are in `hacl_megatron.data.templates`. What holds for all of them follows llava/train/train.py
(`preprocess_multimodal`), llava/mm_utils.py (`tokenizer_image_token`) and llava/model/llava_arch.py (expansion of the
image, truncation behind it) token for token, also where that code is odd: a message's blanks are stripped only if it
holds the image tag. Several tags in one message stay where they are, as in LLaVA-NeXT's own `preprocess_multimodal`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hacl_megatron.config.run import LOSSES, RunConfig
from hacl_megatron.config.tiles import ImageLayout, ImageRows
from hacl_megatron.data.manifest import IMAGE_TAG, Pair, Sample
from hacl_megatron.data.preferences import NothingToCompare, RejectedAnswer, rejected_answer
from hacl_megatron.data.templates import Template, find_template
from hacl_megatron.data.templates.template import IGNORE, IMAGE, Dialogue, UnusableSample
from hacl_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What besides the tokenizer decides how a sample becomes rows."""

    version: str
    """Conversation template (`--version`)."""
    model_max_length: int
    """Longest segment in rows, counted after images are expanded (`--model-max-length`)."""
    image_layout: ImageLayout
    """What decides the rows that an image takes."""
    image_context: Literal["image", "prompt"] = "image"
    """What precedes the image's EOS (`--contrastive-image-context`)."""
    losses_that_train: frozenset[str] = frozenset(LOSSES)
    """`RunConfig.losses_that_train`; with `--contrastive-weight 0` nothing comes of a pair."""
    num_rows: int | None = None
    """Rows of the vocabulary, where a tokenizer may have more tokens; None: it has not."""
    preference_loss: Literal["none", "dpo", "mdpo", "phrase"] = "none"
    """Whether twins are encoded as rejected answers (`--preference-loss`)."""

    @classmethod
    def of(cls, config: RunConfig) -> "EncodingSettings":
        """As a run of this configuration encodes."""
        return cls(
            version=config.data.version,
            model_max_length=config.data.model_max_length,
            image_layout=config.architecture.image_layout,
            image_context=config.objective.contrastive_image_context,
            losses_that_train=config.losses_that_train,
            num_rows=config.architecture.language.vocab_size,
            preference_loss=config.preference.preference_loss,
        )


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """The segments of an image-caption pair."""

    image: int
    """Which of the sample's images it is."""
    image_segment: np.ndarray
    """[image rows, EOS], behind the dialogue's prefix with `image_context="prompt"`."""
    caption_segment: np.ndarray
    """[BOS, caption, EOS]"""
    hallucinated_segments: tuple[np.ndarray, ...] = ()
    """[BOS, hallucinated caption, EOS] each."""

    @property
    def caption_key(self) -> int:
        """`rows_key` of the caption segment."""
        return rows_key(self.caption_segment)

    @property
    def hallucinated_keys(self) -> tuple[int, ...]:
        """`rows_key` of each hallucinated segment."""
        return tuple(rows_key(segment) for segment in self.hallucinated_segments)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """The segments of one sample. Rows are int64 arrays of token ids, `IMAGE` where an image feature goes."""

    dialogue: np.ndarray
    """[L] rows of the conversation, as its template has it. The rows of its images stand in the images' order, or it
    shows none of them."""
    labels: np.ndarray
    """[L]: the token at the same position where it is trained on, else `IGNORE` (no shift, as in LLaVA)."""
    images: tuple[ImageRows, ...]
    """Of each of its images, which the packer then expects among the pixels."""
    pairs: tuple[EncodedPair, ...] = ()
    """Its image-caption pairs."""
    truncated: bool
    """Whether the dialogue was cut at `model_max_length`."""
    tokenization_mismatch: bool
    """Whether LLaVA's mismatch rule took all labels away."""
    untrained: str | None = None
    """Why the sample trains nothing, no row of its dialogue and no pair that counts; None where it trains something."""
    rejected: tuple[RejectedAnswer, ...] = ()
    """Its twins, for a likelihood objective."""
    answers_per_twin: int = 2
    """3: the true answer is also compared with itself behind a crop of the image."""
    uncompared: tuple[str, ...] = ()
    """Why each twin that is not among them gives that objective nothing."""


def encode(
    sample: Sample, tokenizer: Tokenizer, settings: EncodingSettings, sizes: Sequence[tuple[int, int]] = ()
) -> EncodedSample:
    """A sample's token rows, by its segments.

    Args:
        sizes: (width, height) in pixels of each of its images, as it is shown, where images' rows follow from them
            (`ImageLayout.needs_sizes`).

    Raises:
        UnusableSample: there are none, with the reason.
    """
    template, dialogue = find_template(settings.version), checked_dialogue(sample)
    limit, alone = settings.model_max_length, len(sample.images) == 1
    known = [*sizes] if settings.image_layout.needs_sizes else [None] * len(sample.images)
    images = tuple(settings.image_layout.rows(size, alone=alone) for size in known)
    assert len(images) == len(sample.images), "each image's size decides its rows"
    rejected: list[RejectedAnswer] = []
    uncompared: list[str] = []
    try:
        rows, labels, mismatch = _dialogue_rows(dialogue, template, tokenizer, settings, images)
        if settings.preference_loss != "none":
            rejected, uncompared = _rejected_answers(sample, rows, labels, template, tokenizer, settings, images)
        pairs = [_pair(pair, rows, images, template, tokenizer, settings) for pair in sample.pairs]
    except UnicodeError as error:
        raise UnusableSample(f"text does not tokenize: {error}") from error
    texts = [text for pair in pairs for text in (pair.caption_segment, *pair.hallucinated_segments)]
    _refuse_without_row([rows, *texts, *(answer.rejected_ids for answer in rejected)], tokenizer, settings)
    trains = settings.losses_that_train
    untrained = None
    if not ((pairs and "contrastive" in trains) or (rejected and "preference" in trains)):
        untrained = "it has no pair or twin that trains, and --generation-weight is 0"
        if "generation" in trains:
            untrained = _why_untrained(sample, labels, limit, mismatch)
    return EncodedSample(
        dialogue=rows[:limit],
        labels=labels[:limit],
        images=images,
        pairs=tuple(pairs),
        truncated=len(rows) > limit,
        tokenization_mismatch=mismatch,
        untrained=untrained,
        rejected=tuple(rejected),
        answers_per_twin=3 if settings.preference_loss == "mdpo" else 2,
        uncompared=tuple(uncompared),
    )


def _pair(
    pair: Pair,
    rows: np.ndarray,
    images: tuple[ImageRows, ...],
    template: Template,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
) -> EncodedPair:
    """The segments of a pair in the sample whose whole dialogue has these rows."""
    return EncodedPair(
        image=pair.image,
        image_segment=_image_segment(rows, pair.image, len(images[pair.image]), template, tokenizer, settings),
        caption_segment=_caption_segment(pair.caption, tokenizer, settings),
        hallucinated_segments=tuple(_caption_segment(text, tokenizer, settings) for text in pair.hallucinated),
    )


def _refuse_without_row(segments: list[np.ndarray], tokenizer: Tokenizer, settings: EncodingSettings) -> None:
    """UnusableSample for a token that the model has no row for, as CodeLlama's tokenizer has some."""
    if settings.num_rows is None or tokenizer.vocab_size <= settings.num_rows:
        return
    if (highest := max(int(rows.max()) for rows in segments if len(rows))) >= settings.num_rows:
        raise UnusableSample(
            f"the tokenizer makes {tokenizer.backend.convert_ids_to_tokens(highest)!r} token {highest}, for which the "
            f"model's {settings.num_rows} rows have none"
        )


def _rejected_answers(
    sample: Sample,
    rows: np.ndarray,
    labels: np.ndarray,
    template: Template,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    images: tuple[ImageRows, ...],
) -> tuple[list[RejectedAnswer], list[str]]:
    """The sample's twins behind its dialogue's rows, and why others give nothing."""
    rejected, uncompared = [], []
    for conversations in sample.twin_conversations():
        if conversations is None:
            uncompared.append("no answer of the dialogue is the caption that it is a twin of")
            continue
        if settings.preference_loss == "mdpo" and not (rows == IMAGE).any():
            uncompared.append("its dialogue shows no image, of which mdpo needs a crop")
            continue
        if settings.preference_loss == "mdpo" and len(images) > 1:
            uncompared.append(f"mdpo needs a crop of its image, and it has {len(images)}")
            continue
        try:
            twin = checked_dialogue(replace(sample, conversations=conversations))
            twin_rows, twin_labels, _ = _dialogue_rows(twin, template, tokenizer, settings, images)
            rejected.append(
                rejected_answer(
                    rows,
                    labels,
                    twin_rows,
                    twin_labels,
                    limit=settings.model_max_length,
                    whole=settings.preference_loss in ("dpo", "mdpo"),
                )
            )
        except (NothingToCompare, UnusableSample) as error:
            uncompared.append(str(error))
    return rejected, uncompared


def _why_untrained(sample: Sample, labels: np.ndarray, limit: int, mismatch: bool) -> str | None:
    """The kind of a dialogue without a target among its first `limit` rows; None where there is one."""
    if (labels[:limit] != IGNORE).any():
        return None
    if not any(value for role, value in sample.conversations if role == "gpt"):
        return "it has no answer with words"
    if sample.conversations[-1][0] == "human" and mismatch:
        return "it ends with a question, and LLaVA's mismatch rule takes all its labels away"
    if mismatch:
        return "LLaVA's mismatch rule takes all its labels away: its rounds do not tokenize to the length of the whole"
    if (labels[limit:] != IGNORE).any():
        return f"it is cut at --model-max-length {limit}, before any answer"
    return "no row of it is a target"


def rows_key(rows: np.ndarray) -> int:
    """64-bit blake2b of token ids as a signed integer: equal rows, equal keys, on every machine."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_keys(pair: Pair, tokenizer: Tokenizer, settings: EncodingSettings) -> list[int]:
    """`rows_key` of a pair's caption segment, then of each hallucinated one. Raises UnicodeError."""
    return [rows_key(_caption_segment(text, tokenizer, settings)) for text in (pair.caption, *pair.hallucinated)]


def checked_dialogue(sample: Sample) -> Dialogue:
    """The conversation, known to be strings with a tag for each image, as `preprocess_multimodal` leaves it.

    A message's only tag is moved to its front, on a line of its own; several stay where they are. One image may have no
    tag. Without an image, `<image>` is text. Raises UnusableSample with the reason where it cannot be used.
    """
    if not sample.conversations:
        raise UnusableSample("the dialogue has no turns")
    for number, (role, value) in enumerate(sample.conversations):
        if not isinstance(value, str):
            raise UnusableSample(f"the value of turn {number} is no string but {type(value).__name__}")
        if role == "system" and number:
            raise UnusableSample(f"turn {number} is from 'system', which may only be the first")
        if role not in ("human", "gpt", "system"):
            raise UnusableSample(f"turn {number} is from {role!r}, expected 'human' or 'gpt'")
    said, system = sample.conversations, None
    if said[0][0] == "system":
        system, said = said[0][1], said[1:]
        if not said:
            raise UnusableSample("the dialogue has no turns but a system prompt")
    if not sample.images:
        return Dialogue(turns=said, has_image=False, system=system)
    if system is not None and IMAGE_TAG in system:
        raise UnusableSample(f"the {IMAGE_TAG} tag is in the system prompt; expected it in a question")
    turns = list(said)
    num_tags = sum(value.count(IMAGE_TAG) for _, value in turns)
    if num_tags != len(sample.images) and (num_tags or len(sample.images) > 1):
        images = "1 image" if len(sample.images) == 1 else f"{len(sample.images)} images"
        raise UnusableSample(f"{num_tags} {IMAGE_TAG} tags for {images}; expected one for each")
    for number, (role, value) in enumerate(turns):
        if value.count(IMAGE_TAG) == 1:
            turns[number] = (role, f"{IMAGE_TAG}\n{value.replace(IMAGE_TAG, '').strip()}".strip())
    return Dialogue(turns=turns, has_image=True, system=system)


def _dialogue_rows(
    dialogue: Dialogue,
    template: Template,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    images: tuple[ImageRows, ...],
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Rows with those of images, not yet cut; labels of the same length; whether the mismatch rule struck."""
    ids: list[int] = []
    labels: list[int] | None = []
    for piece in template.pieces(dialogue, tokenizer):
        new, new_labels = piece.rows(tokenizer)
        ids += new
        labels += new_labels
    if template.find_labels is not None:
        labels = template.find_labels(ids, dialogue, tokenizer, settings.model_max_length)
    if template.trained_tokens is not None and labels is not None:
        trained = template.trained_tokens(tokenizer)
        # Nothing predicts the first row.
        labels = [IGNORE, *(i if i in trained else label for i, label in zip(ids[1:], labels[1:], strict=True))]
    mismatch = labels is None
    return *_expand_images(ids, [IGNORE] * len(ids) if mismatch else labels, tokenizer, settings, images), mismatch


def _expand_images(
    ids: list[int],
    labels: list[int],
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    images: tuple[ImageRows, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels with all rows of each image; raises UnusableSample if they do not fit."""
    rows, row_labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    # A "<unk>" written in a text looks like padding to LLaVA, which takes padding out before it expands the image.
    if tokenizer.unk_id is not None:
        kept = rows != tokenizer.unk_id
        rows, row_labels = rows[kept], row_labels[kept]
    (at,) = np.nonzero(rows == IMAGE)
    if not len(at):
        return rows, row_labels
    if len(at) != len(images):
        raise UnusableSample(
            f"--version {settings.version} shows {len(at)} of its {len(images)} images; expected all: use a template "
            "for several images"
        )
    counts = np.ones(len(rows), dtype=np.int64)
    counts[at] = [len(image) for image in images]
    if (end := int(counts[: at[-1] + 1].sum())) > settings.model_max_length:
        what = "the image's rows" if len(images) == 1 else f"the rows of its {len(images)} images"
        tiles = sum(image.num_views - 1 for image in images)
        of_tiles = f" ({tiles} tiles)" if tiles else ""
        raise UnusableSample(
            f"{what}{of_tiles} end at {end}, behind the longest length {settings.model_max_length}: raise "
            "--model-max-length"
        )
    row_labels[at] = IGNORE
    return np.repeat(rows, counts), np.repeat(row_labels, counts)


def _image_segment(
    dialogue: np.ndarray,
    image: int,
    num_rows: int,
    template: Template,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
) -> np.ndarray:
    """[image rows, EOS] of an image by its number, with `prompt` behind the very rows that precede the sample's first
    image in the dialogue."""
    prefix = np.empty(0, dtype=np.int64)
    if settings.image_context == "prompt":
        (image_rows,) = np.nonzero(dialogue == IMAGE)
        if len(image_rows):
            prefix = dialogue[: image_rows[0]]
        else:  # the conversation does not mention its image: what would precede it in the template
            prefix = np.asarray(template.image_prefix(tokenizer), dtype=np.int64)
    length = len(prefix) + num_rows + 1
    if length > settings.model_max_length:
        raise UnusableSample(
            f"the image and its EOS take {length} rows, the longest length is {settings.model_max_length}: raise "
            "--model-max-length"
        )
    return np.concatenate([prefix, np.full(num_rows, IMAGE), [tokenizer.eos_id]])


def _caption_segment(caption: str, tokenizer: Tokenizer, settings: EncodingSettings) -> np.ndarray:
    """[BOS, caption, EOS], the caption cut to the longest length."""
    ids = tokenizer.encode(caption, bos=True)[: settings.model_max_length - 1]
    return np.asarray([*ids, tokenizer.eos_id], dtype=np.int64)
