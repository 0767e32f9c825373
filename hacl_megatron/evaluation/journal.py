"""Answers as they come, one line each, so that a killed run loses none and repeats none.

answers.jsonl                  one official record a line, appended and flushed
answers.jsonl.settings.json    what the answers were made with; a run with other settings may not add to them
"""

import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.append_only import AppendOnlyLines
from hacl_megatron.evaluation.json_files import read_json
from hacl_megatron.evaluation.scores import write_whole


class Journal(AppendOnlyLines):
    """An append-only file of answers, held by one process at a time; a context manager.

    Args:
        path: the JSON lines file; continued if it is there.
        settings: JSON values that decide what the answers are.
        key: what tells a record from the others.
        what, flag: what the records are and which flag names the file, or its folder, for messages.

    Raises:
        ValueError: the file was made with other settings, is broken before its last line, or another process holds it.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        key: Callable[[dict[str, Any]], Hashable],
        *,
        what: str = "answers",
        flag: str = "--answers",
    ) -> None:
        another = "file" if flag == "--answers" else "folder"
        super().__init__(
            path, busy=f": another process is writing {what} there; wait for it, or give {flag} another {another}"
        )
        self._key, self._what = key, what
        self.done: dict[Hashable, dict[str, Any]] = {}
        """Records in the file, by their keys."""
        try:
            self._check_settings(settings)
        except BaseException:
            self._file.close()
            raise
        self._read(self._take, broken=", line {}: not a record; remove the line to have it done again")

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it has reached the operating system when this returns."""
        self._append(record, ascii_only=False)
        self._take(record)

    def _take(self, record: dict[str, Any], _: int = 0) -> None:
        self.done[self._key(record)] = record

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = settings_path(self.path)
        if self.is_empty:
            write_whole(path, json.dumps(dict(settings), indent=1) + "\n")
            return
        if not path.is_file():
            raise ValueError(
                f"{self.path} holds {self._what} that no run of this command began; "
                + ("leave --hf out to score them, or " if self._what == "answers" else "")
                + "name another file to write"
            )
        before = read_json(path)
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} holds {self._what} made with {name} {_shown(before.get(name))}, now it is "
                    f"{_shown(settings.get(name))}; repeat the earlier command, or remove the file, or name another"
                )


def settings_path(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.settings.json")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)
