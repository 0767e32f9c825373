"""The captions of a record that are to be falsified, one after another, and what becomes of them back in the record.

"text": "A cat."            one item     "Hallucination caption": "A dog."
"text": ["A cat.", null]    two items    "Hallucination caption": [["A dog."], []]     of several images
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hacl_megatron.data.prepare.llava_json import name_of
from hacl_megatron.data.prepare.records.captions import clean_caption
from hacl_megatron.data.prepare.records.keys import HALLUCINATED_KEY
from hacl_megatron.data.prepare.records.values import value_of
from hacl_megatron.hallucinate.files import EDITS_KEY, caption_of, num_images
from hacl_megatron.hallucinate.rules import Hallucination

_WRITTEN = (HALLUCINATED_KEY, EDITS_KEY)


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
