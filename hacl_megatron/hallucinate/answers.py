"""The answers of a language model on disk, each before its caption is asked about again: none is paid for twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.append_only import AppendOnlyLines


class AnswerLog(AppendOnlyLines):
    """Answers by key. Memory: some 100 bytes an answer (their places in the file, not their texts)."""

    def __init__(self, path: Path) -> None:
        """Opens or creates; ValueError if another run writes it or a line inside is broken."""
        super().__init__(path, busy=": another run is writing it; wait for it or choose another --output")
        self._places: dict[bytes, int] = {}

        def take(answer: dict[str, Any], place: int) -> None:
            self._places[bytes.fromhex(answer["key"])] = place

        self._read(take, broken=": line {} is no answer of this tool; move the file away")

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> tuple[str, bool] | None:
        """(text, whether it is complete) of the answer to a request, if there is one."""
        place = self._places.get(key)
        if place is None:
            return None
        answer = self._line_at(place)
        return answer["answer"], answer["complete"]

    def add(self, key: bytes, name: str, answer: str, complete: bool) -> None:
        """Append an answer; with the system (safe from a kill of this process) when this returns."""
        line = {"key": key.hex(), "id": name, "answer": answer, "complete": complete}
        self._places[key] = self._append(line, ascii_only=True)


def answer_key(*parts: object) -> bytes:
    """Names a request by everything that its answer depends on."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.blake2b(text.encode(), digest_size=10).digest()
