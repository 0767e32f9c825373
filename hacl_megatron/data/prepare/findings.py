"""What a JSON file holds that its owner should hear about: read in another way than it is written, or not at all.

read_records ─count(kind, name)→ Findings ─as_json→ manifest's metadata ─lines→ terminal, prepare's report
              find_unseen ──────────┘                                  └refuse_if_all→ ValueError
"""

import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hacl_megatron.config.console import printable
from hacl_megatron.data.prepare.records.keys import ANSWER_KEYS, HALLUCINATED_KEY, IMAGE_KEY, IMAGE_TAG, meant_by

NAMED = 3
"""So many records of a kind are named."""

Loss = Literal["image", "image in the dialogue", "hallucinated captions", "answer", "rejected answers"]
"""What a record has that training never sees; `image in the dialogue`: a template that asks for no tag does see it;
`rejected answers`: a run with --preference-loss does."""
IGNORED_REJECTED = "rejected answers are ignored, for --preference-loss is none"


@dataclass(kw_only=True)
class Found:
    """The records of one kind."""

    records: int = 0
    first: list[str] = field(default_factory=list)
    """Names of the first `NAMED`."""
    loss: Loss | None = None
    """What goes unseen; a record is counted once for each."""


class Findings:
    """How often each kind was met in a file, and the first records of it."""

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        """`known`: what `as_json` gave."""
        known = known or {}
        self.total: int = known.get("total", 0)
        """Records that were read."""
        self._kinds = {kind: Found(**found) for kind, found in known.get("kinds", {}).items()}

    def count(self, kind: str, name: str, loss: Loss | None = None) -> None:
        """`kind` says, as the end of a sentence, what was found and what becomes of it; `name` is the record's."""
        found = self._kinds.setdefault(kind, Found(loss=loss))
        found.records += 1
        if len(found.first) < NAMED:
            found.first.append(printable(name))

    def add(self, known: dict[str, Any]) -> None:
        """Counts what `as_json` of others says too."""
        for kind, found in known.get("kinds", {}).items():
            own = self._kinds.setdefault(kind, Found(loss=found["loss"]))
            own.records += found["records"]
            own.first += found["first"][: NAMED - len(own.first)]
        self.total += known.get("total", 0)

    def as_json(self) -> dict[str, Any]:
        return {"total": self.total, "kinds": {kind: asdict(found) for kind, found in self._kinds.items()}}

    def lines(self, without: Container[Loss | None] = ()) -> Iterator[str]:
        """`3 of 9 records (a, b, c): an image and no <image> tag`, one line a kind; none of the losses `without`."""
        for kind, found in self._kinds.items():
            if found.loss is None or found.loss not in without:
                yield f"{self._share(found)}: {kind}"

    def refuse_if_all(self, path: str, without: Container[Loss | None] = ()) -> None:
        """Raises ValueError where every record of the file `path` loses its image, its twins or its answers."""
        for losses in (("image", "image in the dialogue"), ("hallucinated captions",), ("answer",)):
            kinds = {k: f for k, f in self._kinds.items() if f.loss in losses and f.loss not in without}
            if self.total and sum(found.records for found in kinds.values()) >= self.total:
                kind = max(kinds, key=lambda kind: kinds[kind].records)
                raise ValueError(
                    f"{path}: training would see no {losses[0]} of any of its {self.total:,} records; "
                    f"{self._share(kinds[kind])}: {kind}; mend the records, or leave the file out"
                )

    def _share(self, found: Found) -> str:
        more = ", ..." if found.records > len(found.first) else ""
        return f"{found.records:,} of {self.total:,} records ({', '.join(found.first)}{more})"


_OTHER_TAG = re.compile(r"<[|/\s]*(?:img|image|picture)[^<>]{0,20}>", re.IGNORECASE)


