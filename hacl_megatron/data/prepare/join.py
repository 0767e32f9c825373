"""What several processes prepared, joined into what one process would have made, to the byte.

    .partial/share-00000-of-00002/000000-….arrow … done.json ─┐ names      chunks
    .partial/share-00001-of-00002/000000-….arrow … done.json ─┴ settled ─→ cut anew ─→ .partial/joined-000000.arrow …

Shares keep duplicates, for each knows its own records alone. Whether a name is taken is a question for those rows only
whose name is met twice, or may have been given to another (`7#2`): they are found by a hash of eight bytes a record,
and go through the very rule of a single process, in order. Joining begins anew where it is killed; it reads no JSON.

Each share has a number of its own for the preparation that it belongs to (`begun.json`), and a join lists those it was
made of. So a share that is prepared anew, behind a join that was killed before all was removed, is never taken for what
is joined already, nor the other way round.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.parts import Counts, Names, about_rows, is_full, read_part, write_part
from hacl_megatron.data.prepare.shards import indices_of_share
from hacl_megatron.data.prepare.share import Share

_BEGUN, _DONE, _JOINED, MERGED = "begun.json", "done.json", "joined.json", "merged.json"


def share_folder(work: str, share: Share) -> str:
    """Where a share's parts are."""
    return os.path.join(work, f"share-{share}")


def begin_share(work: str, share: Share) -> bool:
    """Makes the share's folder ready: for going on, or anew where a join of all that it holds is whole already.

    Returns whether there was such a share, which is removed.
    """
    folder = share_folder(work, share)
    begun = os.path.join(folder, _BEGUN)
    is_removed = (is_used_up := _is_used_up(work, folder)) and os.path.exists(begun)
    if is_used_up:
        for index in indices_of_share(work, share):
            os.unlink(index)
        # The number goes last: whoever is killed here does it all again.
        for name in sorted(os.listdir(folder), key=lambda name: name == _BEGUN):
            path = os.path.join(folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    if not os.path.exists(begun):
        _write_json(begun, {"number": uuid.uuid4().hex})
    return is_removed


def _number(folder: str) -> str | None:
    """Of the preparation that a share's folder belongs to."""
    found = _read_json(os.path.join(folder, _BEGUN))
    return None if found is None else found["number"]


def _is_used_up(work: str, folder: str) -> bool:
    """Whether what is in a share's folder, if anything, went into a manifest that is whole."""
    merged = _read_json(os.path.join(work, MERGED))
    return merged is not None and _number(folder) in (None, *merged.get("shares", ()))


def write_done(folder: str, key: str, parts: Sequence[str], counts: Counts) -> None:
    """Says that a share is done.

    Args:
        key: of inputs and settings.
    """
    content = {
        "key": key,
        "parts": [os.path.basename(part) for part in parts],
        "samples": counts.samples_per_file,
        "findings": [found.as_json() for found in counts.findings],
    }
    _write_json(os.path.join(folder, _DONE), content)


def read_done(folder: str, key: str) -> dict[str, Any] | None:
    """What `write_done` wrote under this key; None where the share is not done, or for other settings."""
    return _read_json(os.path.join(folder, _DONE), key)


def write_merged(work: str, key: str, count: int) -> None:
    """Says that the manifest is there, so that the shares may go; the file goes last (`parts.remove_folder`)."""
    _write_json(os.path.join(work, MERGED), {"key": key, "shares": [*map(_number, _folders(work, count))]})


def is_merged(work: str, key: str, count: int) -> bool:
    """Whether `write_merged` was called under this key, whoever called it was killed before all was removed, and no
    share was begun anew since."""
    is_there = _read_json(os.path.join(work, MERGED), key) is not None
    return is_there and all(_is_used_up(work, folder) for folder in _folders(work, count))


def read_joined(work: str, key: str, share: Share) -> list[str] | None:
    """The parts that `join_shares` wrote under this key of this share, as it is, and the others; None where it did
    not."""
    found = _read_json(os.path.join(work, _JOINED), key)
    if found is None or _number(share_folder(work, share)) not in found.get("shares", ()):
        return None
    return [_joined_part(work, number) for number in range(found["parts"])]


def join_shares(
    work: str, paths: Sequence[str], count: int, key: str, *, deduplicate: bool
) -> tuple[list[str], Counts]:
    """Joins the `count` shares below `work`: the parts and counts that `build_parts` would have given.

    Raises ValueError naming the shares that are not done.
    """
    folders = _folders(work, count)
    states = [None if _is_used_up(work, folder) else read_done(folder, key) for folder in folders]
    missing = [number for number, state in enumerate(states) if state is None]
    if missing:
        more = ", ..." if len(missing) > 10 else ""
        raise ValueError(
            f"{len(missing)} of {count} shares are not done with these settings and files: --shard-index "
            f"{', '.join(map(str, missing[:10]))}{more}; run them (again), then --merge"
        )
    counts = Counts(samples_per_file=[0] * len(paths), findings=[Findings() for _ in paths])
    parts: list[str] = []
    for folder, state in zip(folders, states, strict=True):
        parts += [os.path.join(folder, name) for name in state["parts"]]
        for found, known in zip(counts.findings, state["findings"], strict=True):
            found.add(known)
    for path, found in zip(paths, counts.findings, strict=True):
        if not found.total:
            raise ValueError(f"{path}: holds no samples; expected at least one, leave the file out")
    names = _settle(parts, counts) if deduplicate else {}
    written: list[str] = []
    for batch in _chunks(parts, names, counts):
        written.append(_joined_part(work, len(written)))
        write_part(written[-1], batch)
    _write_json(os.path.join(work, _JOINED), {"key": key, "parts": len(written), "shares": [*map(_number, folders)]})
    return written, counts


_MAY_BE_GIVEN = "#[0-9]+$"
"""Ends of the names that `Names` gives."""


def _settle(parts: Sequence[str], counts: Counts) -> dict[int, str | None]:
    """By row over all parts, the name it gets instead of its own; None for one that is dropped."""
    hashes, looked_at, sizes = [np.empty(0, np.uint64)], [np.empty(0, bool)], []
    for part in parts:
        batch = read_part(part)
        ids = batch.column("id")
        texts = ids.cast(pa.binary()).to_pylist()
        hashes.append(np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts)))
        in_question = pc.or_(pc.match_substring_regex(ids, _MAY_BE_GIVEN), batch.column("exact").is_valid())
        looked_at.append(in_question.to_numpy(zero_copy_only=False))
        sizes.append(batch.num_rows)
    every = np.concatenate(hashes)
    hashes.clear()
    ordered = np.sort(every)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    rows, starts = np.flatnonzero(np.concatenate(looked_at) | np.isin(every, twice)), np.cumsum([0, *sizes])
    names = Names()
    settled: dict[int, str | None] = {}
    for number, part in enumerate(parts):
        own = rows[np.searchsorted(rows, starts[number]) : np.searchsorted(rows, starts[number + 1])]
        batch = read_part(part) if len(own) else None
        for row in own.tolist():
            at = row - int(starts[number])
            name = _name(batch, at)
            given = names.of(name, batch.column("content")[at].as_py(), counts)
            if given != name:
                settled[row] = given
    return settled


