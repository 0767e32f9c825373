"""JSON files of Hugging Face folders, and what to say when they are not as they should be."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; one-line ValueError for a missing, cut or other file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Hugging Face model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); the file may be cut") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def one_line(error: BaseException | str) -> str:
    """The message of an exception without its line breaks, cut to what fits an error line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


def refuse_unless(where: Path, values: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, choices in allowed.items():
        if key in values and values[key] not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{where}: {key} is {values[key]!r}; this trainer supports {expected} only")


def parse(config_class: type, values: dict[str, Any], where: Path) -> Any:
    """Fill transformers' defaults, which old config files leave out (llava-1.5-7b-hf does not even state its width)."""
    try:
        return config_class.from_dict(dict(values))
    except Exception as error:  # transformers 5 validates with exceptions of several libraries
        raise ValueError(f"{where}: {config_class.__name__} cannot be read: {one_line(error)}") from None
