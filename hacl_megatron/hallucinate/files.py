"""Streams the records of a LLaVA JSON or JSONL file, and writes them again; memory does not grow with the file.

Input and output are JSON (one list) or JSON lines (`.jsonl`), each by its own name. The output is written beside its
place and renamed when complete.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hacl_megatron.data.manifest import IMAGE_TAG

CAPTION_KEY = "Hallucination caption"
EDITS_KEY = "Hallucination edits"
"""Beside the released key: for each hallucinated caption a list of {"kind", "before", "after"}."""

_CHUNK = 1 << 20


def caption_of(record: dict[str, Any]) -> str | None:
    """The caption as `Manifest` takes it from a record with hallucinated captions: `text`, else the first answer."""
    text = record.get("text")
    if text is None:
        turns = record["conversations"]
        text = next((turn["value"] for turn in turns if turn["from"] == "gpt"), None)
    return text.replace(IMAGE_TAG, "").strip() or None if isinstance(text, str) else None


def name_of(record: dict[str, Any], index: int) -> str:
    """The record's id as `Manifest` names it: `id`, its image's name, or its number in the file."""
    name = record.get("id")
    return str(name) if name is not None else record.get("image") or f"record {index}"


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (bytes read so far, record). Raises ValueError naming the file, the record and what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a LLaVA JSON or JSONL file, check --input")
    with open(path, encoding="utf-8-sig") as file:
        try:
            items = _lines(path, file) if path.suffix == ".jsonl" else _list(path, file)
            for index, (where, record) in enumerate(items):
                _check(record, f"{path}, record {index} ({where})")
                yield file.buffer.tell(), record
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason}); expected JSON in UTF-8, convert the file") from error


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline():
        number += 1
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: broken JSON in line {number}, column {error.colno} ({error.msg}); expected one object a "
                "line, repair or remove the line"
            ) from error


def _list(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """Decodes a list item by item; a record that the chunk cuts off is tried again with more text behind it."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, line, index = file.read(_CHUNK), 0, 1, 0

    def skip_blanks() -> str:
        """The next character that is not blank, read on for as needed; "" at the file's end."""
        nonlocal buffer, at, line
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                line += buffer[at] == "\n"
                at += 1
            if at < len(buffer):
                return buffer[at]
            buffer, at = file.read(_CHUNK), 0
            if not buffer:
                return ""

    def broken(problem: str) -> ValueError:
        return ValueError(
            f"{path}: broken JSON near line {line} ({problem}); is the file cut off? Download or write it again"
        )

    first = skip_blanks()
    if first != "[":
        found = {"": "an empty file", "{": "one JSON object"}.get(first, f"{buffer[at : at + 20]!r}")
        raise ValueError(
            f"{path}: found {found}, expected a list of records; JSON lines need a name that ends in .jsonl"
        )
    at += 1
    while (mark := skip_blanks()) != "]":
        if index:
            if mark != ",":
                raise broken("expected ',' or ']' behind a record")
            at += 1
            mark = skip_blanks()
        if mark != "{":
            raise broken(f"record {index} is no object" if mark else "the list has no end")
        while True:
            try:
                record, end = decode(buffer, at)
                break
            except json.JSONDecodeError as error:
                more = file.read(max(_CHUNK, len(buffer) - at))
                if not more:
                    line += buffer.count("\n", at, error.pos)
                    raise broken(error.msg) from error
                buffer, at = buffer[at:] + more, 0
        yield f"line {line}", record
        line += buffer.count("\n", at, end)
        at, index = end, index + 1
    at += 1
    if skip_blanks():
        raise broken("text behind the list")


def _check(record: Any, where: str) -> None:
    """What the tool itself relies on; the rest is the manifest's to check when the file is trained on."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found a {type(record).__name__}; expected an object with id, image, conversations")
    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: key 'text' is a {type(text).__name__}; expected a string, the caption")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and "from" in t and "value" in t for t in turns):
        raise ValueError(
            f"{where}: key 'conversations' is missing or no list of turns with 'from' and 'value': is it a LLaVA file?"
        )


class RecordWriter:
    """Writes records one after another, as a JSON list or as JSON lines."""

    def __init__(self, file: IO[str], *, lines: bool):
        self._file, self._lines, self._written = file, lines, 0

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, on a line of its own."""
        if not self._lines:
            self._file.write(",\n" if self._written else "[\n")
        self._file.write(json.dumps(record, ensure_ascii=False))
        self._file.write("\n" if self._lines else "")
        self._written += 1

    def close(self) -> None:
        """End the list."""
        if not self._lines:
            self._file.write("\n]\n" if self._written else "[]\n")


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """A text file that appears at `path` complete or not at all; lone surrogates of the input pass through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
