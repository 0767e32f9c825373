"""Streams the records of a LLaVA JSON or JSONL file with every key they have, and writes them again.

Input and output are JSON (one list) or JSON lines (`.jsonl`), each by its own name. The output is written beside its
place and renamed when complete.

Several processes may write a file in shares, which are then joined into what one would have written, to the byte:

    G.share-00000-of-00002.jsonl + .done.json ─┐
    G.share-00001-of-00002.jsonl + .done.json ─┴─→ G.jsonl

A record's hallucinated captions follow from the seed, its name and its caption; shares need to know nothing of one
another.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hacl_megatron.config.files.partial import hold, remove_leftovers
from hacl_megatron.data.prepare.dialogue_json import turns_of
from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.json_text import DEEPEST, is_deep, is_text
from hacl_megatron.data.prepare.llava_json import decoded_records, text_or_first_answer, value_of
from hacl_megatron.data.prepare.preference_json import PREFERENCE_IMAGE_KEYS, is_preference
from hacl_megatron.data.prepare.records.captions import read_captions
from hacl_megatron.data.prepare.records.images import IMAGE_KEYS, count_images
from hacl_megatron.data.prepare.records.values import Wrong, describe
from hacl_megatron.data.prepare.share import Share, Span
from hacl_megatron.hallucinate.answers import AnswerLog

EDITS_KEY = "Hallucination edits"
"""Beside the released key: for each hallucinated caption a list of {"kind", "before", "after"}."""


def caption_of(record: dict[str, Any]) -> str | None:
    """The caption as `Manifest` takes it from a record with hallucinated captions: `text`, else the first answer.
    Not of several images.

    Of a preference record `text` alone: its answers answer any question.
    """
    turns = () if is_preference(record) else turns_of(record, "", _wrong_in(""))
    text = value_of(record, "text")
    (text,) = (text or [None]) if isinstance(text, list) else [text]
    return text_or_first_answer(text, turns)


def num_images(record: dict[str, Any]) -> int:
    """How many images a record names."""
    return count_images(record, PREFERENCE_IMAGE_KEYS if is_preference(record) else IMAGE_KEYS)


def read_records(path: Path, span: Span | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields (bytes read so far, the record's index in the file, record), with `span` its records alone.

    Raises ValueError naming the file, the record and what is wrong with it.
    """
    for number, (record, line, position) in enumerate(decoded_records(str(path), span=span)):
        index = number if span is None else span.skipped + number
        _check(record, path, index, line)
        yield position, index, record


