"""A file that several processes wrote in shares, joined into what one process would have written, to the byte.

    G.share-00000-of-00002.jsonl + .done.json ─┐
    G.share-00001-of-00002.jsonl + .done.json ─┴─→ G.jsonl

A record's hallucinated captions follow from the seed, its name and its caption; so shares need to know nothing of one
another. A share is done when its file is there, with what it was made from beside it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from hacl_megatron.data.prepare.share import Share
from hacl_megatron.hallucinate.files import writing

_HEAD, _TAIL, _EMPTY = b"[\n", b"\n]\n", b"[]\n"
"""Around the records of a JSON list, as `RecordWriter` writes it."""


def share_target(target: Path, share: Share) -> Path:
    """Where a share is written."""
    return target.with_name(f"{target.stem}.share-{share}{target.suffix}")


def settings_of(source: Path, **settings: Any) -> dict[str, Any]:
    """What has to be the same for all shares."""
    return {"input": os.path.abspath(source), "bytes": source.stat().st_size, **settings}


def write_done(target: Path, settings: dict[str, Any]) -> None:
    """Says that the share at `target` is whole, and what it was made from."""
    with writing(_done(target)) as file:
        json.dump(settings, file)


def is_done(target: Path, settings: dict[str, Any]) -> bool:
    """Whether the share is there, made from the same."""
    try:
        found = json.loads(_done(target).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return found == settings and target.is_file()


def merge(target: Path, count: int, settings: dict[str, Any]) -> int:
    """Joins the shares into `target`, and what was rejected likewise; removes them. Returns the bytes of `target`.

    Raises ValueError naming the shares that are not done.
    """
    shares = [share_target(target, Share(number=number, count=count)) for number in range(count)]
    missing = [number for number, share in enumerate(shares) if not is_done(share, settings)]
    if missing:
        more = ", ..." if len(missing) > 10 else ""
        raise ValueError(
            f"{len(missing)} of {count} shares of --output {target} are not done with these settings and this input: "
            f"--shard-index {', '.join(map(str, missing[:10]))}{more}; run them (again), then --merge"
        )
    with writing(target) as file:
        _join(shares, file.buffer, lines=target.suffix == ".jsonl")
    rejected = [path for share in shares if (path := _rejected(share)).is_file()]
    if rejected:
        with writing(_rejected(target)) as file:
            _join(rejected, file.buffer, lines=True)
    for path in (*shares, *map(_done, shares), *rejected):
        path.unlink()
    return target.stat().st_size


def _join(paths: list[Path], out: IO[bytes], *, lines: bool) -> None:
    written = False
    for path in paths:
        size = path.stat().st_size
        if not size or (not lines and size == len(_EMPTY)):
            continue
        with path.open("rb") as file:
            if lines:
                shutil.copyfileobj(file, out, 1 << 20)
                continue
            out.write(b",\n" if written else _HEAD)
            written, left = True, size - len(_HEAD) - len(_TAIL)
            file.seek(len(_HEAD))
            while left:
                piece = file.read(min(left, 1 << 20))
                out.write(piece)
                left -= len(piece)
    if not lines:
        out.write(_TAIL if written else _EMPTY)


def _done(target: Path) -> Path:
    return target.with_name(f"{target.name}.done.json")


def _rejected(target: Path) -> Path:
    return target.with_name(f"{target.name}.rejected.jsonl")
