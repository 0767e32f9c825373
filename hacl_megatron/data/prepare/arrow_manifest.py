"""The prepared form of LLaVA JSON: one Arrow file that every rank maps into memory and none reads whole.

    records ─build_batch→ record batches ─merge→ manifest.arrow ─memory map→ ArrowManifest.record(17)

The columns say nothing about the conversation template: `plain` and `v1` read the same file. What Arrow's UTF-8 cannot
hold (a lone surrogate, a turn that is no string) travels as JSON in the column `exact`, so that such a record is that
sample's fault and not the file's. Any Arrow reader opens the file (pyarrow, pandas, DuckDB, Polars, `datasets`); ours
only where its checksum holds.
"""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hacl_megatron.config.files.objects import NoSuchObject, StoreError, names_in, object_state
from hacl_megatron.config.files.regular import NotRegular, only_regular
from hacl_megatron.config.files.urls import below, is_url
from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.llava_json import Record
from hacl_megatron.data.prepare.records.captions import Pair
from hacl_megatron.data.prepare.sealed_arrow import read_sealed
from hacl_megatron.data.store import StoredImage

FORMAT = 4
"""Raised when columns change; files of `ADDED` formats are read as well."""
ADDED = {2: ("rejected_answers", "more_images", "pairs"), 3: ("more_images", "pairs")}
"""Columns that manifests of earlier formats lack; null in all their records."""
SHARDS_FOLDER = "shards"
"""Folder beside the manifest that holds its tar shards."""
SHARD_NAME = re.compile(r"images-\d{6}\.tar")
"""The only names that a manifest may give a shard: they cannot leave the folder."""

KEPT_BATCHES = 1024
"""Record batches, of some 4,096 records each, whose Arrow objects a manifest keeps: 30 MB at most."""
_METADATA_KEY = b"hacl_megatron"
FINDINGS = "findings"
"""Key of the metadata: `Findings.as_json` of each file; files prepared by earlier versions have none."""
_TURNS = pa.list_(pa.struct([pa.field("from", pa.string()), pa.field("value", pa.string())]))
_OF_AN_IMAGE = [
    pa.field("image", pa.string()),  # null: a text-only sample
    pa.field("width", pa.int32()),  # pixels; null: not known
    pa.field("height", pa.int32()),
    pa.field("image_fault", pa.string()),  # why the image is unusable, where images were checked
    pa.field("shard", pa.int32()),  # index in the metadata's `shards`; null: the image is in the folder
    pa.field("offset", pa.int64()),  # of the image's first byte in the shard
    pa.field("size", pa.int64()),  # bytes
    pa.field("checksum", pa.uint64()),  # of these bytes
]
"""A column each for a record's first image; the others' are in one column, of lists."""
_PAIR = [
    pa.field("image", pa.int32()), pa.field("caption", pa.string()), pa.field("hallucinated", pa.list_(pa.string()))
]  # fmt: skip
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        _OF_AN_IMAGE[0],
        pa.field("conversations", _TURNS, nullable=False),
        pa.field("text", pa.string()),  # the key `text`, the released files' caption
        pa.field("first_answer_is_caption", pa.bool_(), nullable=False),
        pa.field("hallucinated_captions", pa.list_(pa.string()), nullable=False),
        pa.field("rejected_answers", pa.list_(pa.string())),  # in the last turn's place; null: no preference record
        pa.field("exact", pa.string()),  # the record as JSON where the columns above cannot hold it
        pa.field("file", pa.int32(), nullable=False),  # index in the metadata's `files`
        pa.field("content", pa.uint64(), nullable=False),  # hash of all that training sees of the record
        pa.field("num_words", pa.int32(), nullable=False),  # of the dialogue, as LLaVA's modality_lengths counts
        pa.field("dialogue_tokens", pa.int32()),  # with BOS, each image as one; null: not counted, or unusable
        pa.field("caption_tokens", pa.int32()),  # with BOS and EOS; of all captions, with several images
        pa.field("hallucinated_tokens", pa.int32()),  # of all hallucinated captions, each with BOS and EOS
        *_OF_AN_IMAGE[1:],
        pa.field("more_images", pa.list_(pa.struct(_OF_AN_IMAGE))),  # behind the first; null: there are none
        pa.field("pairs", pa.list_(pa.struct(_PAIR))),  # of several images; null: no captions are listed
    ]
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record on its way into the manifest."""

    record: Record
    file: int
    """Index of the JSON file."""
    content: int
    """Hash of what training sees of the record: all but its name. Unsigned, 64 bits."""
    num_bytes: int
    """Roughly, of its text."""
    fits: bool
    """Whether Arrow's columns can hold it."""


