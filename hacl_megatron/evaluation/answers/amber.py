"""AMBER (arXiv 2311.07397): descriptions and yes-or-no questions, scored as AMBER's `inference.py` scores them.

    annotations  [{"id": 1, "type": "generative", "truth": ["sky", …], "hallu": ["cloud", …]},
                  {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}, …]
    answers      [{"id": 1, "response": "A lake below a blue sky."}, {"id": 1005, "response": "Yes"}, …]

    generative       nouns of the response that AMBER knows ─┬─ in `truth` or standing for one    → Cover
                                                             ├─ in `hallu` or standing for one    → Cog
                                                             └─ in no way in the image            → CHAIR, Hal
    discriminative   "Yes" or "No", word for word; accuracy, and precision, recall and F1 of "No"

What stands for what is AMBER's `relation.json`, and with `SpacyNouns` also every near synonym. Percentages are rounded
to one digit before F1 is made of them, and denominators are 0.001 larger than the counts, as published.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.regular import only_regular
from hacl_megatron.evaluation.answers.amber_nouns import NounReader
from hacl_megatron.evaluation.json_files import expect_text, read_json, read_records
from hacl_megatron.evaluation.scores import Scores

_STATE, _NUMBER, _ACTION = (f"discriminative-attribute-{kind}" for kind in ("state", "number", "action"))
_EXISTENCE, _RELATION = "discriminative-hallucination", ("discriminative-relation", "relation")
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "discriminative": (_EXISTENCE, _STATE, _NUMBER, _ACTION, *_RELATION),
    "existence": (_EXISTENCE,),
    "attribute": (_STATE, _NUMBER, _ACTION),
    "state": (_STATE,),
    "number": (_NUMBER,),
    "action": (_ACTION,),
    "relation": _RELATION,
}
"""What AMBER's script reports, in its order, and the annotation types that each is made of."""

_START = 0.001
"""What AMBER's metrics.txt starts every denominator with; those of `attribute` are the sums of three."""


class WordLists:
    """AMBER's `relation.json` (an object and what may stand for it) and `safe_words.txt` (never counted)."""

    def __init__(self, association: Mapping[str, Sequence[str]], safe_words: Sequence[str]) -> None:
        self.association = association
        self.safe_words = frozenset(safe_words)
        self.known = frozenset(association).union(*association.values())
        """Every word that AMBER looks at."""

    @classmethod
    def read(cls, association: Path, safe_words: Path) -> "WordLists":
        try:
            with open(safe_words, encoding="utf-8", opener=only_regular) as file:
                safe = file.read().split("\n")
        except OSError as error:
            raise ValueError(
                f"{safe_words}: AMBER's safe words cannot be read ({error.strerror}); they lie beside its annotations, "
                "or give --amber-words the folder of relation.json and safe_words.txt"
            ) from None
        return cls(read_json(association), safe)


def read_annotations(path: Path) -> dict[int, dict[str, Any]]:
    """AMBER's annotations by id. Raises ValueError for a type that AMBER does not have."""
    known = {"generative", *DIMENSIONS["discriminative"]}
    annotations = {}
    for record in read_records(path, needed=("id", "type", "truth"), kind="AMBER annotations"):
        if record["type"] not in known:
            raise ValueError(
                f"{path}: id {record['id']} is of type {record['type']!r}, expected one of {sorted(known)}"
            )
        annotations[record["id"]] = record
    return annotations


def score_amber(
    annotations: Mapping[int, dict[str, Any]],
    answers: Sequence[dict[str, Any]],
    *,
    words: WordLists | None = None,
    nouns: NounReader | None = None,
    where: Path | str = "answers",
) -> Scores:
    """AMBER's metrics for the dimensions that were answered, of the questions that were answered.

    Args:
        words, nouns: needed where an answer describes an image (`needs_nouns`).
        where: the answers' file, for messages.

    Raises:
        ValueError: an id that has no annotation or two answers, a response that is no string.
    """
    seen: set[int] = set()
    generative, verdicts = [], defaultdict(list)
    oddly_worded = 0
    for number, answer in enumerate(answers, 1):
        id, response = answer["id"], expect_text(answer, "response", where, number)
        if id not in annotations:
            raise ValueError(f"{where}, record {number}: id {id!r} has no annotation; take AMBER's annotations.json")
        if id in seen:
            raise ValueError(f"{where}, record {number}: a second answer to id {id}; give one each")
        seen.add(id)
        annotation = annotations[id]
        if annotation["type"] == "generative":
            generative.append((annotation, response))
        else:
            verdicts[annotation["type"]].append((annotation["truth"], response))
            oddly_worded += response not in ("Yes", "No")
    metrics: dict[str, float | None] = {}
    notes: list[str] = []
    if generative:
        assert words is not None and nouns is not None, "descriptions need word lists and a noun reader"
        metrics.update(_generative(generative, words, nouns))
        notes += nouns.notes
    for dimension, types in DIMENSIONS.items():
        if pairs := [pair for kind in types for pair in verdicts.get(kind, ())]:
            metrics.update(_discriminative(dimension, pairs))
    if oddly_worded:
        notes.append(f"{oddly_worded} responses are neither 'Yes' nor 'No': AMBER counts them as wrong")
    counts = {"annotations": len(annotations), "answers": len(answers), "descriptions": len(generative)}
    counts.update({f"{name} questions": sum(len(verdicts.get(kind, ())) for kind in types)
                   for name, types in DIMENSIONS.items()})  # fmt: skip
    return Scores(task="amber", metrics=metrics, counts=counts, notes=tuple(notes))