def _check(record: Any, path: Path, index: int, line: int) -> None:
    """What the tool itself relies on; the rest is the manifest's to check when the file is trained on."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}: record {index} is no object (line {line}: a {type(record).__name__}); expected one with id, "
            "image, conversations"
        )
    where = f"{path}, record {index} (line {line})"
    if is_deep(record):
        raise ValueError(f"{where}: nested deeper than {DEEPEST}; expected a LLaVA record, remove it")
    text, several = value_of(record, "text"), num_images(record) > 1
    if text is not None and not isinstance(text, str | list):
        raise ValueError(f"{where}: key 'text' is a {type(text).__name__}; expected a string, the caption")
    if several or isinstance(text, list):
        read_captions(record, num_images(record), _wrong_in(where), "", Findings())
    if not is_preference(record):
        turns_of(record, where, _wrong_in(where))


def _wrong_in(where: str) -> Wrong:
    """The error for a key of the record there that holds something else than was expected."""
    return lambda key, found, expected: ValueError(f"{where}: key {key!r} is {describe(found)}; expected {expected}")


class RecordWriter:
    """Writes records one after another, as a JSON list or as JSON lines."""

    def __init__(self, file: IO[str], *, lines: bool):
        self._file, self._lines, self._written = file, lines, 0

    def write(self, record: dict[str, Any]) -> bool:
        """Append one record, on a line of its own; whether all of it is text.

        Where it is not (half of a surrogate pair, which JSON can write and UTF-8 cannot), it is written with escapes:
        readers find the very record, and it costs no other.
        """
        text = json.dumps(record, ensure_ascii=False)
        if not (is_all_text := is_text(text)):
            text = json.dumps(record)
        if not self._lines:
            self._file.write(",\n" if self._written else "[\n")
        self._file.write(text)
        self._file.write("\n" if self._lines else "")
        self._written += 1
        return is_all_text

    def close(self) -> None:
        """End the list."""
        if not self._lines:
            self._file.write("\n]\n" if self._written else "[]\n")


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 file that appears at `path` complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    hold(handle)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)  # while it is held
    except BaseException:
        os.unlink(temporary)
        raise


# -------------------------------------------------------------------------------------------------------------- shares

_HEAD, _TAIL, _EMPTY = b"[\n", b"\n]\n", b"[]\n"
"""Around the records of a JSON list, as `RecordWriter` writes it."""


def share_target(target: Path, share: Share) -> Path:
    """Where a share is written."""
    return target.with_name(f"{target.stem}.share-{share}{target.suffix}")


def settings_of(source: Path, **settings: Any) -> dict[str, Any]:
    """What has to be the same for all shares."""
    found = source.stat()
    return {"input": os.path.abspath(source), "bytes": found.st_size, "written_ns": found.st_mtime_ns, **settings}


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


def merge_shares(target: Path, count: int, settings: dict[str, Any], *, force: bool = False) -> int:
    """Joins the shares into `target`, what was rejected and a model's answers likewise; removes them. Returns the bytes
    of `target`. Where an earlier start was killed while it removed them, it removes what is left.

    Args:
        force: replace whatever is at `target`; else what these shares make alone, as an earlier start left it.

    Raises ValueError naming the shares that are not done, or where all hold nothing, or `target` something else.
    """
    shares = [share_target(target, Share(number=number, count=count)) for number in range(count)]
    if is_done(target, settings):
        return _remove(shares, target)
    missing = [number for number, share in enumerate(shares) if not is_done(share, settings)]
    if missing:
        more = ", ..." if len(missing) > 10 else ""
        raise ValueError(
            f"{len(missing)} of {count} shares of --output {target} are not done with these settings and this input: "
            f"--shard-index {', '.join(map(str, missing[:10]))}{more}; run them (again), then --merge"
        )
    is_lines = target.suffix == ".jsonl"
    if all(share.stat().st_size == (0 if is_lines else len(_EMPTY)) for share in shares):
        raise ValueError(f"{settings['input']}: holds no records; expected at least one")
    if target.exists() and not force and not _holds(target, shares, lines=is_lines):
        raise ValueError(f"--output {target} exists; give --force to replace it, or another name")
    if any(answers_of(share).is_file() for share in shares):
        with AnswerLog(answers_of(target)):  # of an earlier start, whose last line may be cut
            pass
    for place in (answers_of, _rejected):
        found, joined = [path for share in shares if (path := place(share)).is_file()], place(target)
        earlier = [joined] if place is answers_of else []
        if not found or (earlier and _ends_with(joined, found)):  # as a start left it that was killed behind this
            continue
        with writing(joined) as file:
            _join(earlier + found, file.buffer, lines=True)
    with writing(target) as file:
        _join(shares, file.buffer, lines=is_lines)
    write_done(target, settings)
    return _remove(shares, target)


def _remove(shares: list[Path], target: Path) -> int:
    """Removes joined shares and all that belongs to them; last what says that they are joined."""
    for share in shares:
        for path in (share, _done(share), _rejected(share), answers_of(share)):
            path.unlink(missing_ok=True)
    _done(target).unlink()
    return target.stat().st_size


def _holds(target: Path, shares: list[Path], *, lines: bool) -> bool:
    """Whether the file is what the shares make, to the byte."""
    with target.open("rb") as file:
        compared = _Compared(file)
        _join(shares, compared, lines=lines)
        return compared.is_same and not file.read(1)


def _ends_with(log: Path, others: list[Path]) -> bool:
    """Whether these files' lines, one behind the other, are the log's last."""
    start = log.stat().st_size - sum(path.stat().st_size for path in others)
    if start < 0:
        return False
    with log.open("rb") as file:
        file.seek(start)
        compared = _Compared(file)
        _join(others, compared, lines=True)
        return compared.is_same


class _Compared:
    """Is written to, and tells whether a file goes on with the same."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.is_same = file, True

    def write(self, data: bytes) -> int:
        self.is_same = self.is_same and self._file.read(len(data)) == data
        return len(data)


def _join(paths: list[Path], out: "IO[bytes] | _Compared", *, lines: bool) -> None:
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


def answers_of(target: Path) -> Path:
    """Where a model's answers for `target` are kept."""
    return target.with_name(f"{target.name}.answers.jsonl")


def _rejected(target: Path) -> Path:
    return target.with_name(f"{target.name}.rejected.jsonl")
