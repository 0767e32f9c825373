"""Single values of a decoded record: what counts as there, how a message shows them."""

import json
import math
from collections.abc import Callable
from typing import Any

from hacl_megatron.data.prepare.json_text import is_deep

Wrong = Callable[[str, Any, str], ValueError]
"""(key, what was found under it, what was expected) → the error that names file, record and line."""


def value_of(record: dict[str, Any], key: str) -> Any:
    """`record[key]`; None where there is none, also where pandas wrote NaN for it."""
    value = record.get(key)
    return None if is_gap(value) else value


def is_gap(value: Any) -> bool:
    """Whether it is the NaN that pandas writes where a record has no such key."""
    return isinstance(value, float) and math.isnan(value)


def describe(value: Any) -> str:
    """Type and beginning of a value, for a message."""
    text = "nested deep" if is_deep(value) else json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
