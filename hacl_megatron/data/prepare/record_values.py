"""Single values of a decoded record: what counts as there, how a message shows them, which image they name."""

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


def image_name(image: Any, where: str, wrong: Wrong, key: str = "image") -> str | None:
    """The name of a record's one image: a string, or a list of one; None where the value is empty."""
    found = image
    if isinstance(image, list):
        if len(image) > 1:
            raise ValueError(
                f"{where}: key {key!r} is a list of {len(image)}; several images a sample are not supported yet, "
                "expected one file name: split or remove the record"
            )
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise wrong(key, found, "a file name")
    return image if image and not image.isspace() else None


def describe(value: Any) -> str:
    """Type and beginning of a value, for a message."""
    text = "nested deep" if is_deep(value) else json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
