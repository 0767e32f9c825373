"""POPE (arXiv 2305.10355): yes-or-no questions about objects, scored as AoiDragon/POPE's `evaluate.py` scores them.

    questions  {"question_id": 1, "image": "COCO_val2014_….jpg", "text": "Is there a car in the image?", "label": "no"}
    answers    {"question": "Is there a car in the image?", "answer": "No, there is none."}

one object a line, answers in the questions' order; LLaVA's answers ({"prompt": ..., "text": ...}, model_vqa_loader.py)
are taken too, and scored alike by its eval_pope.py. `random`, `popular` and `adversarial` are three files of questions
and are scored one by one.
"""

import re
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


_NEGATION = re.compile(
    r"\b(?:no|not|none|nope|nah|never|neither|cannot|without|negative|false|(?:is|are|was|were|do|does|ca|wo)nt)\b"
    r"|n['’]t\b|^\W*n\W*$",
    re.IGNORECASE,
)
_YES = re.compile(r"\W*(?:yes|yeah|yep)\b", re.IGNORECASE)
NAMED = 3
"""So many ambiguous answers are named in the table; the results file has them all."""


def contradicts_rule(answer: str) -> bool:
    """Whether a reader would take the answer for the opposite of what `says_yes` makes of it.

    "No\\n", "NO", "isn't" and "Not" are read as yes; "Yes, no doubt" and "yes, why not" as no. Empty ones are not
    meant: they say nothing.
    """
    sentence = answer.strip().split(".")[0]
    starts_with_yes = _YES.match(sentence) is not None
    if says_yes(answer):
        return not starts_with_yes and _NEGATION.search(sentence) is not None
    return starts_with_yes


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
    ambiguous: list[tuple[int, str, bool]] = []
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
        if contradicts_rule(text):
            ambiguous.append((number, text, yes))
        counts[f"{'true' if yes == (label == 'yes') else 'false'} {'positives' if yes else 'negatives'}"] += 1
    tp, fp, tn, fn = counts.values()
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    both = precision is not None and recall is not None and precision + recall > 0
    notes = [f"{empty} empty answers, which POPE's rule reads as yes"] if empty else []
    for reading, other in ((True, "no"), (False, "yes")):
        if some := [(number, text) for number, text, yes in ambiguous if yes is reading]:
            named = ", ".join(f"{number}: {text[:40]!r}" for number, text in some[:NAMED])
            notes.append(
                f"{len(some)} answers seem to say {other} and are read as {'yes' if reading else 'no'} by POPE's rule "
                f"(record {named}{', ...' if len(some) > NAMED else ''})"
            )
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
        notes=tuple(notes),
        details={
            "ambiguous_answers": [
                {"record": number, "answer": text, "read as": "yes" if yes else "no"} for number, text, yes in ambiguous
            ]
        }
        if ambiguous
        else {},
    )


def is_of_llava(answer: Any) -> bool:
    """Whether it is a line of LLaVA's `model_vqa_loader.py`."""
    return isinstance(answer, dict) and "text" in answer and "answer" not in answer


def of_llava(answer: dict[str, Any]) -> dict[str, Any]:
    """A line of LLaVA's `model_vqa_loader.py` with POPE's own keys beside its own."""
    prompt = {"question": answer["prompt"]} if "prompt" in answer else {}
    return {**answer, **prompt, "answer": answer["text"]}


def _same_question(asked: str, text: str) -> bool:
    """Whether the answer's own record of its question is the question; prompts may have a suffix behind it."""
    return " ".join(asked.lower().split()).startswith(" ".join(text.lower().split()))
