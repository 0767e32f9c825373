"""JSON files of Hugging Face folders, and what to say when they are not as they should be."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hacl_megatron.config.checks.files import LATEST_FILE, how_to_fetch
from hacl_megatron.config.checks.foreign_files import LARGEST_CONFIG, parse_json
from hacl_megatron.config.checks.sizes import check_sizes


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """A JSON object; one-line ValueError for a missing, cut, ambiguous or other file.

    Args:
        largest: bytes that it may have.
    """
    if not path.is_file():  # a pipe, which would not end, is none
        raise ValueError(f"{path}: no such file; expected a Hugging Face model folder{_what_it_is(path.parent)}")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {largest:,}; it is damaged, or no such file")
    try:
        content = parse_json(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)}); the file may be cut") from None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _what_it_is(folder: Path) -> str:
    """Behind that a folder is no Hugging Face model: what it is instead, and what to do, where that can be told."""
    if any((folder / name).exists() for name in (LATEST_FILE, "run_config.yaml")):
        return f": it holds a run of this trainer; tools/convert_megatron_to_hf.py --load {folder} exports it"
    if not folder.exists() and (advice := how_to_fetch(f"{folder}")):
        return f"; {advice}"
    return ""


def read_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`: besides, each of its sizes lies within bounds, and its parts are objects."""
    content = read_json(path)
    check_sizes(content, path)
    for key in ("text_config", "vision_config", "vision_config_dict", "qformer_config"):
        if not isinstance(content.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is {one_line(repr(content[key]))}; expected an object")
    if not isinstance(content.get("model_type"), str | None):
        raise ValueError(f"{path}: model_type is {one_line(repr(content['model_type']))}; expected a text")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face's are: indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def values_of_any_type(where: Path) -> Iterator[None]:
    """What goes wrong inside with a value of another type than its key has, as a ValueError that names the file."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{where}: a value in it, or in a file beside it, is not of the kind that its key has "
            f"({type(error).__name__}: {one_line(error)}); expected a file as transformers writes it"
        ) from error


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
