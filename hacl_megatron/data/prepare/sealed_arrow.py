"""Arrow files that carry a checksum of themselves: nothing in them is looked at before it holds.

    ARROW1 │ schema {..., checksum: "hacl_megatron § xxh3_64 9f0c2ab47d1e6c35"} │ record batches │ footer │ ARROW1
                                      └ over all bytes of the file but these 16 digits ┘

Arrow's own reader follows offsets that the file names: one damaged byte may lead it to another record, or out of the
file and the process with it. Any Arrow reader opens the file; the checksum is one more key of its schema's metadata.
"""

import mmap
import os
from collections.abc import Iterable
from typing import BinaryIO

import pyarrow as pa

from hacl_megatron.config.files.checksum import BLOCK_BYTES, Checksum
from hacl_megatron.config.files.regular import only_regular

_KEY = b"checksum"
_MARK = "hacl_megatron § xxh3_64 ".encode()
"""Before the digits. Our other metadata is ASCII JSON, so that the § is met nowhere before it."""
_DIGITS = 16
_MAGIC = b"ARROW1"
_SCHEMA_AT = 16
"""Bytes before the schema: magic, padding, a mark, and the schema's length in the last four."""
_MOST_SCHEMA_BYTES = 256 << 20
"""More than the names of all shards and all findings take."""


def write_sealed(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches, each of the schema `schema`, as one file that is there whole or not at all."""
    temporary = f"{path}.tmp-{os.getpid()}"
    schema = schema.with_metadata({**(schema.metadata or {}), _KEY: _MARK + b"0" * _DIGITS})
    try:
        with pa.OSFile(temporary, "wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            sink.flush()
        with open(temporary, "rb+") as file:
            seal(file)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def seal(file: BinaryIO) -> None:
    """Writes the checksum of a file, open to be read and written, into it."""
    place, _, value = _measure(file)
    file.seek(place)
    file.write(b"%016x" % value)
    file.flush()


def open_sealed(path: str) -> pa.ipc.RecordBatchFileReader:
    """A file of `write_sealed`, checked and then mapped into memory.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is not what was written; one line without the file's name.
    """
    with open(path, "rb", opener=only_regular) as file:
        return read_sealed(file)


def read_sealed(file: BinaryIO) -> pa.ipc.RecordBatchFileReader:
    """`open_sealed` of a file that is open, which may be closed afterwards."""
    _, found, value = _measure(file)
    if found != b"%016x" % value:
        raise ValueError("is damaged: its checksum is not the one that it was written with")
    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    try:
        return pa.ipc.open_file(pa.py_buffer(memory))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"is no Arrow file ({(str(error).splitlines() or [''])[0][:100]})") from None


def _measure(file: BinaryIO) -> tuple[int, bytes, int]:
    """Where the checksum stands, as what digits, and the checksum of all other bytes. ValueError where there is none.

    The bytes are read: in a mapping a disk's fault would end the process.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - len(_MAGIC)))
    last = file.read(len(_MAGIC))
    file.seek(0)
    head = file.read(_SCHEMA_AT)
    if not head.startswith(_MAGIC) or last != _MAGIC:
        raise ValueError("is not a whole Arrow file")
    head += file.read(min(int.from_bytes(head[-4:], "little"), _MOST_SCHEMA_BYTES))
    place = head.find(_MARK) + len(_MARK)
    if place < len(_MARK) or len(head) < place + _DIGITS:
        raise ValueError("has no checksum: of an earlier version, damaged, or no manifest of tools/prepare_data.py")
    digest = Checksum()
    digest.update(head[:place])
    digest.update(head[place + _DIGITS :])
    block = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(block):  # type: ignore[attr-defined]  # files have it
        digest.update(block[:count])
    return place, head[place : place + _DIGITS], digest.value
