"""From LLaVA JSON to one Arrow manifest: streaming, in parallel, and going on where it was killed.

    JSON ─read_records→ Entry ─duplicates dropped→ chunk ─threads: measure, build_batch→ parts/00012-….arrow ─merge→
                                                                                                     manifest.arrow

One thread reads, checks and hashes; `num_workers` others count tokens and decode images, which both leave the
interpreter's lock. A chunk's part is named by the hash of its records and of what is measured about them: a second
start reads the JSON again (seconds) and skips every part that is there and still right.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from hacl_megatron.data.prepare.arrow_manifest import FORMAT, Entry, Measures, build_batch, make_entry, with_metadata
from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.json_text import is_text
from hacl_megatron.data.prepare.llava_json import Record, read_records
from hacl_megatron.data.prepare.sealed_arrow import open_sealed, write_sealed
from hacl_megatron.data.prepare.share import Share

CHUNK_SAMPLES = 4096
CHUNK_BYTES = 16 << 20
"""A chunk ends at whichever comes first."""

_UNTRAINED, _ROWS = b"untrained", b"rows"
"""Keys of a part's metadata: `Findings.as_json`, so that a start that takes the part over measures nothing anew; and
of each row what only whoever joins shares needs, `num_bytes` and, where there is one, the kind of `untrained`."""

Measure = Callable[[Sequence[Record]], Measures]
"""Finds out about the images and texts of a chunk; runs in several threads at once."""


@dataclass(kw_only=True)
class Counts:
    """What became of the records."""

    samples_per_file: list[int] = field(default_factory=list)
    """Kept."""
    findings: list[Findings] = field(default_factory=list)
    """What is to be said about each file."""
    untrained: Findings = field(default_factory=Findings)
    """Records kept that will train nothing, by kind, where `measure` looked for them."""
    dropped: int = 0
    """Same id and same content as an earlier record."""
    renamed: int = 0
    """Same id as an earlier record with other content: kept as `id#2`, `id#3`, ..."""


def build_parts(
    paths: Sequence[str],
    folder: str,
    *,
    measure: Measure | None = None,
    fingerprint: str = "",
    deduplicate: bool,
    num_workers: int,
    progress: Callable[[int], Any] = lambda num_bytes: None,
    share: Share | None = None,
) -> tuple[list[str], Counts]:
    """Writes the record batches of some JSON files into `folder`, each a file; returns those files and the counts.

    Args:
        fingerprint: says what `measure` depends on besides the records; parts made under another are not taken over.
        progress: called with the number of bytes read since the last call.
        share: reads this part of the files alone.

    Raises ValueError for the first fault of the files' structure.
    """
    os.makedirs(folder, exist_ok=True)
    counts, parts = Counts(), []
    pending: deque[Future[str]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as threads:
        try:
            for entries in _chunks(_entries(paths, deduplicate, counts, progress, share)):
                path = os.path.join(folder, f"{len(parts) + len(pending):06d}-{_chunk_key(entries, fingerprint)}.arrow")
                pending.append(threads.submit(_write_part, path, entries, measure))
                while len(pending) > num_workers + 1:
                    parts.append(pending.popleft().result())
            parts += [future.result() for future in pending]
            for part in parts:
                counts.untrained.add(json.loads(read_part(part).schema.metadata[_UNTRAINED]))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return parts, counts


def merge_parts(parts: Sequence[str], output: str, metadata: dict[str, Any], edit: Any = None) -> None:
    """Writes the parts as one manifest, which appears at `output` whole or not at all.

    `edit` changes each record batch on its way.
    """
    batches = map(read_part, parts)
    write_sealed(output, with_metadata(metadata), batches if edit is None else map(edit, batches))


def read_part(path: str) -> pa.RecordBatch:
    """The record batch of one part, mapped into memory. Raises ValueError where it is not what was written."""
    try:
        return open_sealed(path).get_batch(0)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: {error}; remove it and start again") from None


def write_part(path: str, batch: pa.RecordBatch) -> None:
    """Writes one record batch as a file that is there whole or not at all."""
    write_sealed(path, batch.schema, [batch])


def _write_part(path: str, entries: list[Entry], measure: Measure | None) -> str:
    if not is_whole(path):
        measures = Measures() if measure is None else measure([entry.record for entry in entries])
        untrained = Findings({"total": len(entries)})
        kinds = {row: kind for row, kind in enumerate(measures.untrained or ()) if kind is not None}
        for row, kind in kinds.items():
            untrained.count(kind, entries[row].record.name)
        rows = {"num_bytes": [entry.num_bytes for entry in entries], "untrained": kinds}
        about = {_UNTRAINED: json.dumps(untrained.as_json()), _ROWS: json.dumps(rows)}
        write_part(path, build_batch(entries, measures).replace_schema_metadata(about))
    return path


def about_rows(part: pa.RecordBatch) -> tuple[list[int], dict[int, str]]:
    """Of a part of `build_parts` the bytes of each row, and why rows will train nothing, where that was looked for."""
    rows = json.loads(part.schema.metadata[_ROWS])
    return rows["num_bytes"], {int(row): kind for row, kind in rows["untrained"].items()}


def is_whole(path: str) -> bool:
    """Whether an earlier start wrote this part; a power cut may have left a renamed file without its content."""
    try:
        read_part(path)
    except (OSError, ValueError):
        return False
    return True


def _chunk_key(entries: list[Entry], fingerprint: str) -> str:
    digest = hashlib.blake2b(f"{FORMAT} {fingerprint}".encode(), digest_size=8)
    for entry in entries:
        name = entry.record.name.encode("utf-8", "surrogatepass")
        digest.update(b"%d %d %d " % (entry.file, entry.content, len(name)) + name)
    return digest.hexdigest()


def is_full(num_samples: int, num_bytes: int) -> bool:
    """Whether a chunk of so much ends here."""
    return num_samples >= CHUNK_SAMPLES or num_bytes >= CHUNK_BYTES


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    chunk, num_bytes = [], 0
    for entry in entries:
        chunk.append(entry)
        num_bytes += entry.num_bytes
        if is_full(len(chunk), num_bytes):
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _entries(
    paths: Sequence[str],
    deduplicate: bool,
    counts: Counts,
    progress: Callable[[int], Any],
    share: Share | None,
) -> Iterator[Entry]:
    """The records to keep, in the files' order."""
    names = Names()
    spans = [None] * len(paths) if share is None else share.spans(paths)
    for file, (path, span) in enumerate(zip(paths, spans, strict=True)):
        counts.samples_per_file.append(0)
        counts.findings.append(Findings())
        if share is not None and span is None:
            continue
        reported = 0 if span is None else span.first
        records = read_records(path, findings=counts.findings[-1], span=span)
        for number, (record, position) in enumerate(records):
            entry = make_entry(record, file)
            if not entry.fits and (kind := _unusable_text(record)) is not None:
                counts.findings[-1].count(kind, record.name)
            if deduplicate:
                name = names.of(entry.record.name, entry.content, counts)
                if name is None:
                    continue
                if name != entry.record.name:
                    entry = make_entry(entry.record, entry.file, name)
            counts.samples_per_file[-1] += 1
            yield entry
            if number % 256 == 0:
                progress(position - reported)
                reported = position
        progress((os.path.getsize(path) if span is None else span.end) - reported)


