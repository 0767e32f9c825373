"""`.metadata` of a distributed checkpoint: which chunks a tensor has, and where they are.

The file is a pickle of torch.distributed.checkpoint's dataclasses (`part_files` writes it). It is read into records of
our own, and nothing that it names is looked up (`stored.pickles`); whatever it says is held against the files.
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hacl_megatron.checkpoint.hf.json_files import one_line
from hacl_megatron.checkpoint.run.integrity import LARGEST, check_content, may_be_file_of_checkpoint, read_whole
from hacl_megatron.checkpoint.run.stored.pickles import ERRORS, Maker, Names, Record, Unpickler, maker_of, shown

INDEX_FILE = ".metadata"
_AROUND_VALUES = 1 << 20
"""Bytes that a record may have beside its values; `torch.save` takes some 1,500."""


@dataclass(frozen=True)
class StoredChunk:
    """A part of a tensor, or an object (of no offsets and sizes), and the record of it, which `torch.save` wrote."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    """Bytes from the file's beginning to the record's."""
    length: int
    """Bytes of the record."""


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    chunks: list[StoredChunk]

    @property
    def size(self) -> tuple[int, ...]:
        """Of the whole tensor, which the chunks cover."""
        ends = [[a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in self.chunks]
        return tuple(map(max, zip(*ends, strict=True)))


@dataclass(frozen=True)
class StoredIndex:
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: dict[str, StoredChunk] = field(default_factory=dict)


def read_index(folder: Path) -> StoredIndex:
    """What is in a checkpoint folder, by the names of tensors and objects.

    Raises:
        ValueError: the file is missing, cut, names something else than torch's records, or is of another kind; or it
            tells of a file that is no checkpoint's, or of a part that does not fit into its record.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} is no whole distributed checkpoint")
    try:
        content = read_whole(path)
        metadata = Unpickler(content, _NAMES).load()
    except ERRORS as error:
        if isinstance(error, pickle.UnpicklingError) and "it " in str(error):
            raise ValueError(
                f"{path}: this pickle holds more than torch's checkpoint records ({one_line(error)}), and its code is "
                "never run"
            ) from None
        raise ValueError(f"{path}: not a whole file ({one_line(error)}); the checkpoint is damaged") from None
    check_content(folder, INDEX_FILE, content)
    if not isinstance(metadata, Record) or metadata.name != "Metadata" or not metadata.get("storage_data"):
        found = metadata.name if isinstance(metadata, Record) else type(metadata).__name__
        raise ValueError(f"{path}: found a {found}, expected the records of a distributed checkpoint")
    try:
        return _index(metadata)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its records are not as torch writes them ({one_line(error) or type(error).__name__}); the "
            "checkpoint is damaged"
        ) from None


def _index(metadata: Record) -> StoredIndex:
    found = StoredIndex()
    places: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for index, info in metadata.get("storage_data").items():
        offset = index.get("offset")
        places[_text(index.get("fqn")), None if offset is None else _sizes(offset)] = info
    for key, entry in metadata.get("state_dict_metadata").items():
        if entry.name == "BytesStorageMetadata":
            if (_text(key), None) in places:  # torch's writers leave out what they have not written
                stored = _chunk((), (), places[key, None])
                if stored.length > LARGEST:
                    raise ValueError(f"{key} of {stored.length} bytes")
                found.objects[key] = stored
            continue
        dtype = entry.get("properties").state[0]  # of the tuple that torch's __getstate__ makes
        if entry.name != "TensorStorageMetadata" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} is a {entry.name}")
        chunks = []
        for chunk in entry.get("chunks"):
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            stored = _chunk(offsets, sizes, places[_text(key), offsets])
            num_bytes = torch.Size(sizes).numel() * dtype.itemsize
            if not num_bytes <= stored.length <= num_bytes + _AROUND_VALUES or len(offsets) != len(sizes):
                raise ValueError(f"a part of {key} of sizes {list(sizes)} in {stored.length} bytes")
            chunks.append(stored)
        if not chunks or len({len(chunk.sizes) for chunk in chunks}) > 1:
            raise ValueError(f"{key} has no parts, or of several numbers of dims")
        found.tensors[key] = StoredTensor(dtype, chunks)
    return found


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], info: Record) -> StoredChunk:
    file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not may_be_file_of_checkpoint(_text(file)):
        raise ValueError(f"it names the file {file!r}")
    if info.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or otherwise changed")
    return StoredChunk(offsets, sizes, file, *_sizes((offset, length)))


def _sizes(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(type(n) is int and 0 <= n < 2**50 for n in numbers) or len(numbers) > 64:
        raise ValueError(f"found {shown(numbers)}, expected sizes")
    return numbers


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"found a {type(value).__name__}, expected a name")
    return value


_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_NAMES: Names = {
    ("torch", "Size"): Maker(lambda numbers=(): _sizes(tuple(numbers))),
    ("torch", "strided"): "strided",
    **{
        (module, name): maker_of(name)
        for module, names in {
            _METADATA: (
                "Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex", "BytesStorageMetadata",
                "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
            ),
            "torch.serialization": ("_get_layout",),
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "pathlib": ("PosixPath",),
            "pathlib._local": ("PosixPath",),
            _PLANNER: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
        }.items()
        for name in names
    },
}  # fmt: skip
"""All that a `.metadata` may name, beside torch's dtypes, and what stands for it."""
