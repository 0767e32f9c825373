"""The captions of a record: of its image, or of several images one each.

    image  "a.jpg"             text  "A cat."             Hallucination caption  "A dog."    (or a list of such)
    image  ["a.jpg", "b.jpg"]  text  ["A cat.", null]     Hallucination caption  [["A dog.", "A cow."], []]

A list of one is what it holds: `"text": ["A cat."]` of one image is "A cat.".
"""

from typing import Any, NamedTuple

from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.records.keys import CAPTION_KEYS, HALLUCINATED_KEY, IMAGE_TAG
from hacl_megatron.data.prepare.records.values import Wrong, is_gap, value_of


class Pair(NamedTuple):
    """An image of a record and its caption."""

    image: int
    """Which of the record's images, from 0."""
    caption: str
    """Without surrounding blanks or image tags; not empty."""
    hallucinated: tuple[str, ...]
    """The caption with hallucinations written in, cleaned like it; empty ones are left out."""


class Captions(NamedTuple):
    """What a record says about its images under `text` and `Hallucination caption`."""

    text: str | None
    """As it is written; None where it is a list of several."""
    hallucinated: tuple[str, ...]
    """Cleaned; empty ones are left out, and all of them where they are listed for several images."""
    pairs: tuple[Pair, ...]
    """Of several images, where `text` lists their captions."""


NO_CAPTIONS = Captions(None, (), ())


def clean_caption(caption: str) -> str:
    """A caption without image tags and surrounding blanks."""
    return caption.replace(IMAGE_TAG, "").strip()


def read_captions(record: dict[str, Any], num_images: int, wrong: Wrong, name: str, findings: Findings) -> Captions:
    """The captions of a decoded record.

    What gives no pair is counted in `findings` under the record's `name`. Raises ValueError where a value is of
    another type, or a list of another length than there are images.
    """
    text, hallucinated = value_of(record, "text"), value_of(record, HALLUCINATED_KEY)
    if text is None and hallucinated is None and num_images < 2:
        return NO_CAPTIONS
    if isinstance(text, list) and text and num_images > 1:
        return _of_several(text, hallucinated, num_images, wrong, name, findings)
    if isinstance(text, list) and len(text) < 2:
        (text,) = text or [None]
        text = None if is_gap(text) else text
    of_one = isinstance(hallucinated, list) and len(hallucinated) == 1 and isinstance(hallucinated[0], list | None)
    if num_images < 2 and of_one:
        (hallucinated,) = hallucinated
    if text is not None and not isinstance(text, str):
        raise wrong("text", text, "a string, the caption, or with several images a list of strings")
    captions = _hallucinated(hallucinated, HALLUCINATED_KEY, wrong, listed=num_images > 1)
    if num_images > 1:
        marks = [key for key in ("text", *CAPTION_KEYS) if record.get(key) and not is_gap(record[key])]
        if marks:
            kind = (
                f"several images, and a key {marks[0]!r} without a list of their captions in 'text': it makes no pair"
            )
            findings.count(kind, name, "hallucinated captions" if captions else None)
    elif text is not None and not clean_caption(text):
        kind = f"key 'text' is empty, so that it has no caption{' for its hallucinated captions' * bool(captions)}"
        findings.count(f"{kind}; leave the key out", name, "hallucinated captions" if captions else None)
    return Captions(text, captions, ())


def _of_several(
    texts: list[Any], hallucinated: Any, num_images: int, wrong: Wrong, name: str, findings: Findings
) -> Captions:
    """The pairs of listed captions."""
    if len(texts) != num_images:
        raise wrong("text", texts, f"{num_images} captions, one an image, null where there is none")
    hallucinated = [None] * num_images if hallucinated in (None, []) else hallucinated
    if not isinstance(hallucinated, list) or len(hallucinated) != num_images:
        expected = f"{num_images} lists of strings, one an image, as 'text' is a list"
        raise wrong(HALLUCINATED_KEY, hallucinated, expected)
    pairs, twins_left_out = [], False
    for number, (text, found) in enumerate(zip(texts, hallucinated, strict=True)):
        if text is not None and not is_gap(text) and not isinstance(text, str):
            raise wrong(f"text[{number}]", text, "a string, the image's caption, or null")
        twins = _hallucinated(found, f"{HALLUCINATED_KEY}[{number}]", wrong)
        caption = clean_caption(text) if isinstance(text, str) else ""
        if caption:
            pairs.append(Pair(number, caption, twins))
        twins_left_out |= bool(twins) and not caption
    if twins_left_out:
        kind = "hallucinated captions of an image whose caption is not in the list 'text': they make no pair"
        findings.count(kind, name, None if any(pair.hallucinated for pair in pairs) else "hallucinated captions")
    return Captions(None, (), tuple(pairs))


def _hallucinated(value: Any, key: str, wrong: Wrong, *, listed: bool = False) -> tuple[str, ...]:
    """One image's hallucinated captions, cleaned. `listed`: lists of them, one an image, may stand there too."""
    captions = [value or ""] if value is None or is_gap(value) or isinstance(value, str) else value
    if listed and isinstance(captions, list):
        parts = [part if isinstance(part, list) else [part or ""] for part in captions]
        captions = [caption for part in parts for caption in part]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise wrong(key, value, "a string or a list of strings")
    return tuple(caption for caption in map(clean_caption, captions) if caption)
