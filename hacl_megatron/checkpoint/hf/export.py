"""Our unsharded parameters -> a Hugging Face folder, one tensor at a time.

provider(our name) ─ rule ─ canonical tensors ─ vocabulary rows, dtype ─ shard files ┐
carried tensors (vision layers behind the selected one, post-norm) ──────────────────┤   OUT.partial-PID ─ rename → OUT
heads, config.json, generation config, tokenizer, processor ─────────────────────────┘
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.assets.write import Assets, ChatTemplate
from hacl_megatron.checkpoint.hf.config_write import (
    Layout,
    Vocabulary,
    to_config_json,
    to_preprocessor_json,
    tower_config_json,
    tower_name,
    why_not_layout,
)
from hacl_megatron.checkpoint.hf.fresh_folder import fresh_folder
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.hf.json_files import write_json
from hacl_megatron.checkpoint.hf.names import NameTable
from hacl_megatron.checkpoint.hf.safetensors_writer import SafetensorsWriter
from hacl_megatron.checkpoint.hf.tower_config import TOWER_FOLDER
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.families import language_family

Provider = Callable[[str], Tensor]
"""Our name of a parameter -> its unsharded tensor; called once for each, in the table's order."""
Dtypes = Callable[[str], torch.dtype]
"""Our name of a parameter -> the dtype in which its tensors are written."""
WriteCard = Callable[[Path, Path, str], list[str]]
"""Writes a model card into a folder that is to replace another, for a model of this class; returns notes."""
Tower = Literal["inside", "folder", "named"]
Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name in a file -> dtype and shape."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written."""

    folder: Path
    num_tensors: int
    num_bytes: int
    notes: list[str]
    """What a reader should know: rows added or cut, vision layers left out."""


def export_hf(
    provider: Provider,
    config: ModelConfig,
    out: str | Path,
    *,
    layout: Layout = "hf",
    dtype: torch.dtype = torch.bfloat16,
    dtypes: Dtypes | None = None,
    assets: str | Path | None = None,
    carried: Mapping[str, Tensor] | None = None,
    image_aspect_ratio: str | None = None,
    chat_template: ChatTemplate | None = None,
    tower: Tower | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
    write_card: WriteCard | None = None,
) -> ExportReport:
    """Write a folder of transformers ("hf") or one in the original layout ("llava").

    With a Q-Former "hf" is a `Blip2ForConditionalGeneration`, with tiles LLaVA-NeXT's or LLaVA-OneVision's model, else
    a `LlavaForConditionalGeneration`.

    Args:
        dtype: of all weights but the heads', which keep the provider's (τ must stay fp32); what config.json says.
        dtypes: where parameters are not all of `dtype`. What is carried keeps its own where the tower has such ones.
        assets: folder with the tokenizer's files and generation_config.json.
        carried: canonical name -> tensor, of what no part of ours uses; read one at a time. Without
            them HF's layout gets a tower that ends with the selected layer, which computes the same features.
        image_aspect_ratio: how the model was trained to see images; default as it came.
        chat_template: how it was trained to see dialogues, for HF's layout; one that came with a whole model wins.
        tower: where the original layout puts the vision tower: `inside` its weight files, in a CLIP `folder` within, or
            just `named`. Default: inside where `mm_vision_tower` can name it, else a folder.
        force: replace an earlier export at `out`.

    Raises:
        ValueError: `out` exists, the disk is too full, the layout has no such connector or tower, or a value does not
            fit float16. Nothing is left behind then.
    """
    out, assets = Path(out), None if assets is None else Path(assets)
    if layout == "llava" and tower is None:
        tower = "inside" if tower_name(config) else "folder"
    if why := why_not_layout(config, layout):
        raise ValueError(why)
    notes: list[str] = []
    config, carried = _complete_tower(config, carried or {}, needed=layout == "hf" or tower == "folder", notes=notes)
    beside = Assets(folder=assets, config=config, layout=layout, chat_template=chat_template, notes=notes)
    vocabulary = beside.vocabulary
    dtype_name = str(dtype).removeprefix("torch.")
    named = str(out.resolve() / TOWER_FOLDER) if tower == "folder" else None
    settings = to_config_json(
        config, layout, dtype=dtype_name, image_aspect_ratio=image_aspect_ratio, vocabulary=vocabulary,
        vision_tower=named, carries_tower=tower == "inside",
    )  # fmt: skip
    if (change := vocabulary.size - config.language.vocab_size) != 0:
        notes.append(f"{abs(change)} vocabulary rows {'added (mean of the others)' if change > 0 else 'cut'}")

    table = NameTable(config)
    stream = _Stream(table, provider, carried, vocabulary, dtype, dtypes or (lambda _: dtype))
    prefixes = (
        ("text.", "projector.") if tower in ("folder", "named") else ("vision.", "qformer.", "projector.", "text.")
    )
    plan = stream.plan(layout, prefixes)
    tower_plan = stream.plan("tower", ("vision.",)) if tower == "folder" else {}
    total = sum(_num_bytes(*one) for one in [*plan.values(), *tower_plan.values()])
    if others := [found for found, _ in [*plan.values(), *tower_plan.values()] if found != dtype]:
        names = ", ".join(sorted({str(found).removeprefix("torch.") for found in others}))
        notes.append(
            f"{len(others)} tensors are {names}, as in the checkpoint, the others {dtype_name}, as config.json says: "
            'transformers loads all as that by dtype="auto", as float32 by dtype=torch.float32; --dtype makes them one'
        )
    with fresh_folder(out, total, force=force, why_not=why_no_export) as folder:
        write_json(folder / "config.json", settings)
        beside.write(folder, image_aspect_ratio=image_aspect_ratio)
        stream.write(folder, plan, layout, prefixes, parse_size(max_shard_size))
        if tower_plan:
            tower_folder = folder / TOWER_FOLDER
            tower_folder.mkdir()
            described = {"architectures": [config.vision.kind.model_class], "torch_dtype": dtype_name}
            write_json(tower_folder / "config.json", {**described, **tower_config_json(config)})
            write_json(tower_folder / "preprocessor_config.json",
                       to_preprocessor_json(replace(config, tiles=None), image_aspect_ratio="square"))  # fmt: skip
            stream.write(tower_folder, tower_plan, "tower", ("vision.",), parse_size(max_shard_size))
        write_heads(table, provider, folder / HEADS_FILE)
        if write_card is not None:
            notes += write_card(folder, out, settings["architectures"][0])
    return ExportReport(folder=out, num_tensors=len(plan) + len(tower_plan), num_bytes=total, notes=notes)


