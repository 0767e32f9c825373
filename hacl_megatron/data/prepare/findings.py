"""What a JSON file holds that a reader of it should hear about: read in another way than it is written, or not at all.

read_records ─count(kind, name)→ Findings ─as_json→ manifest's metadata ─lines→ terminal, prepare's report
"""

from collections.abc import Iterator
from typing import Any

NAMED = 3
"""So many records of a kind are named."""


class Findings:
    """How often each kind was met, and the first records of it."""

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        """`known`: what `as_json` gave."""
        self._kinds: dict[str, tuple[int, list[str]]] = {
            kind: (int(found["records"]), list(found["first"])) for kind, found in (known or {}).items()
        }

    def count(self, kind: str, name: str) -> None:
        """`kind` says, as the end of a sentence, what was found and what becomes of it; `name` is the record's."""
        number, first = self._kinds.get(kind, (0, []))
        if number < NAMED:
            first = [*first, name.encode("utf-8", "replace").decode()]
        self._kinds[kind] = (number + 1, first)

    def as_json(self) -> dict[str, Any]:
        return {kind: {"records": number, "first": first} for kind, (number, first) in self._kinds.items()}

    def lines(self) -> Iterator[str]:
        """`3 records (a, b, c): no image: ...`, one line a kind."""
        for kind, (number, first) in self._kinds.items():
            more = ", ..." if number > len(first) else ""
            yield f"{number:,} record{'s' * (number > 1)} ({', '.join(first)}{more}): {kind}"
