"""Whether a checkpoint is as it was written: every file is there and of its length, and no bit of it has changed.

`files.json` of a checkpoint folder is written last. It lists the files with their sizes, those of a frozen part beside
the folder too, so that a look at each file's length finds what a full disk, a killed copy or a clean-up left. It has
checksums too: of each small file, which `damage` compares, and of each record of the large ones (`.distcp`), made while
it is written and compared as it is read (`stored.parts`), by whoever reads it.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.checksum import Checksum

FILES_FILE = "files.json"
FROZEN_FOLDER = "frozen"
"""In a SAVE folder: weights that do not train, which all its checkpoints share (`frozen`)."""
Records = dict[str, dict[int, str]]
"""Large file -> first byte of each record in it -> the record's checksum, in hexadecimal digits."""
LARGEST = 1 << 30
"""Bytes of a file that is read at once: an index of some seven million parts."""
_REFERENCE = re.compile(r"\.\./" + FROZEN_FOLDER + r"/[0-9a-f]{16}/[^/\\]+")
_CHECKSUM = "xxh3_64"
_LARGE = ".distcp"
_BLOCK = 1 << 20


def may_be_file_of_checkpoint(name: str) -> bool:
    """Whether an index may name this file: one in the checkpoint's own folder, or one of a frozen part beside it."""
    return (Path(name).name == name and "\0" not in name) or _REFERENCE.fullmatch(name) is not None


def read_whole(path: Path, largest: int = LARGEST) -> bytes:
    """Contents of a regular file; OSError for a missing one.

    Raises:
        ValueError: a pipe, which would never answer, or more than `largest` bytes, for which there may be no room.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {largest:,}")
    return path.read_bytes()


def write_files(folder: Path, names: Iterable[str], records: Records | None = None, **more: Any) -> None:
    """Sync the named files of `folder` to disk, list them with sizes and checksums, and sync the list.

    Args:
        records: checksums of all records of the `.distcp` files; None leaves those files without.
    """
    sizes, checksums = {}, {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
        if not name.endswith(_LARGE):
            checksums[name] = _checksum_of(folder / name)
    content = {"files": sizes, "checksum": _CHECKSUM, "checksums": checksums, "records": records, **more}
    temporary = folder / (FILES_FILE + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILES_FILE)
    sync_folder(folder)


def read_files(folder: Path) -> dict[str, Any]:
    """What `write_files` wrote; ValueError when it is no such list."""
    try:
        content = json.loads(read_whole(folder / FILES_FILE))
        sizes, checksums = content["files"], content.get("checksums", {})
        if all(type(size) is int and _may_be_listed(name) for name, size in sizes.items()) and (
            all(_may_be_listed(name) and type(sum) is str for name, sum in checksums.items())
        ):
            return content
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{folder / FILES_FILE} is no list of files")


def check_content(folder: Path, name: str, content: bytes) -> None:
    """ValueError if a file's contents are not those that the list has a checksum of."""
    if not (folder / FILES_FILE).is_file():
        return
    expected = read_files(folder).get("checksums", {}).get(name)
    if expected is not None and (found := Checksum(content).hexdigest()) != expected:
        raise ValueError(
            f"{folder / name} has checksum {found}, but {expected} was written; the checkpoint is damaged, load "
            "another iter_* folder"
        )


def is_finite(folder: Path) -> bool:
    """Whether a checkpoint's values were numbers when it was written; one that does not say so counts as finite."""
    try:
        return not (folder / FILES_FILE).is_file() or read_files(folder).get("not_finite") is None
    except ValueError:  # damaged: `damage` says so
        return False


def record_checksums(folder: Path) -> Records | None:
    """Checksums of the records of a checkpoint's large files; None for one that was written without."""
    if not (folder / FILES_FILE).is_file():
        return None
    content = read_files(folder)
    if content.get("records") is None:
        return None
    if content.get("checksum") != _CHECKSUM:
        raise ValueError(f"{folder / FILES_FILE} has checksums of kind {content.get('checksum')!r}, not {_CHECKSUM}")
    try:
        return {
            file: {int(offset): str(sum) for offset, sum in sums.items()} for file, sums in content["records"].items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{folder / FILES_FILE} is no list of files") from None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Folders without the list (older ones) say None.

    The list is read, each file is asked for its length, and small ones are read: records of large files are compared
    when they are loaded.
    """
    if not os.path.lexists(folder / FILES_FILE):
        return None
    try:
        content = read_files(folder)
    except ValueError as error:
        return str(error)
    for name, size in content["files"].items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):  # no name that the system could have
            return f"{os.path.normpath(folder / name)!a:.300} is missing"
        if found != size:
            return f"{os.path.normpath(folder / name)} has {found} bytes, but {size} were written"
    if content.get("checksum", _CHECKSUM) != _CHECKSUM:
        return f"{folder / FILES_FILE} has checksums of kind {content['checksum']!r}, expected {_CHECKSUM}"
    for name, expected in content.get("checksums", {}).items():
        try:
            found = _checksum_of(folder / name)
        except (OSError, ValueError) as error:
            return f"{os.path.normpath(folder / name)} cannot be read ({error})"
        if found != expected:
            return f"{os.path.normpath(folder / name)} has checksum {found}, but {expected} was written"
    return None


def sync_folder(folder: Path) -> None:
    """Make names in a folder last, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # not all network file systems know it
        pass
    finally:
        os.close(descriptor)


def _may_be_listed(name: str) -> bool:
    # Assets lie in a folder of the checkpoint's.
    return may_be_file_of_checkpoint(name) or (
        not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    )


def _checksum_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError("it is no regular file")
    checksum = Checksum()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return checksum.hexdigest()
