"""LLaVA JSON files read record by record, whatever their size, and checked.

    bytes ─chunks of 1 MiB─→ text window ─raw_decode─→ object, line 12 ─parse_record─→ Record
           └───────────── decoded_records ─────────────┘

Python's own decoder runs on a moving window of the text: faster than ijson's C backend on LLaVA's files (544 against
355 MB/s here), with the line and column of every fault, and never more of the file in memory than a window.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hacl_megatron.config.files.regular import check_regular, only_regular
from hacl_megatron.data.prepare.dialogue_json import key_of_turns, turns_of
from hacl_megatron.data.prepare.findings import IGNORED_REJECTED, Findings, find_unseen, find_untrained
from hacl_megatron.data.prepare.preference_json import (
    PREFERENCE_IMAGE_KEYS,
    is_preference,
    messages_in,
    read_preference,
)
from hacl_megatron.data.prepare.records.captions import Pair, clean_caption, read_captions
from hacl_megatron.data.prepare.records.images import IMAGE_KEYS, first_image, read_images
from hacl_megatron.data.prepare.records.keys import ANSWER_KEYS, CAPTION_KEYS, HALLUCINATED_KEY
from hacl_megatron.data.prepare.records.values import describe, is_gap, value_of
from hacl_megatron.data.prepare.share import LINES_ENDINGS, Span

LIST_KEYS = ("data", "annotations", "records", "samples")
"""Where one JSON object holds the list of records instead of being it, as `datasets` and COCO write it."""

WINDOW_BYTES = 1 << 20
"""Read at once."""
_LONE_SURROGATES = "surrogatepass"
"""How bytes are decoded: half of a surrogate pair is no UTF-8, but some programs write it. It is its record's fault, as
the same written as an escape is, and costs no other record."""


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record of a LLaVA JSON file; nothing in it depends on the conversation template."""

    name: str
    """The record's own `id`; its first image's name or its index if it has none."""
    images: tuple[str, ...]
    """Image names relative to the image folder; empty for a text-only sample."""
    turns: tuple[tuple[Any, Any], ...]
    """(from, value), as the file has them: not yet checked to be strings or in order."""
    text: str | None
    """The key `text`, the caption of the released files; None if there is none."""
    first_answer_is_caption: bool
    """Whether a key marks the record as a contrastive sample whose caption, without `text`, is its first answer."""
    hallucinated: tuple[str, ...]
    """The caption with hallucinations written in, cleaned; empty ones are left out."""
    rejected: tuple[str, ...] | None = None
    """Of a preference record, what was rejected in the last turn's place, without surrounding blanks; else None."""
    pairs: tuple[Pair, ...] = ()
    """Of a record with several images, those whose captions `text` lists."""


def read_records(
    path: str, *, window_bytes: int = WINDOW_BYTES, findings: Findings | None = None, span: Span | None = None
) -> Iterator[tuple[Record, int]]:
    """Yields the records of a JSON list, or of JSON lines where the name says so, and the bytes read so far.

    What is read in another way than it is written is counted in `findings`. Raises ValueError naming file, record and
    key for whatever is missing, broken or of the wrong type.
    """
    findings = Findings() if findings is None else findings
    number = -1
    for number, (record, line, position) in enumerate(decoded_records(path, window_bytes=window_bytes, span=span)):
        findings.total += 1
        index = number if span is None else span.skipped + number
        yield parse_record(record, path, index, line, findings), position
    if number < 0 and span is None:
        raise ValueError(f"{path}: holds no samples; expected at least one, leave the file out")


def decoded_records(
    path: str, *, window_bytes: int = WINDOW_BYTES, span: Span | None = None
) -> Iterator[tuple[Any, int, int]]:
    """Yields (record as JSON has it, its line, bytes read so far), nothing about it checked; with `span` its part.

    Raises ValueError with the place of whatever is no JSON, or where there is no regular file.
    """
    check_regular(path, "a LLaVA JSON or JSONL file, check --data-path")
    with open(path, "rb", opener=only_regular) as file:
        if path.lower().endswith(LINES_ENDINGS):
            records = _json_lines(path, file, span)
        else:
            records = _json_list(path, file, window_bytes)
        for line, record in records:
            yield record, line, file.tell()


