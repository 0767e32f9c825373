"""The captions of a record that are to be falsified, one after another, and what becomes of them back in the record.

"text": "A cat."            one item     "Hallucination caption": "A dog."
"text": ["A cat.", null]    two items    "Hallucination caption": [["A dog."], []]     of several images

The kinds of their edits are read back: "Hallucination edits": [[{"kind": "object", ...}]] -> {"A dog.": ("object",)}.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacl_megatron.data.prepare.llava_json import name_of
from hacl_megatron.data.prepare.records.captions import clean_caption
from hacl_megatron.data.prepare.records.keys import HALLUCINATED_KEY
from hacl_megatron.data.prepare.records.values import value_of
from hacl_megatron.hallucinate.files import EDITS_KEY, caption_of, num_images, read_records
from hacl_megatron.hallucinate.rules import Hallucination

_WRITTEN = (HALLUCINATED_KEY, EDITS_KEY)
Kinds = dict[str, tuple[str, ...]]
"""A hallucinated caption as the manifest has it → its kinds, each once, sorted."""


@dataclass(frozen=True, slots=True)
class Item:
    """A caption of a record, or the record where it has none to falsify."""

    record: dict[str, Any]
    name: str
    """The record's, with several images and which of them."""
    caption: str | None
    """What to falsify; None: nothing."""
    image: int | None = None
    """Which of several images, whose captions are listed; None: the record has one caption."""
    is_last: bool = True
    """Whether the record is done behind it."""

    def add(self, found: list[Hallucination]) -> None:
        """Puts the caption's hallucinated captions into the record; the edits, where known, as lists."""
        texts, edits = [one.text for one in found], [one.edits for one in found]
        shown = [[{"kind": edit.kind, "before": edit.before, "after": edit.after} for edit in some] for some in edits]
        of_caption = (texts, shown if any(edits) else [])
        if self.image is None:
            _put(self.record, texts[0] if len(texts) == 1 else texts, of_caption[1])
            return
        if not self.image:
            _put(self.record, [], [])
        for key, values in zip(_WRITTEN, of_caption, strict=True):
            self.record.setdefault(key, []).append(values)
        if self.is_last:
            _put(self.record, *(self.record[key] if any(self.record[key]) else [] for key in _WRITTEN))


def _put(record: dict[str, Any], hallucinated: str | list[Any], edits: list[Any]) -> None:
    """Replaces what an earlier method wrote; what is empty is left out."""
    for key, value in zip(_WRITTEN, (hallucinated, edits), strict=True):
        record.pop(key, None)
        if value:
            record[key] = value


def items_of(record: dict[str, Any], index: int, *, replace: bool) -> tuple[list[Item], str]:
    """The items of a checked record, and what becomes of it: `new`, `kept`, `no caption`, or `not listed` for several
    images whose captions `text` does not list."""
    name, text = name_of(record, index), value_of(record, "text")
    untouched = [Item(record, name, None)]
    if num_images(record) > 1:
        if not isinstance(text, list) or not text:
            return untouched, "no caption" if caption_of(record) is None else "not listed"
        captions = [clean_caption(item) or None if isinstance(item, str) else None for item in text]
    else:
        captions = [caption_of(record)]
    if not any(captions):
        return untouched, "no caption"
    if _has_any(value_of(record, HALLUCINATED_KEY)) and not replace:
        return untouched, "kept"
    if len(captions) == 1:
        return [Item(record, name, captions[0])], "new"
    return [*_of_several(record, name, captions)], "new"


def _of_several(record: dict[str, Any], name: str, captions: list[str | None]) -> Iterator[Item]:
    for image, caption in enumerate(captions):
        yield Item(record, f"{name} image {image + 1}", caption, image, is_last=image == len(captions) - 1)


def _has_any(hallucinated: Any) -> bool:
    return any(map(_has_any, hallucinated)) if isinstance(hallucinated, list) else bool(hallucinated)


def kinds_of(record: dict[str, Any]) -> Kinds:
    """Of the hallucinated captions of a record those whose edits it lists; edits of another shape say nothing."""
    texts, edits = value_of(record, HALLUCINATED_KEY), value_of(record, EDITS_KEY)
    found: Kinds = {}
    for text, own in _matched([texts] if isinstance(texts, str) else texts, edits):
        kinds = {edit["kind"] for edit in own if isinstance(edit, dict) and isinstance(edit.get("kind"), str)}
        if kinds:
            found[clean_caption(text)] = tuple(sorted(kinds))
    return found


def kinds_in(path: Path, wanted: Iterable[int]) -> dict[int, Kinds]:
    """`kinds_of` the records of a LLaVA JSON file with these numbers. Reads it up to the last of them.

    Raises ValueError naming the file and what is wrong with it.
    """
    wanted = set(wanted)
    last, found = max(wanted, default=-1), {}
    if last < 0:
        return found
    for number, (*_, record) in enumerate(read_records(path)):
        if number in wanted:
            found[number] = kinds_of(record)
        if number == last:
            break
    return found


def _matched(texts: Any, edits: Any) -> Iterator[tuple[str, list[Any]]]:
    """Each text with its list of edits: the two lists are alike, of several images one level deeper."""
    if not (isinstance(texts, list) and isinstance(edits, list)):
        return
    for text, own in zip(texts, edits, strict=False):
        if isinstance(text, str) and isinstance(own, list):
            yield text, own
        else:
            yield from _matched(text, own)
