"""A JSON lines file that grows line by line, so that a killed run loses nothing that it had done and paid for.

A line is with the system before the next one is begun, and so safe from a kill of this process. A run that was killed
leaves at most one cut line, which the next one removes. One process at a time holds the file, where the file system
has locks.
"""

import fcntl
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hacl_megatron.config.console import notify
from hacl_megatron.config.files.regular import NotRegular, only_regular


class AppendOnlyLines(AbstractContextManager):
    """The file and its lock, for the classes that say what stands on a line; a context manager.

    Args:
        path: continued if it is there.
        busy: what a user reads where another process holds the file, behind its name.
    """

    def __init__(self, path: Path, *, busy: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self._file = open(path, "a+b", opener=only_regular)  # noqa: SIM115  # closed by __exit__
        except NotRegular as error:
            raise ValueError(f"{path}: {error.strerror}; expected JSON lines, or a file to be made") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}{busy}") from None
        except OSError as error:  # a file system without locks
            notify(f"{path} cannot be locked here ({error.strerror}): see that no other process writes it meanwhile")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0

    def _read(self, take: Callable[[Any, int], None], *, broken: str) -> None:
        """Hands each line's value and place to `take`, one by one, and removes a last line that was cut.

        Raises ValueError with `broken` behind the file's name, `{}` in it the line's number, for a line that is no
        JSON or that `take` cannot use.
        """
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            try:
                take(json.loads(line), place)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self._file.close()
                raise ValueError(f"{self.path}{broken.format(number)}") from None
            place += len(line)

    def _append(self, record: dict[str, Any], *, ascii_only: bool) -> int:
        """Adds a line, which is with the system when this returns; gives its place."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        return place

    def _line_at(self, place: int) -> Any:
        self._file.seek(place)
        return json.loads(self._file.readline())