# ---------------------------------------------------------------------------------------------------------------- JSON


def _json_lines(path: str, file: Any, span: Span | None) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value); of a span's lines alone, before which lines are counted, and not looked at."""
    start = 0
    for number, data in enumerate(file, start=1):
        if span is not None and not span.first <= start < span.end:
            if start >= span.end:
                return
            span.skipped += not _is_blank(data, number)
            start += len(data)
            continue
        start += len(data)
        data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        try:
            text = data.decode("utf-8", _LONE_SURROGATES)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, start - len(data) + error.start) from error
        if not text.strip():
            continue
        try:
            yield number, _DECODER.decode(text)
        except json.JSONDecodeError as error:
            comma = _comma_before(text, error.pos) or (error.msg == "Extra data" and text[error.pos] == ",")
            problem = "a comma with nothing behind it: remove it" if comma else error.msg
            raise ValueError(
                f"{path}: broken JSON in line {number}, column {error.colno} ({problem}); expected one "
                "object a line, repair or remove the line"
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
            raise ValueError(f"{path}: unreadable JSON in line {number} ({error}); repair or remove the line") from None


def _is_blank(data: bytes, number: int) -> bool:
    """Whether a line holds no record; one that is no UTF-8 does, for whoever reads it to refuse."""
    if data[:1] == b"{":
        return False
    data = data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
    try:
        return not data.decode("utf-8", _LONE_SURROGATES).strip()
    except UnicodeDecodeError:
        return False


def _not_utf8(path: str, byte: int) -> ValueError:
    return ValueError(f"{path}: not UTF-8 (byte {byte}); expected JSON in UTF-8, convert the file")


_BLANKS = re.compile(r"[ \t\r\n]*")


def _comma_before(text: str, position: int) -> int | None:
    """Where the comma stands that a bracket at `position` follows, or that stands at it before a bracket.

    Python 3.13 places the fault on the comma, earlier ones on the bracket. None: there is none.
    """
    if text[position : position + 1] == ",":
        behind = _BLANKS.match(text, position + 1).end()
        return position if text[behind : behind + 1] in ("}", "]") else None
    before = len(text[:position].rstrip(" \t\r\n")) - 1
    return before if text[position : position + 1] in ("}", "]") and text[before : before + 1] == "," else None


class _Window:
    """A moving piece of a text file, and where in the file it stands."""

    def __init__(self, path: str, file: Any, window_bytes: int) -> None:
        self._path, self._file, self._bytes = path, file, window_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(_LONE_SURROGATES)
        self.text = ""
        self.at = 0
        """Where reading goes on."""
        self.ended = False
        """Whether the window reaches the end of the file."""
        self._line, self._line_start, self._counted = 1, 0, 0  # of the text before `_counted`; start may be negative

    def more(self) -> None:
        """Drops what was read and appends the next piece: as much again as is left, so that retries stay linear."""
        self.line_of(self.at)
        self.text, dropped = self.text[self.at :], self.at
        self.at, self._counted, self._line_start = 0, self._counted - dropped, self._line_start - dropped
        data = self._file.read(max(self._bytes, len(self.text)))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, self._file.tell() - len(data) - pending + error.start) from error
        self.ended = not data

    def line_of(self, position: int) -> int:
        """Line of `position`, which must not lie before the last one asked for."""
        newlines = self.text.count("\n", self._counted, position)
        if newlines:
            self._line += newlines
            self._line_start = self.text.rfind("\n", self._counted, position) + 1
        self._counted = position
        return self._line

    def next_character(self) -> str:
        """The next one that is no blank, `at` on it; empty at the end of the file."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def broken(self, problem: str, position: int, comma_line: int | None = None) -> ValueError:
        """The fault at `position`, and what to do: the file is cut off only where nothing stands there any more.

        `comma_line`: of a comma before `position` that nothing follows; looked for where it is not given.
        """
        comma = _comma_before(self.text, position)
        if comma_line is None and comma is not None and comma >= self._counted:
            comma_line = self.line_of(comma)
        line = self.line_of(position)
        advice = "repair the file there"
        if comma_line is not None:
            problem, advice = f"a comma in line {comma_line} with nothing behind it", "remove the comma"
        elif problem.startswith("Unterminated string") or self.text[position:].isspace() or position >= len(self.text):
            advice = "is the file cut off? Download or write it again"
        return ValueError(
            f"{self._path}: broken JSON in line {line}, column {position - self._line_start + 1} ({problem}); {advice}"
        )


def _json_list(path: str, file: Any, window_bytes: int) -> Iterator[tuple[int, Any]]:
    """Yields (line number, item) of a JSON list, or of the list that an object holds under one of `LIST_KEYS`."""
    window = _Window(path, file, window_bytes)
    first = window.next_character()
    if first == "{":
        yield from _list_in_object(path, window)
    elif first == "[":
        yield from _items(window)
    elif first:
        begin = window.text[window.at : window.at + 20]
        raise ValueError(f"{path}: not JSON (starts with {begin!r}); expected a list of records")
    else:
        raise ValueError(f"{path}: found an empty file, expected a list of records; is it cut off? Write it again")
    if window.next_character():
        raise window.broken("text behind the list", window.at)


def _items(window: "_Window") -> Iterator[tuple[int, Any]]:
    """The items of the list that begins at the window's position, which then stands behind it."""
    window.at += 1
    is_first = True
    while (character := window.next_character()) != "]":
        if not is_first:
            if character != ",":
                raise window.broken("expected ',' or ']' behind a record", window.at)
            line = window.line_of(window.at)
            window.at += 1
            if window.next_character() == "]":
                raise window.broken("", window.at, comma_line=line)
        is_first = False
        yield _decode(window)
    window.at += 1


