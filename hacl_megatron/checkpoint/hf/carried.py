"""Tensors that no part of ours uses but a Hugging Face export must have: kept in `carried.safetensors` beside the
tokenizer in every checkpoint, under their canonical names (`hf.names`).

They are the vision layers behind the selected one and the tower's post-norm; training never changes them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.export import cast
from hacl_megatron.checkpoint.hf.import_weights import SourceTensors
from hacl_megatron.checkpoint.hf.names import NameTable
from hacl_megatron.checkpoint.hf.safetensors_writer import SafetensorsWriter
from hacl_megatron.checkpoint.hf.weight_files import WeightFiles
from hacl_megatron.config.architecture import ModelConfig

CARRIED_FILE = "carried.safetensors"


def write_carried(sources: SourceTensors, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write what `sources` has of them, tensor by tensor, in `dtype` or their own; no file where there is nothing."""
    names = [name for name in sources.table.carried if name in sources.found]
    if not names:
        return
    layout = {name: (dtype or sources.dtype(name), sources.table.carried[name]) for name in names}
    with SafetensorsWriter(path, layout) as writer:
        for name in names:
            writer.write(name, cast(sources.read(name), layout[name][0], name))


class CarriedTensors(Mapping[str, Tensor]):
    """Canonical name -> tensor of a checkpoint's assets, each read when it is asked for; empty without the file.

    Raises:
        ValueError: the file is cut, or a tensor in it is not of the shape that the model's sizes make it.
    """

    def __init__(self, assets: Path, model_config: ModelConfig):
        path, shapes = assets / CARRIED_FILE, NameTable(model_config).carried
        self._weights = WeightFiles([path] if path.is_file() else [])
        # Another selected layer than that of the run which wrote the file makes other tensors carried.
        self._names = [name for name in self._weights if name in shapes]
        for name in self._names:
            if (found := self._weights.shape(name)) != shapes[name]:
                raise ValueError(f"{path}: {name} is {list(found)}, the model's sizes make it {list(shapes[name])}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
