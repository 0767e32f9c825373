"""Whether a checkpoint is as it was written: every file is there and of its length.

`files.json` of a checkpoint folder is written last. It lists the files with their sizes, those of a frozen part beside
the folder too, so that a look at each file's length finds what a full disk, a killed copy or a clean-up left.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILES_FILE = "files.json"
FROZEN_FOLDER = "frozen"
"""In a SAVE folder: weights that do not train, which all its checkpoints share (`frozen`)."""
_REFERENCE = re.compile(r"\.\./" + FROZEN_FOLDER + r"/[0-9a-f]{16}/[^/\\]+")


def may_be_file_of_checkpoint(name: str) -> bool:
    """Whether an index may name this file: one in the checkpoint's own folder, or one of a frozen part beside it."""
    return Path(name).name == name or _REFERENCE.fullmatch(name) is not None


def write_files(folder: Path, names: Iterable[str], **more: Any) -> None:
    """Sync the named files of `folder` to disk, list them with their sizes, and sync the list."""
    sizes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
    temporary = folder / (FILES_FILE + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"files": sizes, **more}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILES_FILE)
    sync_folder(folder)


def read_files(folder: Path) -> dict[str, Any]:
    """What `write_files` wrote; ValueError when it is no such list."""
    try:
        content = json.loads((folder / FILES_FILE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("files"), dict):
            return content
    except (ValueError, OSError):
        pass
    raise ValueError(f"{folder / FILES_FILE} is no list of files")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Folders without the list (older, converted) say None.

    The list is read, and each file is asked for its length; no contents are.
    """
    if not (folder / FILES_FILE).is_file():
        return None
    try:
        sizes = read_files(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{os.path.normpath(folder / name)} is missing"
        if found != size:
            return f"{os.path.normpath(folder / name)} has {found} bytes, but {size} were written"
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
