"""Weight files of a Hugging Face folder, read slice by slice: safetensors, or `.bin` through torch's safe unpickler.

Nothing is held: safetensors are read in place, zip-format `.bin` files memory-mapped.
"""

import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hacl_megatron.checkpoint.hf.json_files import one_line, read_json
from hacl_megatron.checkpoint.hf.safetensors_writer import DTYPE_NAMES, bytes_of

CANDIDATES = (
    ("model.safetensors", False), ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False), ("pytorch_model.bin.index.json", True),
)  # fmt: skip
"""Name, and whether it is an index; in transformers' order: one file wins over an index, which an earlier save may have
left behind."""

_SAFETENSORS_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _names_only(index: Path, file: str) -> bool:
    """Whether an index is one of this file alone, as our exports have it."""
    found = read_json(index).get("weight_map")
    return isinstance(found, dict) and bool(found) and all(shard == file for shard in found.values())


class WeightFiles:
    """The tensors of one or several weight files, by the names that stand in them.

    Raises:
        ValueError: a missing or cut file, a pickle that holds code, or a name that occurs twice.
    """

    passed_over: str | None = None
    """What a reader should know of the folder's other weights: that an index beside the one file is not followed."""

    def __init__(self, files: list[Path]):
        self._tensors: dict[str, Path] = {}
        self._open = {}
        for file in files:
            self._open[file] = _open_pickle(file) if file.suffix in (".bin", ".pt", ".pth") else _Safetensors(file)
            for name in self._open[file]:
                if name in self._tensors:
                    raise ValueError(f"{file}: tensor {name} stands in {self._tensors[name]} too")
                self._tensors[name] = file

    @classmethod
    def of_folder(cls, folder: Path) -> "WeightFiles":
        """All weights of a model folder, from its one file or its index; safetensors win over `.bin`."""
        for name, is_index in CANDIDATES:
            path = folder / name
            if not path.is_file():
                continue
            if not is_index:
                weights, index = cls([path]), folder / f"{name}.index.json"
                if index.is_file() and not _names_only(index, name):
                    weights.passed_over = (
                        f"{path} is read, as transformers does, and not the shards that {index.name} beside it names; "
                        f"if those are meant, move {name} away"
                    )
                return weights
            weight_map = read_json(path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{path}: no weight_map in it; expected the index of a sharded checkpoint")
            if strange := [shard for shard in weight_map.values() if not isinstance(shard, str)]:
                raise ValueError(f"{path}: weight_map names {one_line(repr(strange[0]))}; expected names of files")
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if Path(shard).name != shard:
                    raise ValueError(f"{path}: shard {shard!r} lies outside the folder")
                if not (folder / shard).is_file():
                    raise ValueError(f"{folder}: shard {shard} is missing ({path.name} names {len(shards)} shards)")
            weights = cls([folder / shard for shard in shards])
            for tensor, shard in weight_map.items():
                if weights._tensors.get(tensor) != folder / shard:
                    raise ValueError(f"{folder / shard}: tensor {tensor} is missing, though {path.name} puts it there")
            return weights
        raise ValueError(f"{folder}: no weights there; expected one of {', '.join(name for name, _ in CANDIDATES)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file_of(self, name: str) -> Path:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, without reading it."""
        opened = self._open[self._tensors[name]]
        return tuple(opened[name].shape) if isinstance(opened, dict) else opened.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of the stored tensor; ValueError for a type that no weight here may have (quantised ones)."""
        opened = self._open[self._tensors[name]]
        found = opened[name].dtype if isinstance(opened, dict) else opened.dtype(name)
        dtype = found if isinstance(found, torch.dtype) else _SAFETENSORS_DTYPES.get(found)
        if dtype not in _SAFETENSORS_DTYPES.values():
            raise ValueError(
                f"{self.file_of(name)}: {name} is stored as {str(found).removeprefix('torch.')}; expected float32, "
                "bfloat16, float16 or float64"
            )
        return dtype

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """`tensor[rows, columns]` on the host (`tensor[rows]` if it has one dim), in the file's dtype."""
        opened = self._open[self._tensors[name]]
        if isinstance(opened, dict):
            source = opened[name]
            return source if source.dim() == 0 else source[rows] if source.dim() == 1 else source[rows, columns]
        return opened.read(name, rows, columns)


def has_weights(folder: Path) -> bool:
    """Whether `WeightFiles.of_folder` finds anything to open there."""
    return any((folder / name).is_file() for name, _ in CANDIDATES)


class _Safetensors:
    """One safetensors file: checked by its own library, read in large blocks.

    A memory map, as that library reads, ends the process where a file is cut or its disk fails meanwhile; this says so.
    """

    def __init__(self, file: Path):
        if file.exists() and not file.is_file():  # a pipe would not end
            raise ValueError(f"{file}: found no file under this name, but a folder, pipe or device; expected weights")
        try:
            with safe_open(str(file), framework="pt", device="cpu"):  # refuses whatever is not whole
                pass
            self._file = file.open("rb", buffering=0)
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file") from None
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({one_line(error)}); it may be cut") from None
        self._path, self._start = file, 8 + length
        self._facts = {name: facts for name, facts in header.items() if name != "__metadata__"}
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._facts[name]["shape"])

    def dtype(self, name: str) -> str:
        """As the file spells it."""
        return self._facts[name]["dtype"]

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Of a slice of the columns, whole rows are read first."""
        shape, dtype = self.shape(name), _SAFETENSORS_DTYPES[self.dtype(name)]
        start = 0
        if shape:
            first, last, _ = rows.indices(shape[0])
            start, shape = first * math.prod(shape[1:]), (max(last - first, 0), *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        left, offset = bytes_of(tensor), self._start + self._facts[name]["data_offsets"][0] + start * dtype.itemsize
        try:
            while len(left):  # the system reads at most 2 GB at once
                if not (count := os.preadv(self._file.fileno(), [left], offset)):
                    raise EOFError(f"it ends {len(left)} bytes before the tensor does")
                left, offset = left[count:], offset + count
        except (EOFError, OSError) as error:
            raise ValueError(f"{self._path}: {name} cannot be read ({one_line(error)}); the file may be cut") from None
        return tensor if len(shape) < 2 or columns == slice(None) else tensor[:, columns]


def _open_pickle(file: Path) -> dict[str, Tensor]:
    """A state dict of tensors; the safe unpickler runs no code. Maps the file unless it has torch's old format.

    MiniGPT-4 keeps its state dict under `model`, beside optimiser and configuration.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = one_line(str(error).partition("Please file an issue")[0])
        raise ValueError(
            f"{file}: this pickle holds more than tensors, and its code is never run; convert it to safetensors where "
            f"you trust it ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a whole torch file ({one_line(error)}); it may be cut") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: expected a dictionary of tensors")
    return state