@dataclass(kw_only=True)
class Measures:
    """What is found out about the samples of one batch beyond their JSON; None where it was not asked for."""

    tokens: Sequence[tuple[int | None, int | None, int | None]] | None = None
    """Dialogue, caption and hallucinated tokens of each sample."""
    images: Sequence[Sequence[tuple[int | None, int | None, str | None]]] | None = None
    """Width, height and fault of each sample's images."""
    untrained: Sequence[str | None] | None = None
    """Why each sample will train nothing; no column, for it depends on the run's settings."""


def make_entry(record: Record, file: int, name: str | None = None) -> Entry:
    """Hashes a record; `name` takes the place of its own."""
    seen = [_first(record), record.turns, record.text, record.first_answer_is_caption, record.hallucinated]
    if len(record.images) > 1:
        seen += [record.rejected, record.images, record.pairs]
    elif record.rejected is not None:  # others' hashes are as they were before there were such records
        seen.append(record.rejected)
    text = json.dumps(seen, ensure_ascii=False, separators=(",", ":"))
    try:
        data, fits = text.encode(), True
        record.name.encode()
        fits = all(type(role) is str and type(value) is str for role, value in record.turns)
    except UnicodeEncodeError:
        data, fits = text.encode("utf-8", "surrogatepass"), False
    content = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    if name is not None:
        record = Record(name, *astuple_but_name(record))
    return Entry(record, file, content, len(data), fits)


def astuple_but_name(record: Record) -> tuple[Any, ...]:
    """The fields of a record behind its name, in order."""
    return (
        record.images, record.turns, record.text, record.first_answer_is_caption, record.hallucinated, record.rejected,
        record.pairs,
    )  # fmt: skip


def build_batch(entries: Sequence[Entry], measures: Measures) -> pa.RecordBatch:
    """The manifest's rows of some records."""
    records = [entry.record if entry.fits else _without_text(entry.record) for entry in entries]
    turns = [turn for record in records for turn in record.turns]
    hallucinated = [caption for record in records for caption in record.hallucinated]
    nothing = (None, None, None)
    dialogue, caption, wrong_captions = zip(*(measures.tokens or [nothing] * len(entries)), strict=True)
    images = measures.images or [[nothing] * len(record.images) for record in records]
    width, height, fault = zip(*(found[0] if found else nothing for found in images), strict=True)
    count = len(entries)
    columns = [
        [record.name for record in records],
        [_first(record) for record in records],
        pa.ListArray.from_arrays(
            _offsets([len(record.turns) for record in records]),
            pa.StructArray.from_arrays(
                [
                    pa.array([role for role, _ in turns], pa.string()),
                    pa.array([text for _, text in turns], pa.string()),
                ],
                fields=list(_TURNS.value_type),
            ),
        ),
        [record.text for record in records],
        [record.first_answer_is_caption for record in records],
        pa.ListArray.from_arrays(
            _offsets([len(record.hallucinated) for record in records]), pa.array(hallucinated, pa.string())
        ),
        [None if record.rejected is None else list(record.rejected) for record in records],
        [None if entry.fits else json.dumps(_exact(entry.record)) for entry in entries],
        [entry.file for entry in entries],
        [entry.content for entry in entries],
        [num_words(entry.record) for entry in entries],
        *(dialogue, caption, wrong_captions, width, height, fault),
        *([None] * count for _ in ("shard", "offset", "size", "checksum")),
        [
            _more_images(record, found) if len(found) > 1 else None
            for record, found in zip(records, images, strict=True)
        ],
        [[pair._asdict() for pair in record.pairs] if record.pairs else None for record in records],
    ]
    return pa.record_batch(
        [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, SCHEMA, strict=True)
        ],
        schema=SCHEMA,
    )


