"""POPE (arXiv 2305.10355): yes-or-no questions about objects, scored as AoiDragon/POPE's `evaluate.py` scores them.

    questions  {"question_id": 1, "image": "COCO_val2014_….jpg", "text": "Is there a car in the image?", "label": "no"}
    answers    {"question": "Is there a car in the image?", "answer": "No, there is none."}

one object a line, answers in the questions' order. `random`, `popular` and `adversarial` are three files of questions
and are scored one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hacl_megatron.evaluation.json_files import expect_text
from hacl_megatron.evaluation.scores import Scores, ratio

NO_WORDS = frozenset(("No", "not", "no"))
"""`NO` and `Not` are read as yes, as published."""


def says_yes(answer: str) -> bool:
    """POPE's reading: the first sentence, without commas, means no if it has one of `NO_WORDS`, else yes.

    An empty answer therefore means yes.
    """
    return NO_WORDS.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))


def score_pope(
    questions: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], *, where: Path | str = "answers"
) -> Scores:
    """POPE's metrics; both in the same order, as POPE's own script needs it.

    Args:
        where: the answers' file, for messages.

    Raises:
        ValueError: the numbers differ, an answer repeats another question's text, or a label or answer is of a wrong
            kind.
    """
    if len(questions) != len(answers):
        raise ValueError(
            f"{where}: {len(answers)} answers to {len(questions)} questions; POPE pairs them by their order, so give "
            "one answer a question"
        )
    counts = {"true positives": 0, "false positives": 0, "true negatives": 0, "false negatives": 0}
    empty = 0
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        text, label = expect_text(answer, "answer", where, number), question["label"]
        if label not in ("yes", "no"):
            raise ValueError(f"question {number}: label {label!r}, expected yes or no")
        asked = answer.get("question")
        if isinstance(asked, str) and not _same_question(asked, question["text"]):
            raise ValueError(
                f"{where}, record {number}: answers {asked!r}, but question {number} is {question['text']!r}; the "
                "answers must be in the order of the questions"
            )
        empty += not text.strip()
        yes = says_yes(text)
        counts[f"{'true' if yes == (label == 'yes') else 'false'} {'positives' if yes else 'negatives'}"] += 1
    tp, fp, tn, fn = counts.values()
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    both = precision is not None and recall is not None and precision + recall > 0
    notes = (f"{empty} empty answers, which POPE's rule reads as yes",) if empty else ()
    return Scores(
        task="pope",
        metrics={
            "accuracy": ratio(tp + tn, len(questions)),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if both else None,
            "yes ratio": ratio(tp + fp, len(questions)),
        },
        counts={"questions": len(questions), **counts},
        notes=notes,
    )


def _same_question(asked: str, text: str) -> bool:
    """Whether the answer's own record of its question is the question; prompts may have a suffix behind it."""
    return " ".join(asked.lower().split()).startswith(" ".join(text.lower().split()))
