"""What the evaluations that generate nothing have in common: items in, records out, scores of all records.

    Task ─item_keys─→ key ─encode→ token rows of its sequences ─model→ ItemOutput ─record→ one JSON line ─score→ Scores

An item is one image with one or several sequences: a question with each possible answer, or a pair with its twins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from hacl_megatron.batch import Parts
from hacl_megatron.config.console import notify
from hacl_megatron.data.encoding import IGNORE, EncodedSample, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import IMAGE_TAG, Manifest, Sample
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.scores import Scores


@dataclass(frozen=True, kw_only=True)
class AnswerLikelihood:
    """How likely the model finds one answer, teacher-forced, with the token that ends it (`</s>`; plain: a newline)."""

    log_likelihood: float
    """Natural logarithm, summed over the answer's tokens."""
    num_tokens: int

    @property
    def per_token(self) -> float:
        return self.log_likelihood / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class ItemOutput:
    """What the model made of an item."""

    answers: tuple[AnswerLikelihood, ...] = ()
    """One for each sequence, for a task whose `parts` have dialogues."""
    image: np.ndarray | None = None
    """fp32 [d]: embedding of the image, for a task whose `parts` have none; likewise the others."""
    caption: np.ndarray | None = None
    """fp32 [d]"""
    hallucinated: np.ndarray | None = None
    """fp32 [M, d]"""
    states: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """fp32 [H], [H], [M, H]: last-layer states at the EOS of image, caption, hallucinated captions, where asked for."""

    @property
    def is_finite(self) -> bool:
        """Whether a model computed this whose numbers are numbers; comparisons with others come out as anything."""
        arrays = [self.image, self.caption, self.hallucinated, *(self.states or ())]
        numbers = [np.array([answer.log_likelihood for answer in self.answers]), *arrays]
        return all(bool(np.isfinite(array).all()) for array in numbers if array is not None)


class Task:
    """One kind of evaluation over one set of items. Lives on the ranks that read data."""

    name: ClassVar[str]
    parts: ClassVar[Parts]
    """What goes into the packs: dialogues alone, or pairs without dialogues."""

    def item_keys(self) -> list[int]:
        """The items, by numbers that stay the same when the evaluation is resumed."""
        raise NotImplementedError

    def image(self, key: int) -> str:
        """The item's image, relative to the image folder."""
        raise NotImplementedError

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        """Its sequences. Raises UnusableSample with the reason if it cannot be evaluated.

        Args:
            size: (width, height) of its image in pixels, as it is shown.
        """
        raise NotImplementedError

    def about(self, key: int) -> dict[str, Any]:
        """What a reader of the record wants to know of the item."""
        raise NotImplementedError

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        """What the record holds beside `about`, as JSON values."""
        raise NotImplementedError

    def score(self, records: Sequence[dict[str, Any]]) -> Scores:
        """Metrics of all items' records, in the order of `item_keys`; those with an `error` have nothing measured."""
        raise NotImplementedError


class ManifestTask(Task):
    """A task over the samples of LLaVA JSON files.

    Args:
        limit: take the first so many samples alone.

    Raises:
        ValueError: none of the samples is an item of the task.
    """

    needs: ClassVar[str]
    """What a sample must have, in words."""

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, settings: EncodingSettings, *, limit: int | None = None
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.settings = settings
        number = len(manifest) if limit is None else min(limit, len(manifest))
        self._keys, several = [], 0
        for key in range(number):
            sample = manifest[key]
            if self.takes(sample):
                self._keys.append(key)
            else:
                several += len(sample.images) > 1 and bool(sample.pairs)
        if several:
            notify(
                f"note: {self.name}: {several} of {number} samples have several images and are left out; an item is "
                "one image and its caption"
            )
        if not self._keys:
            raise ValueError(
                f"{manifest[0].source}: none of its first {number} samples has {self.needs}, which {self.name} needs; "
                "give data with the keys `text` and `Hallucination caption`, or leave the task out"
            )

    def takes(self, sample: Sample) -> bool:
        """Whether the sample is an item."""
        raise NotImplementedError

    def item_keys(self) -> list[int]:
        return self._keys

    def image(self, key: int) -> str:
        return self.manifest[key].image

    def about(self, key: int) -> dict[str, Any]:
        sample = self.manifest[key]
        return {"name": sample.name, "image": sample.image}


def twins(sample: Sample) -> tuple[str, ...]:
    """The sample's hallucinated captions that differ from its caption."""
    return tuple(text for text in sample.hallucinated_captions if text != sample.caption)


def with_answer(
    question: str, answer: str, size: tuple[int, int], tokenizer: Tokenizer, settings: EncodingSettings
) -> EncodedSample:
    """The dialogue of one question about an image and its answer, in the training's template, the answer for target.

    `plain` leaves the question out. Raises UnusableSample where no likelihood of the whole answer could be had.
    """
    sample = Sample(
        sample_id=0,
        name="",
        images=("image",),
        stored=(None,),
        conversations=(("human", f"{IMAGE_TAG}\n{question.replace(IMAGE_TAG, '').strip()}"), ("gpt", answer)),
        caption=None,
        hallucinated_captions=(),
        source="",
    )
    encoded = encode(sample, tokenizer, settings, [size])
    if encoded.truncated:
        raise UnusableSample(f"question and answer are longer than --model-max-length {settings.model_max_length}")
    if encoded.tokenization_mismatch or (encoded.labels == IGNORE).all():
        raise UnusableSample("the answer has no target tokens in the dialogue template (LLaVA's mismatch rule)")
    return encoded


def with_unusable(scores: Scores, records: Sequence[dict[str, Any]], treated: str) -> Scores:
    """`scores` with a note about the records that have an `error`, and their list; `treated` says how they count."""
    bad = [record for record in records if "error" in record]
    if not bad:
        return scores
    more = " ..." if len(bad) > 1 else ""
    listed = [{"key": record["key"], "reason": record["error"]} for record in bad]
    return replace(
        scores,
        counts={**scores.counts, "unusable items": len(bad)},
        notes=(*scores.notes, f"{len(bad)} items could not be evaluated and {treated}: {bad[0]['error']}{more}"),
        details={**scores.details, "unusable_items": listed},
    )