def num_words(record: Record) -> int:
    """Words of the dialogue between blanks: LLaVA's `modality_lengths` (llava/train/train.py), without its sign."""
    return sum(len(value.split()) for _, value in record.turns if isinstance(value, str))


def _without_text(record: Record) -> Record:
    """What the columns show of a record that they cannot hold."""

    def replaced(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    images = tuple(map(replaced, record.images))
    rejected = None if record.rejected is None else tuple(map(replaced, record.rejected))
    return Record(replaced(record.name), images, (), None, record.first_answer_is_caption, (), rejected)


def _more_images(record: Record, found: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """What is known of a record's images but the first; where each lies is still open."""
    some = zip(record.images[1:], found[1:], strict=True)
    return [
        {"image": name, "width": width, "height": height, "image_fault": fault} for name, (width, height, fault) in some
    ]


def _first(record: Record) -> str | None:
    """The name of a record's first image; None without any."""
    return record.images[0] if record.images else None


def _exact(record: Record) -> list[Any]:
    return [
        record.name, _first(record), record.turns, record.text, record.first_answer_is_caption, record.hallucinated,
        record.rejected, record.images[1:], record.pairs,
    ]  # fmt: skip


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


def images_of(batch: Mapping[str, pa.Array] | pa.RecordBatch, name: str) -> tuple[pa.Array, np.ndarray]:
    """What the column `name` says of every image of a record batch, and the row of each (int64), in the rows' order."""
    rows = np.flatnonzero(batch["image"].is_valid().to_numpy(zero_copy_only=False))
    values, more = batch[name].take(pa.array(rows)), batch["more_images"]
    if more.null_count == len(more):
        return values, rows
    rows = np.concatenate([rows, pc.list_parent_indices(more).to_numpy().astype(np.int64)])
    values = pa.concat_arrays([values, pc.struct_field(more.flatten(), name)])
    order = np.argsort(rows, kind="stable")
    return values.take(pa.array(order)), rows[order]


def with_metadata(metadata: dict[str, Any]) -> pa.Schema:
    """The manifest's schema with what holds for the whole file: files, version, shards, ..."""
    return SCHEMA.with_metadata({_METADATA_KEY: json.dumps({"format": FORMAT, **metadata})})


class ArrowManifest:
    """A prepared file, checked against its checksum and mapped into memory. Threads may share it.

    Args:
        file: the open file at `path`, where the caller has looked at it; of a URL, its copy.

    Raises ValueError when the file is missing, no manifest, damaged, or of another format.
    """

    def __init__(self, path: str, file: BinaryIO | None = None) -> None:
        self.path = path
        try:
            with file or open(path, "rb", opener=only_regular) as opened:
                reader = read_sealed(opened)
            lengths = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; expected a manifest of tools/prepare_data.py") from None
        except NotRegular as error:
            raise ValueError(f"{path}: {error.strerror}; expected a manifest of tools/prepare_data.py") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); expected a manifest") from None
        except (pa.ArrowException, ValueError) as error:
            raise self._refused((str(error).splitlines() or [""])[0][:100]) from None
        try:
            self.metadata: dict[str, Any] = json.loads((reader.schema.metadata or {})[_METADATA_KEY])
            found = self.metadata["format"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path}: an Arrow file, but no manifest of tools/prepare_data.py") from None
        added = ADDED.get(found, ()) if isinstance(found, int) else ()
        schema = pa.schema([field for field in SCHEMA if field.name not in added])
        if found not in (FORMAT, *ADDED) or not reader.schema.equals(schema):
            raise ValueError(
                f"{path}: a manifest of format {found}, expected {FORMAT}; prepare the data again with "
                "tools/prepare_data.py"
            )
        self._reader, self._added, self._lock = reader, added, threading.RLock()
        self._recent: OrderedDict[int, dict[str, pa.Array]] = OrderedDict()
        self._valid: set[int] = set()  # record batches
        self._starts = np.cumsum([0, *lengths])
        try:
            self.files: tuple[str, ...] = tuple(map(str, self.metadata["files"]))
            """The JSON files that the samples came from."""
            found = self.metadata.get(FINDINGS, [{}] * len(self.files))
            self.findings: tuple[Findings, ...] = tuple(map(Findings, found))
            """What is to be said about each of the files."""
            self._shards = self._find_shards()
            for number in range(len(lengths)):
                columns = self._read(number)
                self._check_indices("file", columns["file"], len(self.files))
                self._check_indices("shard", columns["shard"], len(self._shards))
        except (pa.ArrowException, LookupError, TypeError, AttributeError) as error:
            first = (str(error).splitlines() or [""])[0][:100]
            raise self._refused(f"its checksum holds, but no prepare_data.py wrote it ({first})") from None

    def _refused(self, fault: str) -> ValueError:
        return ValueError(f"{self.path}: {fault}; prepare the data again with tools/prepare_data.py")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> tuple[Record, str, tuple[StoredImage | None, ...]]:
        """A record, the JSON file it came from, and each image's place where the image is in a shard."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, columns = index - int(self._starts[number]), self._checked(number)

        def value(name: str) -> Any:
            return columns[name][row].as_py()

        # A scalar costs time even where it says that there is none.
        several = columns["more_images"].null_count < len(columns["more_images"])
        others, pairs = (value("more_images") or (), value("pairs") or ()) if several else ((), ())
        exact = value("exact")
        if exact is not None:
            try:
                name, image, turns, text, is_caption, hallucinated, *more = json.loads(exact)
                rejected, names, pairs = [*more, *[None, (), ()][len(more) :]]  # earlier formats have fewer
                turns = tuple((role, said) for role, said in turns)
                pairs = [Pair(*pair) for pair in pairs]
            except (ValueError, TypeError, RecursionError):
                raise self._none_of_ours(index) from None
        else:
            name, image, text, is_caption = (value(key) for key in ("id", "image", "text", "first_answer_is_caption"))
            turns = tuple((turn["from"], turn["value"]) for turn in value("conversations"))
            hallucinated, rejected = value("hallucinated_captions"), value("rejected_answers")
            names, pairs = [other["image"] for other in others], [Pair(**pair) for pair in pairs]
        images = () if image is None else (image, *names)
        rejected = None if rejected is None else tuple(rejected)
        record = Record(name, images, turns, text, is_caption, tuple(hallucinated), rejected)
        shard, keys = value("shard"), ("shard", "offset", "size", "checksum")
        first = None if shard is None else self._place(*map(value, keys))
        stored = (first,)[: len(images)]
        if names or others or pairs:
            stored += tuple(self._place(*map(other.get, keys)) for other in others)
            texts = [*names, *(pair.caption for pair in pairs)]
            if len(stored) != len(images) or not all(isinstance(text, str) for text in texts):
                raise self._none_of_ours(index)
            if not all(pair.image in range(len(images)) and isinstance(pair.hallucinated, list) for pair in pairs):
                raise self._none_of_ours(index)
            pairs = tuple(pair._replace(hallucinated=tuple(pair.hallucinated)) for pair in pairs)
            record = replace(record, pairs=pairs)
        return record, self.files[value("file")], stored

    def _place(self, shard: int | None, offset: int, size: int, checksum: int | None) -> StoredImage | None:
        """An image's place; None: it is in the folder."""
        if shard is None:
            return None
        if not 0 <= shard < len(self._shards):
            raise self._refused("its checksum holds, but no prepare_data.py wrote it (shards that it does not name)")
        return StoredImage(self._shards[shard], offset, size, checksum)

    def _none_of_ours(self, index: int) -> ValueError:
        return self._refused(f"record {index} is none that prepare_data.py wrote")

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, without a copy."""
        kind, numbers = SCHEMA.field(name).type, range(self._reader.num_record_batches)
        columns_of = self._read if pa.types.is_primitive(kind) else self._checked
        return pa.chunked_array([columns_of(number)[name] for number in numbers], kind)

    def of_images(self, name: str) -> tuple[pa.Array, np.ndarray]:
        """What a column says of every image, and the record of each (int64), in the records' order."""
        found = [images_of(self._checked(number), name) for number in range(self._reader.num_record_batches)]
        rows = [rows + start for (_, rows), start in zip(found, self._starts.tolist())]  # noqa: B905  # ends with it
        values = pa.chunked_array([values for values, _ in found], SCHEMA.field(name).type).combine_chunks()
        return values, np.concatenate([np.empty(0, np.int64), *rows])

    def numbers(self, name: str, missing: int = 0) -> np.ndarray:
        """A numeric column [num_samples], `missing` where it is null."""
        return self.column(name).fill_null(missing).to_numpy()

    def _checked(self, number: int) -> dict[str, pa.Array]:
        """The columns of a record batch, whose texts and lists are known to lie inside it.

        The checksum tells damage, but whoever makes a file makes its checksum too. Looked at when it is first used: for
        the whole of a large file it takes longer than its opening may.
        """
        if number not in self._valid:
            try:
                with self._lock:
                    batch = self._reader.get_batch(number)
                batch.validate(full=True)
            except pa.ArrowException as error:
                raise self._refused(f"record batch {number} is invalid ({str(error)[:100]})") from None
            self._valid.add(number)
        return self._columns(number)

    def _columns(self, number: int) -> dict[str, pa.Array]:
        """The columns of a record batch, kept where few others have been used since."""
        with self._lock:
            if (found := self._recent.get(number)) is None:
                found = self._recent[number] = self._read(number)
                if len(self._recent) > KEPT_BATCHES:
                    self._recent.popitem(last=False)
            else:
                self._recent.move_to_end(number)
        return found

    def _read(self, number: int) -> dict[str, pa.Array]:
        """The columns of a record batch, mapped, those included that its format lacks; some 29 kB of objects."""
        with self._lock:
            batch = self._reader.get_batch(number)
        batch.validate()
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        return columns | {name: pa.nulls(batch.num_rows, SCHEMA.field(name).type) for name in self._added}

    def _check_indices(self, name: str, column: pa.Array, count: int) -> None:
        """LookupError unless the numeric column `name` of a record batch counts `count` things from 0."""
        places = column.drop_null().to_numpy()
        if len(places) and not 0 <= places.min() <= places.max() < count:
            raise IndexError(f"column {name!r} does not count {count}")

    def _find_shards(self) -> list[str]:
        names = self.metadata.get("shards", [])
        remote = is_url(self.path)
        home = self.path.rpartition("/")[0] if remote else os.path.dirname(os.path.abspath(self.path))
        folder = below(home, SHARDS_FOLDER) if remote else os.path.join(home, SHARDS_FOLDER)
        for name in names:
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                raise ValueError(f"{self.path}: names {name!r} as a shard, expected images-000000.tar; is it yours?")
        there: set[str] = set()
        if names and remote:
            there = _listed(folder, names)
        elif names and os.path.isdir(folder):
            there = set(os.listdir(folder))
        missing = [name for name in names if name not in there]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of its {len(names)} shards are missing, first {missing[0]}; expected "
                f"them in {folder}: move them beside the manifest or prepare again"
            )
        return [below(folder, name) if remote else os.path.join(folder, name) for name in names]


def _listed(folder: str, names: Sequence[str]) -> set[str]:
    """The shards in the folder of a store; where it does not list them, all but the first, if that one is missing."""
    try:
        return set(names_in(folder))
    except (NoSuchObject, StoreError):  # web servers have no lists, and keys need not be allowed to list
        try:
            object_state(below(folder, names[0]), first_look=True)
        except NoSuchObject:
            return set(names[1:])
        return set(names)