def _unusable_text(record: Record) -> str | None:
    """Why no tokenizer takes a record's words; None where one would."""
    words = [value for _, value in record.turns]
    if not all(isinstance(value, str) for value in words):
        return "a turn that is no string: training leaves it out, as a bad sample"
    listed = [caption for pair in record.pairs for caption in (pair.caption, *pair.hallucinated)]
    if not all(map(is_text, (*words, record.text or "", *record.hallucinated, *(record.rejected or ()), *listed))):
        return "half of a surrogate pair, which is no text: training leaves it out, as a bad sample"
    return None


class Names:
    """The names that records have taken, and their contents; some 180 bytes a record."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int | list[int]] = {}
        """The contents met under each name (its hash): one number, or a list where there are more."""

    def of(self, name: str, content: int, counts: Counts) -> str | None:
        """The name that a record is kept under, another where its own is taken; None where it repeats an earlier one.

        Counts what it drops and renames.
        """
        key = _name_key(name)
        known = self._seen.get(key)
        if known is None:
            self._seen[key] = content
            return name
        contents = known if isinstance(known, list) else [known]
        if content in contents:
            counts.dropped += 1
            return None
        self._seen[key] = [*contents, content]
        counts.renamed += 1
        name = f"{name}#{len(contents) + 1}"
        while (key := _name_key(name)) in self._seen:
            name += "#2"  # the file has such a name itself
        self._seen[key] = content
        return name


def _name_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def remove_folder(folder: str, *, last: str | None = None) -> None:
    """Removes a work folder with all its parts, the file `last` behind all others."""
    for name in os.listdir(folder) if last is not None else ():
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        elif name != last:
            with contextlib.suppress(OSError):  # what stays does no harm
                os.unlink(path)
    shutil.rmtree(folder, ignore_errors=True)
