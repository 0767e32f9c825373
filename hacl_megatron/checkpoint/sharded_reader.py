"""Reads a distributed checkpoint of this trainer tensor by tensor: no process group, no model, no code from pickles.

    our global name ─ stored name, layer ─ `.metadata`: which chunks, in which files ─ read these alone ─→ whole tensor

megatron-core stacks the layers of a block along a new first dim and stores a layer's norms under the linear layer that
follows them, where Transformer Engine fuses them; here every parameter has its own name again (`hf_names`), whatever
the layout that wrote the checkpoint. Vocabulary padding is cut off.
"""

import io
import pickle
import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hacl_megatron.checkpoint.hf_config import one_line
from hacl_megatron.checkpoint.hf_names import FUSED_NORMS, NameTable, nearest
from hacl_megatron.checkpoint.integrity import may_be_file_of_checkpoint
from hacl_megatron.checkpoint.sharded import RUN_CONFIG_FILE, find_checkpoint
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.run import RunConfig, from_yaml

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"
_STACKED = re.compile(r"(.*\.layers\.)(\d+)\.(.*)")
_METADATA_CLASSES = {
    "torch": {"Size", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}  # fmt: skip
"""All that a `.metadata` may name, beside torch's dtypes."""


def locate_checkpoint(folder: str | Path) -> Path:
    """The checkpoint in `folder`: itself (`iter_*`), or the newest of a SAVE folder; ValueError when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a SAVE folder of this trainer or an iter_* folder in it")
    if (found := find_checkpoint(folder)) is None:
        raise ValueError(f"{folder} holds no checkpoint of this trainer: neither {RUN_CONFIG_FILE} nor a latest file")
    return found


def read_run_config(checkpoint: Path) -> RunConfig:
    """`run_config.yaml` of a checkpoint folder, the model's sizes included; ValueError when they are not there."""
    path = checkpoint / RUN_CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {checkpoint} is no whole checkpoint of this trainer")
    config = from_yaml(path.read_text(encoding="utf-8"), str(path))
    if config.architecture is None:
        raise ValueError(f"{path} does not describe its model: the checkpoint is not one of this trainer's")
    return config


class ShardedReader:
    """The model's weights in one checkpoint folder (`iter_*`); an instance is a `provider` for `export_hf`.

    Every read opens the files it needs and holds nothing, so that threads may share a reader.

    Raises:
        ValueError: a missing, cut or foreign file, or a parameter that the model has and the checkpoint has not.
    """

    def __init__(self, folder: str | Path, model_config: ModelConfig | None = None):
        """Args: model_config: default that of the checkpoint's run_config.yaml."""
        self.folder = Path(folder)
        self.model_config = model_config or read_run_config(self.folder).architecture
        self.table = NameTable(self.model_config)
        self._metadata = _read_metadata(self.folder)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._reader = FileSystemReader(str(self.folder))
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check()

    def names(self) -> list[str]:
        """Our names of all parameters, in the table's order; a tied output layer goes by the embedding's name alone."""
        tied = self.model_config.language.tie_word_embeddings
        return [name for name in self.table.rules if not (tied and name == OUTPUT_LAYER)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the unsharded tensor, without vocabulary padding."""
        return self.table.rules[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self._stored(name)[0]].properties.dtype

    @property
    def num_bytes(self) -> int:
        """Of all parameters, vocabulary padding not counted."""
        return sum(torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize for name in self.names())

    @cached_property
    def num_vocabulary_rows(self) -> int:
        """Rows of the stored embedding, padding included."""
        return self._tensors[self._stored(EMBEDDING)[0]].size[0]

    @cached_property
    def other_names(self) -> list[str]:
        """What the checkpoint holds beside the model's parameters: optimiser state, random states."""
        ours = {self._stored(name)[0] for name in self.names()}
        return [key for key in self._metadata.state_dict_metadata if key not in ours]

    def read(self, name: str) -> Tensor:
        """One parameter, whole and unsharded, in the dtype of the checkpoint; only its own chunks are read."""
        key, layer = self._stored(name)
        entry, shape = self._tensors[key], self.shape(name)
        offsets, sizes = torch.Size([0] * len(shape)), torch.Size(shape)
        if layer is not None:
            offsets, sizes = torch.Size([layer, *offsets]), torch.Size([1, *sizes])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        covered = sum(item.lengths.numel() for item in items)
        assert covered == target.numel(), f"{name}: chunks cover {covered} of {target.numel()} values"
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target))
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            files = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"{self.folder}: {name} cannot be read from {', '.join(files)} ({one_line(error)}); a file is missing "
                "or cut, take another iter_* folder"
            ) from None
        return target.view(shape)

    __call__ = read

    def _stored(self, name: str) -> tuple[str, int | None]:
        """Key in the checkpoint and row of its first dim, for a parameter of a stacked block."""
        if name == OUTPUT_LAYER and self.model_config.language.tie_word_embeddings:
            name = EMBEDDING
        match = _STACKED.fullmatch(name)
        spellings = [name]
        if match:
            prefix, rest = match[1], match[3]
            fused = [theirs for theirs, ours in FUSED_NORMS.items() if ours == rest]
            spellings = [prefix + spelled for spelled in (*fused, rest)]
            spellings += [f"{prefix}{match[2]}.{spelled}" for spelled in (*fused, rest)]
        for key in spellings:
            if key in self._tensors:
                stacked = match is not None and not key.startswith(f"{match[1]}{match[2]}.")
                return key, int(match[2]) if stacked else None
        close = nearest(name, self._tensors)
        raise ValueError(
            f"{self.folder}: parameter {name} is missing, though {RUN_CONFIG_FILE} asks for it"
            + (f"; nearest found: {close}" if close else "")
        )

    def _check(self) -> None:
        """Every parameter is there, in the shape that run_config.yaml makes it, and in files of the full length."""
        for name in self.names():
            key, layer = self._stored(name)
            found, expected = tuple(self._tensors[key].size), self.shape(name)
            found = found if layer is None else found[1:]
            padded = name in (EMBEDDING, OUTPUT_LAYER)
            if found[1:] != expected[1:] or (found[0] < expected[0] if padded else found[0] != expected[0]):
                raise ValueError(f"{self.folder}: {name} is {list(found)}, {RUN_CONFIG_FILE} makes it {list(expected)}")
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in ends.items():
            path = self.folder / file
            if not may_be_file_of_checkpoint(file) or not path.is_file():
                raise ValueError(f"{self.folder}: file {file} of the checkpoint is missing")
            if path.stat().st_size < end:
                raise ValueError(f"{path} is cut: {path.stat().st_size} bytes of at least {end}")


class _IntoTensor(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, state_dict, metadata=None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError  # plans are made for each read

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError  # tensors alone are asked for


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch's checkpoint records and nothing else: `.metadata` is a pickle, and a pickle can hold any code."""

    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} is no whole distributed checkpoint")
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        if "it names" in str(error):
            raise ValueError(
                f"{path}: this pickle holds more than torch's checkpoint records ({one_line(error)}), and its code is "
                "never run"
            ) from None
        raise ValueError(f"{path}: not a whole file ({one_line(error)}); the checkpoint is damaged") from None
    except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole file ({one_line(error)}); the checkpoint is damaged") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise ValueError(f"{path}: found a {type(metadata).__name__}, expected the records of a distributed checkpoint")
    return metadata
