"""From LLaVA JSON to one Arrow manifest: streaming, in parallel, and going on where it was killed.

    JSON ─read_records→ Entry ─duplicates dropped→ chunk ─threads: measure, build_batch→ parts/00012-….arrow ─merge→
                                                                                                     manifest.arrow

One thread reads, checks and hashes; `num_workers` others count tokens and decode images, which both leave the
interpreter's lock. A chunk's part is named by the hash of its records and of what is measured about them: a second
start reads the JSON again (seconds) and skips every part that is there and still right.
"""

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

CHUNK_SAMPLES = 4096
CHUNK_BYTES = 16 << 20
"""A chunk ends at whichever comes first."""

_UNTRAINED = b"untrained"
"""Key of a part's metadata: `Findings.as_json`; a start that takes the part over measures nothing anew."""

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
) -> tuple[list[str], Counts]:
    """Writes the record batches of some JSON files into `folder`, each a file; returns those files and the counts.

    Args:
        fingerprint: says what `measure` depends on besides the records; parts made under another are not taken over.
        progress: called with the number of bytes read since the last call.

    Raises ValueError for the first fault of the files' structure.
    """
    os.makedirs(folder, exist_ok=True)
    counts, parts = Counts(), []
    pending: deque[Future[str]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as threads:
        try:
            for entries in _chunks(_entries(paths, deduplicate, counts, progress)):
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
        for entry, kind in zip(entries, measures.untrained or (), strict=False):
            if kind is not None:
                untrained.count(kind, entry.record.name)
        batch = build_batch(entries, measures)
        write_part(path, batch.replace_schema_metadata({_UNTRAINED: json.dumps(untrained.as_json())}))
    return path


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


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    chunk, num_bytes = [], 0
    for entry in entries:
        chunk.append(entry)
        num_bytes += entry.num_bytes
        if len(chunk) >= CHUNK_SAMPLES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _entries(
    paths: Sequence[str], deduplicate: bool, counts: Counts, progress: Callable[[int], Any]
) -> Iterator[Entry]:
    """The records to keep, in the files' order."""
    seen: dict[bytes, int | list[int]] = {}
    for file, path in enumerate(paths):
        counts.samples_per_file.append(0)
        counts.findings.append(Findings())
        reported = 0
        for number, (record, position) in enumerate(read_records(path, findings=counts.findings[-1])):
            entry = make_entry(record, file)
            if not entry.fits and (kind := _unusable_text(record)) is not None:
                counts.findings[-1].count(kind, record.name)
            if deduplicate:
                kept = _unless_duplicate(entry, seen, counts)
                if kept is None:
                    continue
                entry = kept
            counts.samples_per_file[-1] += 1
            yield entry
            if number % 256 == 0:
                progress(position - reported)
                reported = position
        progress(os.path.getsize(path) - reported)


def _unusable_text(record: Record) -> str | None:
    """Why no tokenizer takes a record's words; None where one would."""
    words = [value for _, value in record.turns]
    if not all(isinstance(value, str) for value in words):
        return "a turn that is no string: training leaves it out, as a bad sample"
    listed = [caption for pair in record.pairs for caption in (pair.caption, *pair.hallucinated)]
    if not all(map(is_text, (*words, record.text or "", *record.hallucinated, *(record.rejected or ()), *listed))):
        return "half of a surrogate pair, which is no text: training leaves it out, as a bad sample"
    return None


def _unless_duplicate(entry: Entry, seen: dict[bytes, int | list[int]], counts: Counts) -> Entry | None:
    """The entry, under another name where its own is taken; None where it repeats an earlier one.

    `seen` has the contents met under each name (its hash): one number, or a list where there are more.
    """
    key = hashlib.blake2b(entry.record.name.encode("utf-8", "surrogatepass"), digest_size=12).digest()
    known = seen.get(key)
    if known is None:
        seen[key] = entry.content
        return entry
    contents = known if isinstance(known, list) else [known]
    if entry.content in contents:
        counts.dropped += 1
        return None
    seen[key] = [*contents, entry.content]
    counts.renamed += 1
    name = f"{entry.record.name}#{len(contents) + 1}"
    while (key := hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()) in seen:
        name += "#2"  # the file has such a name itself
    seen[key] = entry.content
    return make_entry(entry.record, entry.file, name)


def remove_folder(folder: str) -> None:
    """Removes a work folder with all its parts."""
    shutil.rmtree(folder, ignore_errors=True)