def export_projector(
    provider: Provider,
    config: ModelConfig,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dtypes: Dtypes | None = None,
    force: bool = False,
) -> ExportReport:
    """Write the connector alone, and the heads: as LLaVA's stage 1 does (`mm_projector.bin` and `config.json`), or the
    projection behind a Q-Former as MiniGPT-4 does (`llama_proj.pth`)."""
    out, table = Path(out), NameTable(config)
    layout = "llava" if config.qformer is None else "minigpt4"
    tensors = {}
    for rule in table.rules.values():
        if rule.sources[0].startswith("projector."):
            of = dtypes(rule.ours) if dtypes else dtype
            for canonical, tensor in rule.to_sources(provider(rule.ours)):
                tensors[table.spelled(canonical, layout)] = cast(tensor.cpu(), of, canonical).clone()
    total, dtype_name = sum(tensor.nbytes for tensor in tensors.values()), str(dtype).removeprefix("torch.")
    if layout == "minigpt4":
        file, content, settings = "llama_proj.pth", {"model": tensors}, to_config_json(config, "hf", dtype=dtype_name)
    else:
        file, content = "mm_projector.bin", tensors
        settings = to_config_json(config, "llava", dtype=dtype_name, carries_tower=False)
        settings["tune_mm_mlp_adapter"] = True
    with fresh_folder(out, total, force=force, why_not=why_no_export) as folder:
        write_json(folder / "config.json", settings)
        torch.save(content, folder / file)
        write_heads(table, provider, folder / HEADS_FILE)
    return ExportReport(folder=out, num_tensors=len(tensors), num_bytes=total, notes=[])


def write_heads(table: NameTable, provider: Provider, path: Path) -> None:
    """`hacl_heads.safetensors`, in the dtype that the heads have."""
    rules = [rule for rule in table.rules.values() if rule.ours.startswith("heads.")]
    tensors = {rule.ours.removeprefix("heads."): provider(rule.ours) for rule in rules}
    for rule in rules:
        tensor = tensors[rule.ours.removeprefix("heads.")]
        assert tuple(tensor.shape) == rule.shape, f"{rule.ours}: found {tuple(tensor.shape)}, expected {rule.shape}"
    with SafetensorsWriter(
        path, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    ) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


# ------------------------------------------------------------------------------------------------------------ streaming