def _chunks(parts: Sequence[str], names: dict[int, str | None], counts: Counts) -> Iterator[pa.RecordBatch]:
    """The rows of all parts that are kept, under their names, in the chunks that one process would have cut."""
    pieces: list[pa.RecordBatch] = []
    num_samples = num_bytes = first = 0
    for part in parts:
        batch = read_part(part)
        sizes, kinds = about_rows(batch)
        batch = batch.replace_schema_metadata(None)
        rows = [row for row in range(batch.num_rows) if names.get(first + row, "") is not None]
        renamed = {row: name for row in rows if (name := names.get(first + row)) is not None}
        first += batch.num_rows
        if renamed:
            batch = _renamed(batch, renamed)
        untrained = Findings({"total": len(rows)})
        for row in rows if kinds else ():
            if row in kinds:
                untrained.count(kinds[row], _name(batch, row))
        counts.untrained.add(untrained.as_json())
        if len(rows) < batch.num_rows:
            batch = batch.take(pa.array(rows, pa.int64()))
        for file, number in zip(*np.unique(batch.column("file").to_numpy(), return_counts=True), strict=True):
            counts.samples_per_file[file] += int(number)
        begin = 0
        for at, row in enumerate(rows, start=1):
            num_samples += 1
            num_bytes += sizes[row]
            if is_full(num_samples, num_bytes):
                yield pa.concat_batches([*pieces, batch.slice(begin, at - begin)])
                pieces, begin, num_samples, num_bytes = [], at, 0, 0
        if begin < batch.num_rows:
            pieces.append(batch.slice(begin))
    if pieces:
        yield pa.concat_batches(pieces)


def _name(batch: pa.RecordBatch, row: int) -> str:
    """A record's name, which the column `id` holds where it is text."""
    exact = batch.column("exact")[row].as_py()
    return batch.column("id")[row].as_py() if exact is None else json.loads(exact)[0]


def _renamed(batch: pa.RecordBatch, names: dict[int, str]) -> pa.RecordBatch:
    columns = {name: batch.column(name).to_pylist() for name in ("id", "exact")}
    for row, name in names.items():
        columns["id"][row] = name.encode("utf-8", "replace").decode()
        if columns["exact"][row] is not None:
            columns["exact"][row] = json.dumps([name, *json.loads(columns["exact"][row])[1:]])
    return pa.record_batch(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else batch.column(field.name)
            for field in batch.schema
        ],
        schema=batch.schema,
    )


def _folders(work: str, count: int) -> list[str]:
    return [share_folder(work, Share(number=number, count=count)) for number in range(count)]


def _joined_part(work: str, number: int) -> str:
    return os.path.join(work, f"joined-{number:06d}.arrow")


def _write_json(path: str, content: dict[str, Any]) -> None:
    with open(f"{path}.tmp", "w", encoding="ascii") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _read_json(path: str, key: str | None = None) -> dict[str, Any] | None:
    """What is in the file, where it was written under this key, or under any."""
    try:
        with open(path, encoding="ascii") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return found if key is None or found["key"] == key else None
