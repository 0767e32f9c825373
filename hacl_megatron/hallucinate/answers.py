"""The answers of a language model on disk: an append-only JSONL file, so that no answer is ever paid for twice.

Each answer is on disk before the next request for its caption goes out. A run that was killed leaves at most one cut
line, which the next one removes. One process writes at a time.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path


class AnswerLog:
    """Answers by key. Memory: some 100 bytes an answer (their places in the file, not their texts)."""

    def __init__(self, path: Path):
        """Opens or creates; ValueError if another run writes it or a line inside is broken."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "a+b")  # noqa: SIM115  # open as long as the object
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"{path}: another run is writing it; wait for it or choose another --output") from error
        self._places: dict[bytes, int] = {}
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                os.truncate(path, place)  # the answer that was being written when the last run was killed
                break
            try:
                self._places[bytes.fromhex(json.loads(line)["key"])] = place
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is no answer of this tool; move the file away") from error
            place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> tuple[str, bool] | None:
        """(text, whether it is complete) of the answer to a request, if there is one."""
        place = self._places.get(key)
        if place is None:
            return None
        self._file.seek(place)
        answer = json.loads(self._file.readline())
        return answer["answer"], answer["complete"]

    def add(self, key: bytes, name: str, answer: str, complete: bool) -> None:
        """Append an answer; with the system (safe from a kill of this process) when this returns."""
        place = self._file.seek(0, os.SEEK_END)
        line = json.dumps({"key": key.hex(), "id": name, "answer": answer, "complete": complete}) + "\n"
        self._file.write(line.encode("ascii"))
        self._file.flush()
        self._places[key] = place

    def close(self) -> None:
        """Gives the file free for another run."""
        self._file.close()


def answer_key(*parts: object) -> bytes:
    """Names a request by everything that its answer depends on."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.blake2b(text.encode(), digest_size=10).digest()
