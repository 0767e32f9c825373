"""LLaVA JSON files as one numbered list of samples.

    [ {"id": "7", "image": "a/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                         {"from": "gpt", "value": "A cat."}],
       "text": "A cat on a mat.", "Hallucination caption": ["A dog on a mat."]}, ... ]

or the same objects one a line (`.jsonl`). `text` and `Hallucination caption` are the released HACL code's keys; a
record without them is LLaVA's own. Faults of a file's structure raise when it is read, before any training; faults of
one sample's text are found when it is encoded (`hacl_megatron.data.conversation`) and cost that sample alone.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_TAG = "<image>"
"""Where a conversation's text names its image."""

CAPTION_KEYS = ("caption", "Hallucination caption")
"""Keys that mark a record without `text` as a contrastive sample, whose caption is then its first answer."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record of a LLaVA JSON file."""

    sample_id: int
    """Index in the manifest."""
    name: str
    """The record's own `id`; its image's name or its index if it has none."""
    image: str | None
    """Image name relative to the image folder; None for a text-only sample."""
    conversations: tuple[tuple[str, str], ...]
    """Turns as (from, value), as the file has them: not yet checked to be strings or in order."""
    caption: str | None
    """Text of the image-caption pair, without surrounding blanks or image tags; None if there is none."""
    hallucinated_captions: tuple[str, ...]
    """The caption with hallucinations written in, cleaned like it; empty ones are left out."""
    source: str
    """The JSON file."""


class Manifest(Sequence[Sample]):
    """The samples of one or more LLaVA JSON files, in the files' order.

    Samples are held as one block of UTF-8 JSON and decoded when asked for: no more memory than the files themselves
    (Python objects would take five times that), and a forked worker shares the block instead of copying it.
    """

    def __init__(self, block: bytes, ends: np.ndarray, files: Sequence[str], samples_per_file: Sequence[int]):
        self._block, self._ends, self._files = block, ends, tuple(files)
        self.samples_per_file = tuple(samples_per_file)
        """How many samples each of the files gave."""

    @classmethod
    def read(cls, paths: Sequence[str], *, version: str) -> "Manifest":
        """Reads the files one after another; `version` (`plain`, `v1`) decides which answers are captions.

        Raises ValueError naming file, record and key for whatever is missing, broken or of the wrong type.
        """
        records, ends, counts, end = [], [], [], 0
        for file_index, path in enumerate(paths):
            before = len(ends)
            for index, position, record in _records(path):
                fields = _fields(record, f"{path}, record {index} ({position})", index, version)
                encoded = json.dumps([file_index, *fields], ensure_ascii=False, separators=(",", ":"))
                # Lone surrogates (a broken emoji escape) are that sample's fault, not the file's.
                records.append(encoded.encode("utf-8", "surrogatepass"))
                end += len(records[-1])
                ends.append(end)
            counts.append(len(ends) - before)
            if counts[-1] == 0:
                raise ValueError(f"{path}: holds no samples; expected at least one, leave the file out")
        return cls(b"".join(records), np.asarray(ends, dtype=np.int64), paths, counts)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices are not supported
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a manifest of {len(self)}")
        begin = int(self._ends[index - 1]) if index else 0
        text = self._block[begin : int(self._ends[index])].decode("utf-8", "surrogatepass")
        file_index, name, image, turns, caption, hallucinated = json.loads(text)
        return Sample(
            sample_id=int(index),
            name=name,
            image=image,
            conversations=tuple((role, value) for role, value in turns),
            caption=caption,
            hallucinated_captions=tuple(hallucinated),
            source=self._files[file_index],
        )


