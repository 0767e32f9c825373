"""Reads the parts of a checkpoint, tensor by tensor and object by object; every reader of `.distcp` files is this one.

    index (`index`) ─ record of a file ─ its checksum ─ `pickles.load_archive` ─ held against the index

A record is read once, into memory, and what was compared with its checksum is what is used.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.json_files import one_line
from hacl_megatron.checkpoint.run.integrity import FILES_FILE, record_checksums
from hacl_megatron.checkpoint.run.retain import saved_iterations
from hacl_megatron.checkpoint.run.stored.index import StoredChunk, StoredIndex, read_index
from hacl_megatron.checkpoint.run.stored.pickles import ERRORS, load_archive
from hacl_megatron.config.files.checksum import Checksum

_BLOCK = 4 << 20
"""Bytes that are read and summed at once: they stay in the processor's cache between the two."""


class StoredParts:
    """What one checkpoint folder (`iter_*`) holds. Threads may share it: every read opens its file and holds nothing.

    Raises:
        ValueError: the index or the list of checksums is not as it was written; see `read_index`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index: StoredIndex = read_index(folder)
        self._checksums = record_checksums(folder)

    @property
    def has_checksums(self) -> bool:
        return self._checksums is not None

    def values(self, key: str, chunk: StoredChunk) -> Tensor:
        """Values of one chunk of the tensor `key`, in the dtype and the sizes that the index states.

        Raises:
            ValueError: it is not as it was written; names the file.
        """
        found, dtype = self._load(chunk, key), self.index.tensors[key].dtype
        if not isinstance(found, Tensor) or (found.dtype, tuple(found.shape)) != (dtype, chunk.sizes):
            what = f"a {type(found).__name__}"
            if isinstance(found, Tensor):
                what = f"{list(found.shape)} of {found.dtype}"
            raise self._damaged(chunk, f"{key} is {what}, {list(chunk.sizes)} of {dtype} by the index")
        return found

    def object(self, key: str) -> Any:
        """An object that megatron-core calls sharded; ValueError: it is not there, or not as it was written."""
        if key not in self.index.objects:
            raise ValueError(f"{self.folder}: {key} is missing; it belongs to another model")
        chunk = self.index.objects[key]
        found = self._load(chunk, key)
        if type(found) is not list or len(found) != 1:  # as megatron-core stores it
            raise self._damaged(chunk, f"{key} is a {type(found).__name__}, expected a list of one")
        return found[0]

    def _load(self, chunk: StoredChunk, key: str) -> Any:
        try:
            content, found = self._read(chunk)
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(chunk, f"{key} cannot be read: {one_line(error)}") from None
        if self._checksums is not None:
            expected = self._checksums.get(chunk.file, {}).get(chunk.offset)
            if expected is None:
                raise self._damaged(chunk, f"{FILES_FILE} has no checksum of {key} at byte {chunk.offset}")
            if found != expected:
                end = chunk.offset + chunk.length
                raise self._damaged(
                    chunk,
                    f"{key}, bytes {chunk.offset} to {end}, has checksum {found}, but {expected} was written",
                )
        try:
            return load_archive(content)
        except ERRORS as error:
            raise self._damaged(chunk, f"{key} is no record of plain values and tensors: {one_line(error)}") from None

    def _read(self, chunk: StoredChunk) -> tuple[memoryview, str]:
        path = self.folder / chunk.file
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        checksum = Checksum()
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if chunk.offset + chunk.length > size:  # before there is room made for it
                raise EOFError(f"it has {size} bytes of at least {chunk.offset + chunk.length}")
            content = memoryview(torch.empty(chunk.length, dtype=torch.uint8).numpy())
            done = 0
            while done < chunk.length:
                block = content[done : done + _BLOCK]
                count = os.preadv(file.fileno(), [block], chunk.offset + done)
                if not count:
                    raise EOFError(f"it ends at byte {chunk.offset + done}")
                if self._checksums is not None:
                    checksum.update(block[:count])
                done += count
        return content, checksum.hexdigest()

    def _damaged(self, chunk: StoredChunk, what: str) -> ValueError:
        return ValueError(
            f"{os.path.normpath(self.folder / chunk.file)}: {what}; the checkpoint is damaged, {self._instead}"
        )

    @cached_property
    def _instead(self) -> str:
        older = [
            self.folder.parent / f"iter_{iteration:07d}"
            for iteration in saved_iterations(self.folder.parent)
            if f"iter_{iteration:07d}" < self.folder.name
        ]
        return f"give the one before, {older[-1]}" if older else "take a copy of it or another iter_* folder"
