"""Hidden files `.NAME.….part` beside a file that is being written: held by their writer, removed once it is dead."""

import fcntl
import glob
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hacl_megatron.config.files.regular import only_regular


def hold(file: IO[Any] | int) -> None:
    """Says that this process writes the file: a lock that goes with it. On a file system without locks: nothing."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def remove_leftovers(path: Path) -> None:
    """Removes what killed writers of `path` left."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.part", root_dir=path.parent):
        with suppress(OSError), open(path.parent / name, "rb+", opener=only_regular) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path.parent / name)