def _list_in_object(path: str, window: "_Window") -> Iterator[tuple[int, Any]]:
    """The records of `{"info": ..., "data": [records]}`; other keys hold no records and are left out."""
    keys: list[str] = []
    found: str | None = None
    window.at += 1
    while (character := window.next_character()) != "}":
        if keys:
            if character != ",":
                raise window.broken("expected ',' or '}' behind a value", window.at)
            window.at += 1
            window.next_character()
        _, key = _decode(window)
        if not isinstance(key, str) or window.next_character() != ":":
            raise window.broken("expected a key and ':'", window.at)
        keys.append(key)
        window.at += 1
        if window.next_character() != "[" or key not in LIST_KEYS:
            _decode(window)
        elif found is not None:
            raise ValueError(f"{path}: found a list under {found!r} and under {key!r}, expected one; keep one of them")
        else:
            found = key
            yield from _items(window)
    window.at += 1
    if found is None:
        if window.next_character() == "{":
            raise ValueError(
                f"{path}: found one JSON object behind another, expected a list of records; JSON lines need a name "
                f"that ends in {' or '.join(LINES_ENDINGS)}: rename the file"
            )
        raise ValueError(
            f"{path}: found one JSON object with the keys {', '.join(map(repr, keys)) or 'none'}, expected a list of "
            f"records, or one under {', '.join(map(repr, LIST_KEYS))}; JSON lines need a name that ends in "
            f"{' or '.join(LINES_ENDINGS)}"
        )


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key stands more than once; the last is taken, as `json` takes it."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = RepeatedKeys(found)
    found.repeated = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_decode_value = _DECODER.raw_decode
LONGEST_TOKEN = 16
"""Characters that the decoder may stop before the end of a text that is cut inside an escape or a literal."""


