"""Which records of some files one of several processes reads: a stretch of bytes, and all that begins in it.

    a.jsonl ───────┬─────── b.json ── c.jsonl ─────┬────
    share 0        │ share 1                       │ share 2       b.json is one list: where it begins, it is read whole

Stretches follow the files' order and sizes alone, so that shares one behind another are the files as one process reads
them. Lines are divided; a JSON list is not, for nothing tells where a record begins before it is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

LINES_ENDINGS = (".jsonl", ".ndjson")
"""Of files that hold a record a line, in small or capital letters."""


@dataclass(slots=True)
class Span:
    """The records of a file that begin in a stretch of its bytes."""

    first: int
    end: int
    skipped: int = 0
    """Records before them; known once the first is read."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of several processes that divide some files' records among them.

    Raises ValueError, one line, where there is no such share.
    """

    number: int
    """From 0."""
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--num-shards is {self.count}; expected at least 1")
        if not 0 <= self.number < self.count:
            raise ValueError(f"--shard-index {self.number}, expected 0 to {self.count - 1} (--num-shards - 1)")

    def __str__(self) -> str:
        return f"{self.number:05d}-of-{self.count:05d}"

    def spans(self, paths: Sequence[str]) -> list[Span | None]:
        """Of each file the share's part; None where it has none."""
        sizes = [os.path.getsize(path) for path in paths]
        total, start, spans = sum(sizes), 0, []
        low, high = (total * number // self.count for number in (self.number, self.number + 1))
        for path, size in zip(paths, sizes, strict=True):
            if path.lower().endswith(LINES_ENDINGS):
                first, end = max(low - start, 0), min(high - start, size)
                spans.append(Span(first, end) if first < end else None)
            else:
                spans.append(Span(0, size) if low <= start < high else None)
            start += size
        return spans


def check_sharing(num_shards: int, shard_index: int | None, merge: bool) -> Share | None:
    """The share that the flags of these names ask for; None for all of the work, or for `merge`.

    Raises ValueError, one line, where they do not go together.
    """
    share = Share(number=shard_index or 0, count=num_shards)
    if num_shards > 1 and merge == (shard_index is not None):
        raise ValueError(
            f"--num-shards {num_shards}: give either --shard-index, for one of these shares, or --merge, when all are "
            "done"
        )
    if merge and num_shards == 1:
        raise ValueError("--merge is given without --num-shards; say how many shares there are")
    return None if shard_index is None or num_shards == 1 else share


def uneven(paths: Sequence[str], count: int) -> str | None:
    """A line on lists that are larger than a share may be, so that others wait; None where there are none."""
    fair = sum(map(os.path.getsize, paths)) / count
    lists = [path for path in paths if not path.lower().endswith(LINES_ENDINGS)]
    large = next((path for path in lists if os.path.getsize(path) > 1.5 * fair), None)
    if large is None or count == 1:
        return None
    return f"{large} is one JSON list, which one share reads alone while others wait; JSON lines would be divided"