def find_unseen(
    record: dict[str, Any], name: str, images: Sequence[str], turns: Sequence[tuple[Any, Any]], findings: Findings
) -> None:
    """Counts what of a decoded record training will never see: an image, or hallucinated captions.

    Args:
        images: as they were read, none for a text-only sample.
        turns: (from, value), unchecked.
    """
    strange = {key: meant for key, value in record.items() if value and (meant := meant_by(key))}
    for key, meant in strange.items():
        if meant == HALLUCINATED_KEY and not record.get(HALLUCINATED_KEY):
            kind = f"key {key!r} is not read; did you mean {HALLUCINATED_KEY!r}?"
            findings.count(kind, name, "hallucinated captions")
            break
    for key, meant in strange.items():
        if meant in ("text", "caption") and not record.get(meant):
            findings.count(f"key {key!r} is not read; did you mean {meant!r}, the caption?", name)
        elif meant in ANSWER_KEYS and not record.get(meant) and isinstance(record[key], str | list):
            findings.count(f"key {key!r} is not read; did you mean {meant!r}, an answer?", name)
    tags = [value.count(IMAGE_TAG) if isinstance(value, str) else 0 for _, value in turns]
    tagged = [number for number, count in enumerate(tags) if count]
    if not images:
        names = (key for key, meant in strange.items() if meant == IMAGE_KEY)
        key = next((key for key in names if tagged or not _is_another_file(record[key])), None)
        if key is not None:
            kind = f"key {key!r} is not read, so its image is never shown; did you mean {IMAGE_KEY!r}?"
            findings.count(kind, name, "image")
        elif tagged:
            kind = (
                f"an {IMAGE_TAG} tag and no image: the tag is read as text; give the key {IMAGE_KEY!r} or take it out"
            )
            findings.count(kind, name, "image")
        elif record.get(HALLUCINATED_KEY):
            findings.count("hallucinated captions and no image: they make no pair", name)
        return
    if not turns or _strange_role(turns) is not None:  # unusable for that, which is found when it is encoded
        return
    # With a caption the image is shown all the same, in a pair with it.
    loss: Loss | None = None if record.get("text") or record.get(HALLUCINATED_KEY) else "image in the dialogue"
    num_tags = sum(tags)
    if num_tags != len(images) and (num_tags or len(images) > 1):
        kind = f"more or fewer {IMAGE_TAG} tags than images: training leaves it out, as a bad sample"
        findings.count(kind, name, "image")
    elif not tagged:
        others = (_OTHER_TAG.search(value) for _, value in turns if isinstance(value, str))
        other = next((match[0] for match in others if match), None)
        hint = f"found {other!r}, did you mean {IMAGE_TAG}?" if other else f"put {IMAGE_TAG} into a question"
        kind = f"an image and no {IMAGE_TAG} tag, so its dialogue does not show it (but to --version plain); {hint}"
        findings.count(kind, name, loss)
    elif tagged[0] == 0 and turns[0][0] != "human" and len(turns) > 1:
        role = str(turns[0][0])[:40]
        kind = f"the {IMAGE_TAG} tag is in a leading {role} turn, which is left out; move it into a question"
        findings.count(kind, name, loss)


_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}")
_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".jfif")


def _is_another_file(value: Any) -> bool:
    """Whether a key's value names a file that is no picture: a text's `filename` is no image that goes unseen."""
    ending = os.path.splitext(value)[1] if isinstance(value, str) else ""
    return bool(_ENDING.fullmatch(ending)) and ending.lower() not in _PICTURE_ENDINGS


def _strange_role(turns: Sequence[tuple[Any, Any]]) -> str | None:
    """Who speaks in a record that the templates do not know, as it is to be shown; None where they know all."""
    said = turns[1:] if turns and turns[0][0] == "system" else turns
    return next((repr(role)[:40] for role, _ in said if role not in ("human", "gpt")), None)


def find_untrained(name: str, turns: Sequence[tuple[Any, Any]], findings: Findings, *, has_pair: bool) -> None:
    """Counts a decoded record whose dialogue has nothing to learn, whatever the tokenizer, and no pair beside it."""
    role = _strange_role(turns)
    turns = turns[1:] if turns and turns[0][0] == "system" else turns
    said = turns[1:] if turns and turns[0][0] != "human" else turns
    if role is not None or not turns:
        fault = "the dialogue has no turns" if role is None else f"a turn is from {role}, expected 'human' or 'gpt'"
        findings.count(f"{fault}: training leaves it out, as a bad sample", name, "answer")
        return
    if has_pair or not all(isinstance(value, str) for _, value in said):
        return
    answers = [value for role, value in said if role == "gpt"]
    if said and not any(answers):
        findings.count("no answer, or none with words: it trains nothing", name, "answer")
    elif said and said[-1][0] == "human":
        findings.count("ends with a question: --version v1 then trains none of its answers, as LLaVA", name)
    elif not all(answers):
        findings.count("an answer is empty: --version v1 then trains none of its answers, as LLaVA", name)
