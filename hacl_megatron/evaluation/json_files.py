"""Files of questions, annotations and answers: JSON lists and JSON lines, whatever the file is called.

POPE's questions are JSON lines in files named `.json`, so the content decides, not the name.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.regular import only_regular
from hacl_megatron.data.prepare.json_text import DEEPEST, is_deep

_NAMES = ("id", "image_id", "question_id")
"""Keys that tell records apart."""
_WORDS = ("text", "question", "query", "label", "image", "image_src", "prompt", "type")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError, in one line, for what is missing or no JSON."""
    return _value(_read_text(path), str(path), "check or fetch it again")


def read_records(path: Path, *, needed: Sequence[str], kind: str) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, each with the keys `needed`.

    Args:
        kind: what they are, for the messages ("POPE answers").

    Raises:
        ValueError: missing file, broken JSON, no record, or one that lacks a key; names file and record.
    """
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = read_json(path)
        places = [f"record {number}" for number in range(1, len(records) + 1)]
    else:
        records, places = [], []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            records.append(_value(line, str(path), "expected one object a line", line=number))
            places.append(f"line {number}")
    for place, record in zip(places, records, strict=True):
        missing = [key for key in needed if not isinstance(record, dict) or key not in record]
        if missing:
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path}, {place}: found {keys or 'no keys'}, expected an object with {', '.join(needed)}; "
                f"is it the file of {kind}?"
            )
        for key in needed:
            expected = "a string" if key in _WORDS else "a number or a string" if key in _NAMES else None
            if expected and not isinstance(record[key], str if key in _WORDS else str | int | float):
                raise ValueError(f"{path}, {place}: {key} is {type(record[key]).__name__}, expected {expected}")
    if not records:
        raise ValueError(f"{path} is empty, expected {kind}")
    return records


def expect_text(record: dict[str, Any], key: str, path: Path | str, number: int) -> str:
    """`record[key]`, known to be a string; `number` counts from 1."""
    if not isinstance(record[key], str):
        raise ValueError(f"{path}, record {number}: {key} is {type(record[key]).__name__}, expected a string")
    return record[key]


def _value(text: str, where: str, advice: str, line: int | None = None) -> Any:
    """The value that `text` is; `line`: where in the file it stands, if it is one line of it."""
    try:
        value = json.loads(text)
        if is_deep(value):
            raise RecursionError(f"nested deeper than {DEEPEST}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {line or error.lineno}: not valid JSON ({error.msg}); {advice}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        place = f", line {line}" if line else ""
        raise ValueError(f"{where}{place}: unreadable JSON ({error}); {advice}") from None
    return value


def _read_text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", opener=only_regular) as file:
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
