"""`.metadata` of a distributed checkpoint: which chunks a tensor has, and where they are.

The file is a pickle of torch.distributed.checkpoint's dataclasses (`run.part_files` writes it). It is read into records
of our own: a pickle can hold any code, so nothing that it names is looked up; and torch's package takes long to import.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hacl_megatron.checkpoint.hf.json_files import one_line


@dataclass(frozen=True)
class StoredChunk:
    """A part of a tensor, and the record of it, which `torch.save` wrote."""

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


def read_metadata(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors by name, and the names of whatever else is there.

    Raises:
        ValueError: the file is missing, cut, names something else than torch's records, or is of another kind.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} is no whole distributed checkpoint")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except pickle.UnpicklingError as error:
        if "it names" in str(error):
            raise ValueError(
                f"{path}: this pickle holds more than torch's checkpoint records ({one_line(error)}), and its code is "
                "never run"
            ) from None
        raise ValueError(f"{path}: not a whole file ({one_line(error)}); the checkpoint is damaged") from None
    except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole file ({one_line(error)}); the checkpoint is damaged") from None
    if not isinstance(metadata, _Metadata) or not getattr(metadata, "storage_data", None):
        raise ValueError(
            f"{path}: found a {type(metadata).__name__.lstrip('_')}, expected the records of a distributed checkpoint"
        )
    try:
        return _tensors(metadata)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its records are not as torch writes them ({one_line(error)})") from None


def _tensors(metadata: "_Metadata") -> tuple[dict[str, StoredTensor], list[str]]:
    tensors, others = {}, []
    places = {}
    for index, info in metadata.storage_data.items():
        offset = getattr(index, "offset", None)  # torch leaves attributes out that are None
        places[index.fqn, None if offset is None else tuple(offset)] = info
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, _TensorStorageMetadata):
            others.append(key)
            continue
        chunks = []
        for chunk in entry.chunks:
            info = places[key, tuple(chunk.offsets)]
            chunks.append(
                StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
            )
        tensors[key] = StoredTensor(entry.properties.dtype, chunks)
    return tensors, others


# --------------------------------------------------------------------------------------------------------- unpickling


class _Record:
    """Stands for one of torch's dataclasses: has the attributes that the pickle gives it."""

    def __init__(self, *_: Any):
        pass


class _Metadata(_Record):
    pass


class _TensorStorageMetadata(_Record):
    pass


class _TensorProperties(_Record):
    def __setstate__(self, state: tuple) -> None:
        self.dtype = state[0]  # of the tuple that torch's __getstate__ makes


_RECORDS: dict[str, dict[str, Any]] = {
    "torch": {"Size": torch.Size, "strided": torch.strided},
    "torch.serialization": {"_get_layout": _Record},
    "torch.distributed.checkpoint.metadata": {
        "Metadata": _Metadata, "TensorStorageMetadata": _TensorStorageMetadata, "TensorProperties": _TensorProperties,
        **dict.fromkeys(
            ("MetadataIndex", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            _Record,
        ),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": _Record},
    "pathlib": {"PosixPath": _Record},
    "pathlib._local": {"PosixPath": _Record},
    "torch.distributed.checkpoint.planner": dict.fromkeys(
        ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"), _Record
    ),
}  # fmt: skip
"""All that a `.metadata` may name, beside torch's dtypes, and what is built for it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _RECORDS[module][name]
