"""Hugging Face weights into one rank's model, in place: only this rank's slices are read.

folder's weight files ┐
tower's folder        ├─ names → canonical names ─ every one accounted for, shapes checked ─┐
hacl_heads.safetensors│                                                                     │
adapter, LoRA         ┘             model.named_parameters() ─ rule ─ read slices ─ copy ←──┘
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hacl_megatron.checkpoint.hf.adapters.low_rank import KeptLora, LowRank
from hacl_megatron.checkpoint.hf.config_read import says_tied
from hacl_megatron.checkpoint.hf.json_files import read_json
from hacl_megatron.checkpoint.hf.names import FUSED_NORMS, NameTable, nearest
from hacl_megatron.checkpoint.hf.spellings import NEWLINE
from hacl_megatron.checkpoint.hf.tiled_models import says_tiles
from hacl_megatron.checkpoint.hf.weight_files import WeightFiles
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.connectors import connector_file
from hacl_megatron.config.lora import is_lora

HEADS_FILE = "hacl_heads.safetensors"
_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What became of every parameter of this rank and every tensor of the source."""

    loaded: list[str]
    """Our (global) names of the parameters that were filled."""
    fresh: list[str]
    """Our names of the parameters left at their initialisation: heads, or the connector of a two-part start."""
    ignored: dict[str, str]
    """Name in the file -> why it has no place in the model."""
    sources: list[str]
    """Files that weights were read from."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know: files passed over, a head that config.json would have tied."""

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{len(self.loaded)} parameters from {', '.join(self.sources)}"]
        if self.fresh:
            parts.append(f"fresh: {', '.join(self.fresh)}")
        if self.ignored:
            reasons = sorted(set(self.ignored.values()))
            counts = [f"{sum(value == reason for value in self.ignored.values())} {reason}" for reason in reasons]
            parts.append(f"not used: {'; '.join(counts)}")
        parts += [f"note: {note}" for note in self.notes]
        return "; ".join(parts)