def _decode(window: _Window) -> tuple[int, Any]:
    """(line number, value) of the value that begins at the window's position, which then stands behind it."""
    while True:
        try:
            value, end = _decode_value(window.text, window.at)
            cut = end == len(window.text)  # a number may go on
        except json.JSONDecodeError as error:
            cut = error.pos >= len(window.text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
            if window.ended or not cut:
                raise window.broken(error.msg, error.pos) from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
            raise window.broken(str(error), window.at) from None
        if cut and not window.ended:
            window.more()
            continue
        line = window.line_of(window.at)
        window.at = end
        return line, value


# -------------------------------------------------------------------------------------------------------------- records


def text_or_first_answer(text: Any, turns: Iterable[tuple[Any, Any]]) -> str | None:
    """The cleaned `text`, or where that is None the first answer among the (from, value); None if it is no caption."""
    if text is None:
        text = next((value for role, value in turns if role == "gpt"), None)
    return (clean_caption(text) or None) if isinstance(text, str) else None


def name_of(record: dict[str, Any], index: int) -> str:
    """The decoded record's own `id` (RLAIF-V's `idx`); its first image's name or its index in the file if it has none.

    pandas makes 12 a 12.0 where another record has no id; the name is 12 all the same.
    """
    name, is_pair = value_of(record, "id"), is_preference(record)
    if name is None and is_pair and isinstance(record.get("idx"), str | int | float):
        name = value_of(record, "idx")
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    if name is not None:
        return str(name)
    return first_image(record, PREFERENCE_IMAGE_KEYS if is_pair else IMAGE_KEYS) or f"record {index}"


def parse_record(record: Any, path: str, index: int, line: int, findings: Findings) -> Record:
    """Checks the types of one decoded record. Raises ValueError that names file, record, line and key."""

    def wrong(key: str, found: Any, expected: str) -> ValueError:
        return ValueError(
            f"{where}: key {key!r} is {describe(found)}; expected {expected}: correct the record or remove it"
        )

    where = f"{path}, record {index} (line {line})"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {describe(record)}; expected an object with id, image, conversations")

    name = value_of(record, "id")
    if name is not None and not isinstance(name, str | int | float):
        raise wrong("id", name, "a string or a number")
    name = name_of(record, index)
    rejected = None
    if is_preference(record):
        preference = read_preference(record, where, wrong, name, findings)
        images, turns, rejected = preference.images, preference.turns, preference.rejected
        messages = messages_in(record)
    else:
        images = read_images(record, IMAGE_KEYS, wrong, name, findings)
        turns = turns_of(record, where, wrong)
        messages = record[key_of_turns(record)]
        if messages is not record.get("messages") and value_of(record, "messages") is not None:
            findings.count("key 'messages' is not read: 'conversations' is", name)
    captions = read_captions(record, len(images), wrong, name, findings)
    _count_oddities(record, messages, name, findings)
    find_unseen(record, name, images, turns, findings)
    with_caption = captions.pairs if len(images) > 1 else captions.text or record.get(HALLUCINATED_KEY)
    find_untrained(name, turns, findings, has_pair=bool(images and with_caption))
    if rejected:
        findings.count(IGNORED_REJECTED, name, "rejected answers")
    return Record(
        name,
        images,
        turns,
        captions.text,
        any(key in record and not is_gap(record[key]) for key in CAPTION_KEYS),
        captions.hallucinated,
        rejected,
        captions.pairs,
    )


_READ_KEYS = ("id", "text", *CAPTION_KEYS, *ANSWER_KEYS)


def _count_oddities(record: dict[str, Any], turns: Iterable[Any], name: str, findings: Findings) -> None:
    """Keys that stand twice, in the record or a turn, and those that are NaN: read in one of several ways."""
    objects = [record, *turns]
    for key in sorted({key for found in objects if isinstance(found, RepeatedKeys) for key in found.repeated}):
        findings.count(f"key {key[:40]!r} stands there more than once: the last one is read", name)
    for key in _READ_KEYS:
        if is_gap(record.get(key)):
            findings.count(f"key {key!r} is NaN: read as if it were not there", name)
