"""A tensor as `torch.save` stores it, taken apart: where its values stand, and the bytes before and behind them.

A distributed checkpoint is a row of such records, each a zip archive with the values uncompressed. Writing and reading
the values in place spares the copies of torch.save and torch.load, and a CRC-32 that torch.load never looks at.
"""

import io
import os
import struct
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import torch


@dataclass(frozen=True)
class Frame:
    """What `torch.save` writes around a contiguous tensor's values."""

    before: bytes
    after: bytes


@dataclass(frozen=True)
class Values:
    """Where a record holds the values of its tensor, which are contiguous there."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    """Bytes from the record's beginning."""


class Record(io.RawIOBase):
    """Part of an open file, as a file of its own; reads leave the file's position alone."""

    def __init__(self, file: int, offset: int, length: int):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._file, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


@cache
def frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> Frame:
    """The frame of every contiguous host tensor of these sizes. Its CRC-32 is that of zeros, which nobody checks.

    (`torch.serialization.set_crc32_options(False)` leaves it out too, and documents that torch.load reads the result.)
    """
    stream = io.BytesIO()
    torch.save(torch.zeros(sizes, dtype=dtype), stream)
    found = find_values(stream)
    assert found is not None and (found.dtype, found.shape) == (dtype, sizes), f"{dtype} {sizes}: {found}"
    content, end = stream.getbuffer(), found.offset + found.shape.numel() * dtype.itemsize
    return Frame(bytes(content[: found.offset]), bytes(content[end:]))


def find_values(record: BinaryIO) -> Values | None:
    """Where the values stand; None for a record that is no one contiguous tensor as torch.save writes it.

    The pickle in it is read by torch's safe unpickler, once for all records that have the same.
    """
    try:
        entries = {entry.filename.partition("/")[2]: entry for entry in zipfile.ZipFile(record).infolist()}
        storages = [name for name in entries if name.startswith("data/")]
        if storages != ["data/0"] or _content(record, entries["byteorder"]) != sys.byteorder.encode():
            return None
        tensor = _load_meta(record, _content(record, entries["data.pkl"]))
        if not isinstance(tensor, torch.Tensor):
            return None
        stored = entries["data/0"]
        whole = tensor.is_contiguous() and tensor.storage_offset() == 0 and tensor.nbytes == stored.file_size
        if not whole or stored.compress_type != zipfile.ZIP_STORED:
            return None
        return Values(tensor.dtype, tensor.shape, _offset(record, stored))
    except (zipfile.BadZipFile, KeyError, struct.error):
        return None


_loaded: dict[bytes, Any] = {}


def _load_meta(record: BinaryIO, pickled: bytes) -> Any:
    """What the record holds, a tensor without its values."""
    if pickled not in _loaded:
        record.seek(0)
        _loaded[pickled] = torch.load(record, map_location="meta", weights_only=True)
    return _loaded[pickled]


def _offset(record: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's content begins: behind its local header, whose length stands in itself."""
    record.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", record.read(4))
    return entry.header_offset + 30 + name + extra


def _content(record: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    record.seek(_offset(record, entry))
    return record.read(entry.file_size)
