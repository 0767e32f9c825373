"""Yes-or-no questions in POPE's format, answered by comparing likelihoods instead of generating.

The answer is the likelier of "Yes" and "No" behind the question, in the dialogue template as trained (`v1` for a
`plain` run), each with what ends it. The metrics are POPE's own (`hacl_megatron.evaluation.answers.pope`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.batch import Parts
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings
from hacl_megatron.data.templates import find_template
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.answers.benchmarks import SHORT_ANSWER
from hacl_megatron.evaluation.answers.pope import score_pope
from hacl_megatron.evaluation.json_files import expect_text, read_records
from hacl_megatron.evaluation.likelihood.task import ItemOutput, Task, with_answer, with_unusable
from hacl_megatron.evaluation.scores import Scores

YES, NO = "Yes", "No"


class YesNo(Task):
    """Questions of a POPE file, one JSON object a line: image, text, label.

    Args:
        suffix: text behind each question.

    Raises:
        ValueError: a file of another kind.
    """

    name = "yesno"
    parts = Parts(images="none", texts=False)

    def __init__(
        self, questions: Path, tokenizer: Tokenizer, settings: EncodingSettings, *, suffix: str = SHORT_ANSWER
    ) -> None:
        self.path = questions
        self.questions = read_records(questions, needed=("image", "text", "label"), kind="POPE questions")
        for number, question in enumerate(self.questions, 1):
            for key in ("image", "text", "label"):
                expect_text(question, key, questions, number)
        self.tokenizer = tokenizer
        self.settings = replace(settings, version=find_template(settings.version).question_template or settings.version)
        self.suffix = suffix

    def item_keys(self) -> list[int]:
        return list(range(len(self.questions)))

    def image(self, key: int) -> str:
        return self.questions[key]["image"]

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        question = self.questions[key]["text"] + self.suffix
        return [with_answer(question, answer, size, self.tokenizer, self.settings) for answer in (YES, NO)]

    def about(self, key: int) -> dict[str, Any]:
        question = self.questions[key]
        return {"question_id": question.get("question_id"), "question": question["text"], "image": question["image"]}

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        yes, no = (answer.log_likelihood for answer in output.answers)
        return {"answer": YES if yes > no else NO, "log_likelihood_yes": yes, "log_likelihood_no": no}

    def score(self, records: Sequence[dict[str, Any]]) -> Scores:
        answers = [{"question": record["question"], "answer": record.get("answer", "")} for record in records]
        scores = score_pope(self.questions, answers, where=self.path)
        good = [record for record in records if "error" not in record]
        margins = [abs(record["log_likelihood_yes"] - record["log_likelihood_no"]) for record in good]
        mean = sum(margins) / len(margins) if margins else math.nan
        scores = replace(
            scores,
            task=self.name,
            metrics={**scores.metrics, "mean margin": mean if math.isfinite(mean) else None},
            notes=(),
        )
        return with_unusable(scores, records, "count as yes, as POPE reads an empty answer")
