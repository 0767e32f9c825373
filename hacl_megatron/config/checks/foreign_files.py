"""Files that someone else wrote: read within bounds, regular ones only, never through a link out of their folder."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_CONFIG = 32 << 20
"""Bytes of a JSON file of settings or of an index; the index of a 671B model has 9 MB."""
LARGEST_TOKENIZER = 64 << 20
"""Bytes of any one file of a tokenizer; the largest published ones have some 35 MB."""

DEEPEST = 64
"""Lists and objects inside one another; configurations have some 5, a tokenizer 7."""
_TOO_DEEP = f"lists or objects are nested deeper than {DEEPEST} levels; expected settings"


def own_file(path: Path, largest: int | None) -> bool:
    """Whether `path` is there, as a file that may be read, and copied, on behalf of its folder.

    A link may lead to a file of the same folder, or to the `blobs` beside `snapshots` in Hugging Face's cache; any
    other could lead to whatever the reader is allowed to see and its owner is not.

    Raises:
        ValueError: it is a link that leaves the folder or leads nowhere, no regular file, or larger than `largest`.
    """
    if not os.path.lexists(path):
        return False
    if path.is_symlink():
        target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
        homes = [folder, *(snapshots.parent / "blobs" for snapshots in folder.parents if snapshots.name == "snapshots")]
        if not any(target.is_relative_to(home) for home in homes):
            raise ValueError(
                f"{path}: a link to {target}, which is outside of its folder; expected a file: copy it there, or leave "
                "it out"
            )
        if not target.exists():
            raise ValueError(f"{path}: a link to {target}, which is not there; expected a file: download it again")
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: found {_kind(found.st_mode)}, expected a file; move it out of the folder")
    if largest is not None and found.st_size > largest:
        raise ValueError(
            f"{path}: {found.st_size:,} bytes, expected at most {largest:,} of such a file; it is damaged, or does not "
            "belong there"
        )
    return True


def parse_json(text: str | bytes) -> Any:
    """What JSON says, where it says one thing: doubled keys, NaN and infinities are refused.

    Raises:
        ValueError: it is no such JSON; the message goes behind the file's name.
    """
    try:
        content = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON ({error}); the file may be cut") from None
    level = [content]
    for _ in range(DEEPEST):  # what goes through the content afterwards may call itself
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise ValueError(_TOO_DEEP)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice; expected once: take one of them out")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"not valid JSON: {name} is no number of JSON; expected a finite one")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large; expected a finite one")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"the number {digits[:40]}... has {len(digits)} digits; expected a size")
    return int(digits)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