def needs_nouns(annotations: Mapping[int, dict[str, Any]], answers: Sequence[dict[str, Any]]) -> bool:
    """Whether any of the answers describes an image."""
    return any(annotations.get(answer["id"], {}).get("type") == "generative" for answer in answers)


def _percent(part: int, whole: int, start: float = _START) -> float:
    return round(part / (whole + start) * 100, 1)


def _discriminative(dimension: str, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Metrics of (truth, response) pairs; "No", a hallucination denied, is the positive answer."""
    start = 3 * _START if dimension == "attribute" else _START
    steadying = 0.001 if dimension == "existence" else 0.0001  # as published: one of seven is another number
    correct = sum(response == ("Yes" if truth == "yes" else "No") for truth, response in pairs)
    no_truths = sum(truth != "yes" for truth, _ in pairs)
    no_answers = [truth for truth, response in pairs if response == "No"]
    precision = _percent(no_answers.count("no"), len(no_answers), start)
    recall = _percent(sum(truth != "yes" for truth in no_answers), no_truths, start)
    p, r = precision / 100, recall / 100
    return {
        f"{dimension} accuracy": _percent(correct, len(pairs), start),
        f"{dimension} precision": precision,
        f"{dimension} recall": recall,
        f"{dimension} F1": round(2 * p * r / (p + r + steadying) * 100, 1),
    }


def _generative(
    described: Sequence[tuple[dict[str, Any], str]], words: WordLists, nouns: NounReader
) -> dict[str, float]:
    """CHAIR, Cover, Hal and Cog over (annotation, response) pairs."""
    hallucinated = mentioned = covered = coverable = fell_for = temptations = clean = 0
    for annotation, response in described:
        truth, hallu = _Objects(annotation["truth"], words), _Objects(annotation["hallu"], words)
        found = [noun for noun in nouns.nouns(response, words.known) if noun in words.known]
        wrong = 0
        for noun in found:
            if noun in words.safe_words or truth.name(noun):
                continue
            hallu.name(noun)
            hallu.name_similar(noun, nouns)
            wrong += not truth.name_similar(noun, nouns)
        hallucinated += wrong
        mentioned += len(found)
        covered += sum(truth.named)
        coverable += len(truth.named)
        fell_for += sum(hallu.named)
        temptations += len(hallu.named)
        clean += wrong == 0
    return {
        "CHAIR": _percent(hallucinated, mentioned),
        "Cover": _percent(covered, coverable),
        "Hal": round(100 - clean / (len(described) + _START) * 100, 1),
        "Cog": _percent(fell_for, temptations),
    }


class _Objects:
    """The annotated objects of one image, and which of them a response has named so far."""

    def __init__(self, objects: Sequence[str], words: WordLists) -> None:
        self.named = [False] * len(objects)
        # Searched in this order, and the first that fits is named: of an object annotated twice, one alone.
        self._words = [(word, index) for index, name in enumerate(objects) for word in words.association[name]]
        self._words += [(name, index) for index, name in enumerate(objects)]

    def name(self, noun: str) -> bool:
        """Mark the object that `noun` is or stands for; whether there is one."""
        return self._mark(index for word, index in self._words if word == noun)

    def name_similar(self, noun: str, nouns: NounReader) -> bool:
        """Mark the first object with a near synonym; whether there is one."""
        return self._mark(index for word, index in self._words if nouns.similar(noun, word))

    def _mark(self, indices: Any) -> bool:
        index = next(iter(indices), None)
        if index is not None:
            self.named[index] = True
        return index is not None
