"""Caption preference: does the model find the true caption likelier than its hallucinated twins, given the image?

Each caption is an answer in the training's own dialogue template, teacher-forced. Summed log-likelihoods favour short
captions, those per token favour predictable long ones; both are reported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hacl_megatron.batch import Parts
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings, UnusableSample
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.likelihood.task import (
    AnswerLikelihood,
    ItemOutput,
    ManifestTask,
    twins,
    with_answer,
    with_unusable,
)
from hacl_megatron.evaluation.scores import Scores, ratio

CAPTION_QUESTION = "Provide a one-sentence caption for the provided image."
"""What LLaVA-1.5's fine-tuning data asks for a caption by (its TextCaps part)."""


class Preference(ManifestTask):
    """Samples with an image, a caption and at least one hallucinated caption that differs from it.

    Args:
        question: asked in the template `v1` where a sample does not itself ask for its caption.
    """

    name = "preference"
    parts = Parts(images="none", texts=False)
    needs = "an image, a caption and a hallucinated caption"

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        settings: EncodingSettings,
        *,
        limit: int | None = None,
        question: str = CAPTION_QUESTION,
    ) -> None:
        self.question = question
        super().__init__(manifest, tokenizer, settings, limit=limit)

    def takes(self, sample: Sample) -> bool:
        return len(sample.images) == len(sample.pairs) == 1 and len(twins(sample)) > 0

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        caption, different = self.answers(key, size)
        if not different:
            raise UnusableSample("each of its hallucinated captions is its caption, token for token")
        return [caption, *(twin for _, twin in different)]

    def texts(self, sample: Sample) -> tuple[str, str, tuple[str, ...]]:
        """What is asked, the caption that answers it, and its twins."""
        return _own_question(sample) or self.question, sample.caption, twins(sample)

    def answers(self, key: int, size: tuple[int, int]) -> tuple[EncodedSample, list[tuple[str, EncodedSample]]]:
        """The dialogue with the caption for answer; and each twin whose tokens are others, with its dialogue."""
        question, true, false = self.texts(self.manifest[key])
        caption, *others = [with_answer(question, text, size, self.tokenizer, self.settings) for text in (true, *false)]
        named = zip(false, others, strict=True)
        return caption, [(text, twin) for text, twin in named if not np.array_equal(twin.dialogue, caption.dialogue)]

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        caption, *hallucinated = [
            {"log_likelihood": answer.log_likelihood, "num_tokens": answer.num_tokens} for answer in output.answers
        ]
        return {"caption": caption, "hallucinated": hallucinated}

    def score(self, records: Sequence[dict[str, Any]]) -> Scores:
        """Shares of captions likelier than every own twin, and mean margins over all twins."""
        good = [record for record in records if "error" not in record]
        num_twins = 0
        preferred = {"sum": 0, "per token": 0}
        margins = {"sum": 0.0, "per token": 0.0}
        for record in good:
            caption = _values(record["caption"])
            differences = [
                {kind: caption[kind] - value for kind, value in _values(twin).items()}
                for twin in record["hallucinated"]
            ]
            num_twins += len(differences)
            for kind in preferred:
                preferred[kind] += all(difference[kind] > 0 for difference in differences)
                margins[kind] += sum(difference[kind] for difference in differences)
        scores = Scores(
            task=self.name,
            metrics={
                **{f"accuracy {kind}": ratio(number, len(good)) for kind, number in preferred.items()},
                **{f"margin {kind}": ratio(total, num_twins) for kind, total in margins.items()},
            },
            counts={"samples": len(good), "hallucinated captions": num_twins},
        )
        return with_unusable(scores, records, "are left out")


def _own_question(sample: Sample) -> str | None:
    """The sample's first question, if the caption is its answer."""
    if len(sample.conversations) < 2:
        return None
    (asker, question), (_, answer) = sample.conversations[:2]
    own = asker == "human" and isinstance(question, str) and isinstance(answer, str)
    return question if own and answer.strip() == sample.caption else None


def _values(likelihood: dict[str, Any]) -> dict[str, float]:
    answer = AnswerLikelihood(**likelihood)
    return {"sum": answer.log_likelihood, "per token": answer.per_token}