@dataclass
class _Stream:
    """Canonical tensors in the table's order, with the vocabulary of the target layout."""

    table: NameTable
    provider: Provider
    carried: Mapping[str, Tensor]
    vocabulary: Vocabulary
    dtype: torch.dtype
    dtypes: Dtypes

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """Canonical name -> dtype, of all that `write` may write."""
        found = {source: self.dtypes(rule.ours) for rule in self.table.rules.values() for source in rule.sources}
        tower = {dtype for name, dtype in found.items() if name.startswith("vision.")}
        for name in self.table.carried:
            if name in self.carried:
                own = self.carried[name].dtype
                found[name] = own if own in tower else self.dtype
        return found

    def _is_vocabulary(self, canonical: str) -> bool:
        family = language_family(self.table.config.language.family)
        return canonical in (f"text.{family.embedding}", f"text.{family.lm_head}")

    def plan(self, layout: str, prefixes: tuple[str, ...]) -> Plan:
        """Spelled name -> dtype and shape, of every tensor that `write` is going to write, in its order."""
        plan = {}
        carried = {name: shape for name, shape in self.table.carried.items() if name in self.carried}
        for canonical, shape in (self.table.expected | carried).items():
            if canonical.startswith(prefixes):
                rows = self.vocabulary.size if self._is_vocabulary(canonical) else shape[0]
                plan[self.table.spelled(canonical, layout)] = self._dtypes[canonical], (rows, *shape[1:])
        return plan

    def _tensors(self, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        done, parts = set(), {}
        for rule in self.table.rules.values():
            # A tied output layer has the embedding's source, which the embedding has written.
            if not rule.sources[0].startswith(prefixes) or rule.sources[0] in done:
                continue
            for canonical, tensor in rule.to_sources(self.provider(rule.ours)):
                if rule.parts > 1:  # the parts of a tensor follow one another, in the order of its rows
                    parts[canonical] = [*parts.get(canonical, ()), tensor]
                    if len(parts[canonical]) < rule.parts:
                        continue
                    tensor = torch.cat(parts.pop(canonical))
                done.add(canonical)
                yield canonical, tensor
        for canonical in self.table.carried:
            if canonical in self.carried and canonical.startswith(prefixes):
                yield canonical, self.carried[canonical]

    def write(self, folder: Path, plan: Plan, layout: str, prefixes: tuple[str, ...], max_bytes: int) -> None:
        """Write `plan` as model.safetensors, or as shards of at most `max_bytes` with an index."""
        shards: list[Plan] = []
        filled = 0
        for name, one in plan.items():
            size = _num_bytes(*one)
            if not shards or filled + size > max_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = one
            filled += size
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        # Without an index vLLM takes every *.safetensors of the folder for the model's, and fails on the heads.
        if len(shards) > 1 or layout == "hf":
            write_json(folder / "model.safetensors.index.json", {
                "metadata": {"total_size": sum(_num_bytes(*one) for one in plan.values())},
                "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
            })  # fmt: skip
        source = self._tensors(prefixes)
        for file, shard in zip(names, shards, strict=True):
            with SafetensorsWriter(folder / file, shard) as writer:
                for name in shard:  # the plan has the order of `_tensors`
                    canonical, tensor = next(source)
                    assert self.table.spelled(canonical, layout) == name, f"{canonical} came where {name} was due"
                    if self._is_vocabulary(canonical):
                        tensor = resize_vocabulary(tensor, self.vocabulary.size)
                    writer.write(name, cast(tensor, self._dtypes[canonical], canonical))


def resize_vocabulary(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows; rows that are missing are the mean of all others, as transformers' resizing has it."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """To `dtype`; ValueError where a finite value overflows, as can happen into float16 and out of float64."""
    result = tensor.to(dtype)
    narrower = tensor.dtype != dtype and (dtype == torch.float16 or tensor.dtype == torch.float64)
    if narrower and not torch.equal(result.isfinite(), tensor.isfinite()):
        found = str(dtype).removeprefix("torch.")
        instead = "write bfloat16 or float32 instead (--dtype)" if dtype == torch.float16 else "leave --dtype out"
        raise ValueError(f"{name} holds values beyond {found}'s range; {instead}")
    return result


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def parse_size(size: str | int) -> int:
    """Bytes of `5GB`, `300MB`, `2GiB` or a plain number, as transformers' `max_shard_size` reads them."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B?", size.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"max_shard_size is {size!r}; expected a size such as 5GB or 300MB")
    power = " KMG".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _complete_tower(
    config: ModelConfig, carried: Mapping[str, Tensor], *, needed: bool, notes: list[str]
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Make a whole tower of what there is.

    Without the carried layers the selected one becomes the tower's last (`vision_select_layer` -1); features are equal.
    The post-norm is behind every feature, so an identity does. SigLIP's pooling head and DINOv2's mask are left out;
    where that has registers transformers builds a mask, which is zeros as it starts.
    """
    wanted = NameTable(config).carried
    if all(name in carried for name in wanted):
        return config, carried
    if not needed:
        return config, {}
    built, vision, kind = config.num_vision_layers_built, config.vision, config.vision.kind
    notes.append(f"the vision tower ends with its selected layer, {built} of {vision.num_layers}")
    without = {key: value for key, value in kind.without_unused.items() if key in (vision.hf or {})}
    hf = vision.hf and {**vision.hf, kind.sizes["num_layers"]: built, **without}
    config = replace(config, vision=replace(vision, num_layers=built, hf=hf), vision_select_layer=-1)
    left = NameTable(config).carried
    assert all(len(shape) == 1 or name.endswith("mask_token") for name, shape in left.items()), left
    return config, {
        name: torch.ones(shape) if name.endswith("weight") else torch.zeros(shape) for name, shape in left.items()
    }


def why_no_export(out: Path) -> str | None:
    """Why a folder is not one that an export may replace, or None."""
    if (out / HEADS_FILE).is_file() and (out / "config.json").is_file():
        return None
    return f"is no earlier export (no config.json with {HEADS_FILE})"
