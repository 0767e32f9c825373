"""Answers as they come, one line each, so that a killed run loses none and repeats none.

answers.jsonl                  one official record a line, appended and flushed
answers.jsonl.settings.json    what the answers were made with; a run with other settings may not add to them
"""

import fcntl
import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hacl_megatron.evaluation.json_files import read_json
from hacl_megatron.evaluation.scores import write_whole


class Journal:
    """An append-only file of answers, held by one process at a time; a context manager.

    Args:
        path: the JSON lines file; continued if it is there.
        settings: JSON values that decide what the answers are.
        key: what tells a record from the others.

    Raises:
        ValueError: the file was made with other settings, is broken before its last line, or another process holds it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], key: Callable[[dict[str, Any]], Hashable]) -> None:
        self.path = path
        self._key = key
        self.done: dict[Hashable, dict[str, Any]] = {}
        """Records in the file, by their keys."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by __exit__
        try:
            self._lock()
            self._check_settings(settings)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it has reached the operating system when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.done[self._key(record)] = record

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is writing answers there; wait for it, or give --answers another file"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = settings_path(self.path)
        empty = os.fstat(self._file.fileno()).st_size == 0
        if empty:
            write_whole(path, json.dumps(dict(settings), indent=1) + "\n")
            return
        if not path.is_file():
            raise ValueError(
                f"{self.path} holds answers that no run of this command began; leave --hf out to score them, or name "
                "another file to write"
            )
        before = read_json(path)
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} holds answers made with {name} {_shown(before.get(name))}, now it is "
                    f"{_shown(settings.get(name))}; repeat the earlier command, or remove the file, or name another"
                )

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # killed while it wrote the last line
            self._file.truncate(whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                self.done[self._key(record)] = record
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}: not a record; remove the line to have it done again"
                ) from (None)
        self._file.seek(0, os.SEEK_END)


def settings_path(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.settings.json")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
