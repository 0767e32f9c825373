"""Reads a distributed checkpoint of this trainer tensor by tensor: no process group, no model, no code from pickles.

    our global name ─ stored name, layer ─ `.metadata`: which chunks, in which files ─ read these alone ─→ whole tensor

Every parameter has its own name here (`hf.names`), whatever the layout that wrote the checkpoint. Vocabulary padding is
cut off.
"""

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.convert.stored_names import EMBEDDING, OUTPUT_LAYER, possible_names
from hacl_megatron.checkpoint.hf.names import NameTable, nearest
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, read_run_config
from hacl_megatron.checkpoint.run.integrity import damage
from hacl_megatron.checkpoint.run.load import part_of
from hacl_megatron.checkpoint.run.stored.parts import StoredParts
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.lora import Lora, adapter_name, target_shapes


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
        has_config = (self.folder / RUN_CONFIG_FILE).is_file()
        self.lora = Lora.of(read_run_config(self.folder).lora) if has_config else None
        """The adapters beside the language model; exports merge them (`lora_export`)."""
        self._parts = StoredParts(self.folder)
        self._tensors = self._parts.index.tensors
        self._check()
        if wrong := damage(self.folder):
            raise ValueError(f"checkpoint {self.folder} is damaged: {wrong}; take another iter_* folder")

    def names(self) -> list[str]:
        """Our names of all parameters, in the table's order; a tied output layer goes by the embedding's name alone."""
        tied = self.model_config.language.tie_word_embeddings
        return [name for name in self.table.rules if not (tied and name == OUTPUT_LAYER)]

    def adapter_names(self) -> list[str]:
        """Our names of the adapters' parameters, by layer."""
        return list(self._adapters)

    @cached_property
    def _adapters(self) -> dict[str, tuple[int, ...]]:
        if self.lora is None:
            return {}
        shapes, language = target_shapes(self.model_config.language), self.model_config.language
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(language.num_layers):
            for target in self.lora.targets:
                rows, columns = shapes[target]
                found[adapter_name(layer, target, "A")] = (self.lora.rank, columns)
                found[adapter_name(layer, target, "B")] = (rows, self.lora.rank)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the unsharded tensor, without vocabulary padding."""
        return self._adapters[name] if name in self._adapters else self.table.rules[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self._stored(name)[0]].dtype

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
        ours = {self._stored(name)[0] for name in [*self.names(), *self.adapter_names()]}
        return [key for key in self._tensors if key not in ours] + list(self._parts.index.objects)

    def read(self, name: str) -> Tensor:
        """One parameter, whole and unsharded, in the dtype of the checkpoint; only its own chunks are read."""
        key, layer = self._stored(name)
        entry, shape = self._tensors[key], self.shape(name)
        # A stacked parameter is one row of what is stored.
        offsets, sizes = (0,) * len(shape), shape
        if layer is not None:
            offsets, sizes = (layer, *offsets), (1, *sizes)
        target, covered = torch.empty(sizes, dtype=entry.dtype), 0
        for chunk in entry.chunks:
            first = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
            lengths = [max(0, b - a) for a, b in zip(first, last, strict=True)]
            if not math.prod(lengths):
                continue
            from_chunk = [a - b for a, b in zip(first, chunk.offsets, strict=True)]
            part = part_of(self._parts.values(key, chunk), from_chunk, lengths)
            if part.shape == target.shape:
                return part.to(entry.dtype).reshape(shape)
            part_of(target, [a - b for a, b in zip(first, offsets, strict=True)], lengths).copy_(part)
            covered += part.numel()
        if covered != target.numel():
            raise ValueError(
                f"{self.folder}: its parts of {name} hold {covered} of {target.numel()} values; it is damaged, "
                "take another iter_* folder"
            )
        return target.view(shape)

    __call__ = read

    def read_lora(self, layer: int, target: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] beside one matrix of a language layer, by its Hugging Face name."""
        return self.read(adapter_name(layer, target, "A")), self.read(adapter_name(layer, target, "B"))

    def _stored(self, name: str) -> tuple[str, int | None]:
        """Key in the checkpoint and row of its first dim, for a parameter of a stacked block."""
        if name == OUTPUT_LAYER and self.model_config.language.tie_word_embeddings:
            name = EMBEDDING
        for key, row in possible_names(name):
            if key in self._tensors:
                return key, row
        close = nearest(name, self._tensors)
        raise ValueError(
            f"{self.folder}: parameter {name} is missing, though {RUN_CONFIG_FILE} asks for it"
            + (f"; nearest found: {close}" if close else "")
        )

    def _check(self) -> None:
        """Every parameter is there, in the shape that run_config.yaml makes it, and in files of the full length."""
        for name in [*self.names(), *self.adapter_names()]:
            key, layer = self._stored(name)
            found, expected = self._tensors[key].size, self.shape(name)
            found = found if layer is None else found[1:]
            padded = name in (EMBEDDING, OUTPUT_LAYER)
            if found[1:] != expected[1:] or (found[0] < expected[0] if padded else found[0] != expected[0]):
                raise ValueError(f"{self.folder}: {name} is {list(found)}, {RUN_CONFIG_FILE} makes it {list(expected)}")
        ends: dict[str, int] = {}
        for chunk in (chunk for entry in self._tensors.values() for chunk in entry.chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for file, end in ends.items():
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{self.folder}: file {file} of the checkpoint is missing")
            if path.stat().st_size < end:
                raise ValueError(f"{path} is cut: {path.stat().st_size} bytes of at least {end}")
