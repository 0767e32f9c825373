"""Which images a record names.

    "image": "a.jpg"        "image": ["a.jpg", "b.jpg"]        "images": ["a.jpg"]       → ("a.jpg",), two, ("a.jpg",)

A list of one is its name. A name may stand there twice: it is then shown twice.
"""

from collections.abc import Sequence
from typing import Any

from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.records.keys import IMAGE_KEY, IMAGES_KEY
from hacl_megatron.data.prepare.records.values import Wrong, describe, value_of

IMAGE_KEYS = (IMAGE_KEY, IMAGES_KEY)
"""LLaVA's, and TRL's, LLaMA-Factory's and ms-swift's. The first that is not empty is read."""


def read_images(
    record: dict[str, Any], keys: Sequence[str], wrong: Wrong, name: str, findings: Findings
) -> tuple[str, ...]:
    """The file names of a decoded record's images, of the first of the `keys` that is not empty.

    What `datasets` writes for a picture, {"bytes", "path"}, counts as its path: pictures are read from files alone.
    What is not read is counted in `findings` under the record's `name`. Raises ValueError for what is no name.
    """
    there = [key for key in keys if key in record]
    if len(there) == 1 and isinstance(image := record[there[0]], str) and not _is_blank(image):
        return (image,)  # nearly always
    found: dict[str, tuple[str, ...]] = {}
    pictures: dict[str, list[Any]] = {}
    for key in keys:
        value = value_of(record, key)
        items = value if isinstance(value, list) else [value]
        if any(map(_is_picture, items)):
            pictures[key] = items
        elif found and not all(isinstance(item, str | None) for item in items):
            findings.count(f"key {key!r} is not read: {next(iter(found))!r} is", name)
        elif names := image_names(value, key, wrong):
            found[key] = names
    for key, items in pictures.items():
        paths = [item.get("path") if _is_picture(item) else item for item in items]
        if not found and all(paths) and (names := image_names(paths, key, wrong)):
            found[key] = names
        if not found:
            shown = items[0] if len(items) == 1 else items
            raise wrong(key, shown, "a file name: pictures are read from files, so write it into one")
        findings.count(f"the picture in key {key!r} is not read, but the file that {next(iter(found))!r} names", name)
    used = next(iter(found), None)
    for key, names in found.items():
        if names != found[used]:
            findings.count(f"key {key!r} is not read: {used!r} names another image", name)
    for key in IMAGE_KEYS if not found else ():
        value = record.get(key)
        if value is not None and (key, value) != (IMAGES_KEY, []):
            findings.count(f"key {key!r} is {describe(value)}: read as text only", name)
    return found.get(used, ())


def image_names(value: Any, key: str, wrong: Wrong) -> tuple[str, ...]:
    """The names under a key that holds one or a list of them; empty where it holds an empty one or list."""
    items = value if isinstance(value, list) else [value]
    if len(items) == 1 and (items[0] is None or _is_blank(items[0])):
        return ()
    for number, item in enumerate(items):
        if not isinstance(item, str):
            expected = "a file name, or a list of them"
            raise wrong(key, value, expected) if len(items) == 1 else wrong(f"{key}[{number}]", item, "a file name")
        if _is_blank(item):
            raise wrong(f"{key}[{number}]", item, "a file name")
    return tuple(items)


def count_images(record: dict[str, Any], keys: Sequence[str]) -> int:
    """How many images a decoded record names, nothing about them checked."""
    values = (value_of(record, key) for key in keys)
    value = next((value for value in values if value), None)
    return len(value) if isinstance(value, list) else value is not None


def first_image(record: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first name that stands under one of the keys of a decoded record, nothing about it checked."""
    values = (record.get(key) for key in keys)
    firsts = (value[0] if isinstance(value, list) and value else value for value in values)
    return next((first for first in firsts if first and isinstance(first, str)), None)


def _is_blank(name: Any) -> bool:
    return isinstance(name, str) and (not name or name.isspace())


def _is_picture(item: Any) -> bool:
    return isinstance(item, dict) and "bytes" in item