@dataclass
class SourceTensors:
    """Canonical name -> where the tensor stands. Built by `open_sources`, checked against the table."""

    table: NameTable
    found: dict[str, tuple[WeightFiles, str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """See `ImportReport.notes`."""
    merged: dict[str, LowRank] = field(default_factory=dict)
    """Canonical name -> LoRA that `read` lays into it."""
    kept: KeptLora | None = None
    """LoRA that stays beside the weights: no tensor of theirs has it."""

    def add(self, weights: WeightFiles, label: str, *, tower_folder: bool = False, replace: bool = False) -> None:
        """Take every tensor of `weights`: as a source, or as ignored with a reason; anything else is an error.

        Args:
            label: how the log names these files.
            tower_folder: the names are those of a CLIP's, SigLIP's or BLIP-2's own folder.
            replace: what was found before under the same name gives way (`--pretrain-mm-mlp-adapter`).
        """
        fresh: dict[str, tuple[WeightFiles, str]] = {}
        for name in weights:
            canonical = self.table.canonical(name, tower_folder=tower_folder)
            if reason := self.table.ignored_reason(name, canonical, tower_folder=tower_folder):
                self.ignored[name] = reason
                if canonical in self.table.carried:
                    fresh[canonical] = (weights, name)
            elif canonical not in self.table.expected:
                layout = "tower" if tower_folder else "llava" if "mm_projector" in name else self._layout
                expected = self.spellings(layout)
                close = nearest(name, expected) or nearest(name.removeprefix("model."), expected)
                raise ValueError(
                    f"{weights.file_of(name)}: tensor {name} is unknown to this model"
                    + (f"; nearest expected: {close}" if close else "")
                )
            elif canonical in fresh:
                raise ValueError(f"{weights.file_of(name)}: {name} and {fresh[canonical][1]} are the same tensor twice")
            else:
                fresh[canonical] = (weights, name)
        if twice := [name for name in fresh if name in self.found and not replace]:
            weights, name = self.found[twice[0]]
            raise ValueError(f"{label}: {fresh[twice[0]][1]} was already found in {weights.file_of(name)}")
        self.found.update(fresh)
        self.files.append(label)
        if weights.passed_over:
            self.notes.append(weights.passed_over)

    @property
    def _layout(self) -> str:
        return "hf" if self.table.config.extra.get("layout", "hf") == "hf" else "llava"

    def spellings(self, layout: str) -> list[str]:
        """Every expected or carried tensor as `layout` names it."""
        names = []
        for canonical in [*self.table.expected, *self.table.carried]:
            try:
                names.append(self.table.spelled(canonical, layout))
            except KeyError:
                continue
        return names

    def check(self, folder: Path, *, optional: tuple[str, ...]) -> None:
        """Nothing missing, every shape right; before anything is copied.

        Args:
            optional: canonical prefixes that may be absent, each wholly or not at all.
        """
        for canonical, shape in self.table.expected.items():
            if canonical in self.found:
                continue
            prefix = next((prefix for prefix in optional if canonical.startswith(prefix)), None)
            if prefix is not None and not any(name.startswith(prefix) for name in self.found):
                continue
            beside = self._layout == "llava" and canonical.startswith(("vision.", "qformer."))
            name = self.table.spelled(canonical, "tower" if beside else self._layout)
            close = nearest(name, [spelled for _, spelled in self.found.values()])
            raise ValueError(
                f"{folder}: tensor {name} {list(shape)} is missing" + (f"; nearest found: {close}" if close else "")
            )
        self.check_shapes()

    def check_shapes(self) -> None:
        """Every shape that was found is the one that the model's sizes make it."""
        for canonical, (weights, name) in self.found.items():
            expected = self.table.expected.get(canonical) or self.table.carried[canonical]
            if (shape := weights.shape(name)) != expected:
                raise ValueError(
                    f"{weights.file_of(name)}: tensor {name} is {list(shape)}, config.json makes it {list(expected)}"
                )

    def dtype(self, canonical: str) -> torch.dtype:
        weights, name = self.found[canonical]
        return weights.dtype(name)

    def read(self, canonical: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        weights, name = self.found[canonical]
        part = weights.read(name, rows, columns)
        return part if canonical not in self.merged else self.merged[canonical].laid_into(part, rows, columns)


def open_sources(
    folder: str | Path,
    model_config: ModelConfig,
    *,
    adapter: str | Path | None = None,
    vision_tower: str | Path | None = None,
    lay_over: Callable[[SourceTensors], None] | None = None,
) -> SourceTensors:
    """Find, name and check every tensor of a Hugging Face folder without reading one.

    Args:
        folder: as for `read_model_config`, which gave `model_config`.
        adapter: LLaVA's `mm_projector.bin` or MiniGPT-4's `llama_proj`, laid over the folder's connector.
        vision_tower: folder of the tower, when the weights of `folder` do not hold it. Default: the one that
            `read_model_config` found.
        lay_over: adds to what the folder holds, or replaces it, before anything is missed (`adapters.folder`).

    Raises:
        ValueError: a file that is cut or holds code, a tensor that is unknown, missing, doubled or of the wrong shape.
    """
    folder, table = Path(folder), NameTable(model_config)
    sources = SourceTensors(table)
    sources.add(WeightFiles.of_folder(folder), str(folder))
    where = folder / "config.json"
    if not model_config.language.tie_word_embeddings and where.is_file() and says_tied(read_json(where)):
        sources.notes.append(
            f"{where} says tie_word_embeddings, but the weights hold an LM head that differs from the embedding: it is "
            "kept, as transformers 5 does (4.x and LLaVA's own code drop it); if the embedding is to serve as head, "
            "remove the head's tensor from the files"
        )
    if not any(name.startswith("vision.") for name in sources.found):
        tower = vision_tower or model_config.extra.get("vision_tower_folder")
        if tower is None:
            named = model_config.extra.get("mm_vision_tower")
            raise ValueError(
                f"{folder}: no vision tower in these weights" + (f" (they name {named})" if named else "")
                + "; give the folder of the tower"
            )  # fmt: skip
        sources.add(WeightFiles.of_folder(Path(tower)), str(tower), tower_folder=True)
    if (folder / HEADS_FILE).is_file():
        add_heads(sources, folder / HEADS_FILE)
    if lay_over is not None:
        lay_over(sources)
    if adapter is not None:
        _add_adapter(sources, Path(adapter))
    optional = ["heads."]
    if model_config.extra.get("layout") == "parts":
        optional.append("projector.")
    if not (where.is_file() and says_tiles(read_json(where))):  # tiles may be asked of a model that has none
        optional.insert(0, NEWLINE)  # by itself, whatever there is of the connector
    sources.check(folder, optional=tuple(optional))
    return sources


def add_heads(sources: SourceTensors, path: Path) -> None:
    """Take the heads in `path`, over those that were found before. ValueError for any other tensor."""
    weights = WeightFiles([path])
    names = [name.removeprefix("heads.") for name in sources.table.expected if name.startswith("heads.")]
    for name in weights:
        if name not in names:
            raise ValueError(f"{path}: tensor {name} is unknown; expected {', '.join(names)}")
        sources.found[f"heads.{name}"] = (weights, name)
    sources.files.append(path.name)


def _add_adapter(sources: SourceTensors, path: Path) -> None:
    path = connector_file(path)
    weights, table = WeightFiles([path]), sources.table
    kind = table.config.projector_type
    example = "llama_proj.weight" if kind == "qformer" else "mm_projector.0.weight"
    outside = [name for name in weights if not (table.canonical(name) or "").startswith("projector.")]
    if outside:
        raise ValueError(f"{path}: {outside[0]} is no part of a connector {kind}; expected names such as {example}")
    expected = {name for name in table.expected if name.startswith("projector.")}
    found = {table.canonical(name) for name in weights}
    if NEWLINE in expected and NEWLINE not in found:  # as LLaVA's own code saves it
        expected.remove(NEWLINE)
        sources.notes.append(f"{path} has no image_newline: the model's own stays")
    if found != expected:
        raise ValueError(f"{path}: holds {', '.join(sorted(weights))}, which is no {kind} connector")
    sources.add(weights, str(path), replace=True)


def global_name(local: str, layer_offset: int) -> str:
    """A parameter's name on this pipeline stage -> its name in the whole model, wherever a layer keeps its norms."""
    for fused, ours in FUSED_NORMS.items():
        local = local.replace(f".{fused}", f".{ours}")
    if match := _LAYER.fullmatch(local):
        return f"{match[1]}{int(match[2]) + layer_offset}{match[3]}"
    return local


@torch.no_grad()
def load_hf_weights(
    model: nn.Module,
    folder: str | Path,
    model_config: ModelConfig,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offset: int,
    padded_vocab_size: int,
    adapter: str | Path | None = None,
    vision_tower: str | Path | None = None,
    whole: tuple[str, ...] = (),
) -> ImportReport:
    """Fill this rank's parameters from a Hugging Face folder, in place and in each parameter's own dtype.

    Args:
        model: any module whose parameters bear our names (`hf.names`); parts that this pipeline stage lacks are absent.
        folder: as for `read_model_config`, which gave `model_config`.
        layer_offset: index, in the whole model, of this stage's first language layer.
        padded_vocab_size: rows of the vocabulary over all tensor-parallel ranks.
        adapter: see `open_sources`.
        vision_tower: see `open_sources`.
        whole: beginnings of the names of parameters that are not divided over the tensor-parallel ranks.

    Raises:
        ValueError: see `open_sources`; nothing has been changed then.
    """
    sources = open_sources(folder, model_config, adapter=adapter, vision_tower=vision_tower)
    plan = []
    for local, parameter in model.named_parameters():
        if is_lora(local):  # starts fresh
            continue
        ours = global_name(local, layer_offset)
        rule = sources.table.rules.get(ours)
        assert rule is not None, (
            f"parameter {ours} stands in no name table; nearest: {nearest(ours, sources.table.rules)}"
        )
        rank, size = (0, 1) if ours.startswith(whole) else (tp_rank, tp_size)
        shape = rule.local_shape(size, padded_vocab_size)
        assert tuple(parameter.shape) == shape, f"{ours}: built as {tuple(parameter.shape)}, config makes it {shape}"
        plan.append((ours, rule, parameter, rank, size))
    loaded, fresh = [], []
    for ours, rule, parameter, rank, size in plan:
        if any(source not in sources.found for source in rule.sources):
            fresh.append(ours)  # `check` has made sure that only optional parts get here
            continue
        parameter.copy_(rule.read_shard(sources.read, tp_rank=rank, tp_size=size, padded_vocab_size=padded_vocab_size))
        loaded.append(ours)
    return ImportReport(
        loaded=loaded, fresh=fresh, ignored=dict(sources.ignored), sources=list(sources.files), notes=sources.notes
    )


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path, model_config: ModelConfig) -> list[str]:
    """Lay LLaVA's `mm_projector.bin`, or MiniGPT-4's `llama_proj`, over the connector of a rank's model that has one.

    Returns:
        What a reader should know.

    Raises:
        ValueError: the file is cut, holds code, or is no connector of this model.
    """
    sources = SourceTensors(NameTable(model_config))
    _add_adapter(sources, Path(path))
    sources.check_shapes()
    for name, parameter in model.named_parameters():
        source = sources.table.rules[name].sources[0] if name.startswith("connector.") else None
        if source in sources.found:  # a Q-Former keeps its own
            parameter.copy_(sources.read(source))
    return sources.notes