def _records(path: str) -> Iterator[tuple[int, str, Any]]:
    """Yields (index, "line 12", record) of a JSON list or of JSON lines."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; expected a LLaVA JSON or JSONL file, check --data-path")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); expected JSON in UTF-8, convert the file") from error
    yield from _json_lines(path, text) if path.endswith(".jsonl") else _json_list(path, text)


def _json_lines(path: str, text: str) -> Iterator[tuple[int, str, Any]]:
    index = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: broken JSON in line {number}, column {error.colno} ({error.msg}); expected one "
                "object a line, repair or remove the line"
            ) from error
        yield index, f"line {number}", record
        index += 1


_BLANKS = re.compile(r"[ \t\r\n]*")


def _json_list(path: str, text: str) -> Iterator[tuple[int, str, Any]]:
    """Decodes a JSON list item by item: the whole list as Python objects would take several times the file's size."""
    decode = json.JSONDecoder().raw_decode
    at, line, counted = _BLANKS.match(text, 0).end(), 1, 0
    if text[at : at + 1] != "[":
        if text[at : at + 1] not in ("", "{"):
            raise ValueError(f"{path}: not JSON (starts with {text[at : at + 20]!r}); expected a list of records")
        found = "one JSON object" if text[at : at + 1] else "an empty file"
        raise ValueError(
            f"{path}: found {found}, expected a list of records; JSON lines need a name that ends in .jsonl"
        )

    def broken(problem: str, position: int) -> ValueError:
        where = f"line {text.count(chr(10), 0, position) + 1}, column {position - text.rfind(chr(10), 0, position)}"
        return ValueError(
            f"{path}: broken JSON in {where} ({problem}); is the file cut off? Download or write it again"
        )

    at = _BLANKS.match(text, at + 1).end()
    index = 0
    while text[at : at + 1] != "]":
        if index:
            if text[at : at + 1] != ",":
                raise broken("expected ',' or ']' behind a record", at)
            at = _BLANKS.match(text, at + 1).end()
        try:
            record, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(error.msg, error.pos) from error
        line, counted = line + text.count("\n", counted, at), at
        yield index, f"line {line}", record
        index += 1
        at = _BLANKS.match(text, end).end()
    at = _BLANKS.match(text, at + 1).end()
    if at != len(text):
        raise broken("text behind the list", at)


def _fields(record: Any, where: str, index: int, version: str) -> tuple[str, str | None, list, str | None, list[str]]:
    """(name, image, turns, caption, hallucinated captions) of one record; ValueError names `where` and the key."""

    def wrong(key: str, found: Any, expected: str) -> ValueError:
        return ValueError(
            f"{where}: key {key!r} is {_describe(found)}; expected {expected}: correct the record or remove it"
        )

    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {_describe(record)}; expected an object with id, image, conversations")

    image = record.get("image")
    if isinstance(image, list):
        raise ValueError(
            f"{where}: key 'image' is a list of {len(image)}; several images a sample are not supported yet, expected "
            "one file name: split or remove the record"
        )
    if image is not None and (not isinstance(image, str) or not image):
        raise wrong("image", image, "a file name")

    name = record.get("id")
    if name is not None and not isinstance(name, str | int):
        raise wrong("id", name, "a string or a number")
    name = str(name) if name is not None else image or f"record {index}"

    if "conversations" not in record:
        raise ValueError(
            f"{where}: key 'conversations' is missing (found {', '.join(map(repr, record)) or 'none'}); expected a "
            "list of turns with 'from' and 'value': is it a LLaVA file?"
        )
    conversations = record["conversations"]
    if not isinstance(conversations, list):
        raise wrong("conversations", conversations, "a list of turns with 'from' and 'value'")
    turns = []
    for number, turn in enumerate(conversations):
        for key in ("from", "value"):
            if not isinstance(turn, dict) or key not in turn:
                raise wrong(f"conversations[{number}]", turn, "an object with 'from' and 'value'")
        turns.append([turn["from"], turn["value"]])

    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise wrong("text", text, "a string, the caption")
    hallucinated = record.get("Hallucination caption")
    if hallucinated is None or isinstance(hallucinated, str):
        hallucinated = [hallucinated or ""]
    if not isinstance(hallucinated, list) or not all(isinstance(caption, str) for caption in hallucinated):
        raise wrong("Hallucination caption", hallucinated, "a string or a list of strings")

    if text is None and (version == "plain" or any(key in record for key in CAPTION_KEYS)):
        text = next((value for role, value in turns if role == "gpt"), None)
        text = text if isinstance(text, str) else None
    return name, image, turns, _clean(text or "") or None, [c for c in map(_clean, hallucinated) if c]


def _clean(caption: str) -> str:
    return caption.replace(IMAGE_TAG, "").strip()


def _describe(value: Any) -> str:
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
