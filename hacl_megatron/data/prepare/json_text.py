"""JSON of whatever a user's file holds: written so that UTF-8 can hold it, no deeper than it can be written again."""

import json
from typing import Any

DEEPEST = 100
"""Lists and objects inside one another; nothing that this program reads has more than a few."""


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON can write half of a surrogate pair ("\\ud83d"), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_text(value: Any, **options: Any) -> str:
    """JSON with its text readable; with escapes where UTF-8 could not hold it."""
    text = json.dumps(value, ensure_ascii=False, **options)
    return text if is_text(text) else json.dumps(value, **options)


def is_deep(value: Any) -> bool:
    """Whether it has more levels than `DEEPEST`: what else goes through it may run out of stack."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [part for part in level if isinstance(part, list | dict)]
        level = [item for part in inner for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return False
    return True
