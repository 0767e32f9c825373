"""What a checkpoint holds, of this trainer or of Hugging Face, and how two of them differ; reads tensor by tensor."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.carried import CarriedTensors
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.import_weights import SourceTensors, open_sources
from hacl_megatron.checkpoint.hf.tiled_models import tiled_model_of
from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, find_checkpoint, read_run_config
from hacl_megatron.checkpoint.run.load import load_common_state
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.families import language_family
from hacl_megatron.config.lora import Lora, is_lora

_LAYOUTS = {
    "hf": "Hugging Face LLaVA (LlavaForConditionalGeneration)",
    "llava": "original LLaVA layout ({original})",
    "parts": "{language} and {tower}, without a connector",
    "blip2": "Hugging Face BLIP-2 (Blip2ForConditionalGeneration)",
}


class Holdings:
    """One folder: its description, and its parameters under our names.

    Raises:
        ValueError: the folder is neither kind of checkpoint, or damaged.
    """

    def __init__(self, folder: str | Path, vision_tower: str | Path | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; expected a checkpoint")
        checkpoint = find_checkpoint(self.folder)
        self.reader: ShardedReader | None = None
        self.sources: SourceTensors | None = None
        if checkpoint is not None:
            self.reader = ShardedReader(checkpoint)
            self.config: ModelConfig = self.reader.model_config
            self.carried = CarriedTensors(checkpoint / ASSETS_FOLDER, self.config)
        else:
            self.config = read_model_config(self.folder, vision_tower)
            self.sources = open_sources(self.folder, self.config, vision_tower=vision_tower)

    def names(self) -> list[str]:
        """Our names of the parameters that are there, then canonical names of what is carried."""
        if self.reader is not None:
            return [*self.reader.names(), *self.reader.adapter_names(), *self.carried]
        table, found = self.sources.table, self.sources.found
        tied = self.config.language.tie_word_embeddings
        ours = [
            rule.ours
            for rule in table.rules.values()
            if all(source in found for source in rule.sources)
            and not (tied and rule.ours == "language_model.output_layer.weight")
        ]
        return [*ours, *(name for name in table.carried if name in found)]

    def read(self, name: str) -> Tensor:
        """A tensor of `names`, whole."""
        if self.reader is not None:
            return self.carried[name] if name in self.carried else self.reader.read(name)
        rule = self.sources.table.rules.get(name)
        if rule is None:
            return self.sources.read(name)
        return rule.read_shard(
            self.sources.read, tp_rank=0, tp_size=1, padded_vocab_size=self.config.language.vocab_size
        )

    def dtype(self, name: str) -> torch.dtype:
        if self.reader is not None:
            return self.carried[name].dtype if name in self.carried else self.reader.dtype(name)
        rule = self.sources.table.rules.get(name)
        return self.sources.dtype(name if rule is None else rule.sources[0])

    def shape(self, name: str) -> tuple[int, ...]:
        table = (self.reader or self.sources).table
        if self.reader is not None and name not in table.carried:
            return self.reader.shape(name)
        return table.rules[name].shape if name in table.rules else table.carried[name]


def describe(holdings: Holdings) -> dict[str, str]:
    """What a person wants to know of a checkpoint, in words and order to print."""
    config, language, vision = holdings.config, holdings.config.language, holdings.config.vision
    facts = dict(_origin(holdings))
    facts["language"] = (
        f"{language.num_layers} layers, hidden {language.hidden_size}, ffn {language.ffn_hidden_size}, "
        f"{language.num_attention_heads} heads in {language.num_query_groups} groups, vocabulary {language.vocab_size}"
        + (", tied embeddings" if language.tie_word_embeddings else "")
        + (
            f", RoPE {language.rotary_base:g}"
            + (f" with {language.rope_scaling['rope_type']} scaling" if language.rope_scaling else "")
        )
        + (f", for up to {language.sliding_window} tokens (sliding window)" if language.sliding_window else "")
    )
    facts["vision"] = (
        f"{vision.kind.title} of {vision.num_layers} layers (features of {config.vision_select_layer}), "
        f"hidden {vision.hidden_size}, "
        f"{vision.image_size} pixels in patches of {vision.patch_size}"
        + (", run by transformers" if vision.backend == "hf" else "")
    )
    facts["connector"] = config.projector_type
    if qformer := config.qformer:
        facts["connector"] += (
            f" of {qformer.hf['num_hidden_layers']} layers, {qformer.num_query_tokens} query tokens, hidden "
            f"{qformer.hidden_size}"
        )
    if tiles := config.tiles:
        facts["images"] = tiles.described(vision.image_size)
    parts: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name in holdings.names():
        part = name.partition(".")[0] if name in (holdings.reader or holdings.sources).table.rules else "not trained"
        if name.startswith(("connector.qformer.", "connector.query_tokens")):
            part = "qformer"
        part = "adapters" if is_lora(name) else part
        count = torch.Size(holdings.shape(name)).numel()
        parts[part] = parts.get(part, 0) + count
        dtype = str(holdings.dtype(name)).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + count
    facts["parameters"] = f"{sum(parts.values()):,}: " + ", ".join(f"{part} {n:,}" for part, n in parts.items())
    facts["dtype"] = ", ".join(f"{dtype} {n:,}" for dtype, n in dtypes.items())
    return facts


def _origin(holdings: Holdings) -> Iterator[tuple[str, str]]:
    if holdings.reader is None:
        config = holdings.config
        layout, family = config.extra["layout"], language_family(config.language.family)
        words = _LAYOUTS["blip2" if layout == "hf" and config.qformer is not None else layout]
        if layout == "hf" and (tiled := tiled_model_of(config)):
            words = f"Hugging Face {tiled.title} ({tiled.model_class})"
        yield (
            "family",
            words.format(language=family.title, tower=config.vision.kind.title, original=family.llava_architecture),
        )
        yield "files", ", ".join(holdings.sources.files)
        return
    checkpoint = holdings.reader.folder
    run = read_run_config(checkpoint)
    yield "family", f"checkpoint of hacl_megatron ({checkpoint.name})"
    common = _common(checkpoint)
    if "progress" in common:
        yield "iteration", f"{common['progress']['iteration']}"
        sizes = common.get("layout")
        axes = f"tensor x pipeline x data{' x context' * (sizes is not None and len(sizes) > 3)} parallel"
        yield "written at", f"{axes} {' x '.join(map(str, sizes))}" if sizes else "unknown"
        frozen = [
            part
            for part, is_frozen in (
                ("language model", run.language_model_is_frozen),
                ("vision tower", run.model.freeze_ViT),
                ("Q-Former", run.model.freeze_qformer and holdings.config.qformer is not None),
            )
            if is_frozen
        ]
        yield "frozen", ", ".join(frozen) or "nothing"
        optimizer = sum(name.startswith("optimizer") for name in holdings.reader.other_names)
        yield "optimiser", f"{optimizer} entries" if optimizer else "not there"
    else:
        yield "iteration", "0, weights alone"
    if (lora := Lora.of(run.lora)) is not None:
        yield "adapters", str(lora)
    yield "came from", str(run.model.pretrained_checkpoint or "random weights")


def _common(checkpoint: Path) -> dict[str, Any]:
    """Counters of a run; {} of a conversion."""
    return load_common_state(checkpoint)


def differences(a: Holdings, b: Holdings) -> Iterator[str]:
    """One line for each size, name, dtype or value in which two checkpoints differ."""
    for part in ("language", "vision", "image", "qformer"):
        ours, theirs = (getattr(side.config, part) for side in (a, b))
        if ours is None or theirs is None:
            continue  # `projector_type` says that one has no Q-Former
        ours, theirs = asdict(ours), asdict(theirs)
        for key in ours:
            if ours[key] != theirs[key]:
                yield f"{part}.{key}: {ours[key]} | {theirs[key]}"
    for key in ("projector_type", "vision_select_layer", "tiles"):
        if getattr(a.config, key) != getattr(b.config, key):
            yield f"{key}: {getattr(a.config, key)} | {getattr(b.config, key)}"
    names_a, names_b = a.names(), b.names()
    in_a, in_b = set(names_a), set(names_b)
    yield from (f"{name}: only in {a.folder}" for name in names_a if name not in in_b)
    yield from (f"{name}: only in {b.folder}" for name in names_b if name not in in_a)
    for name in names_a:
        if name not in in_b:
            continue
        if a.shape(name) != b.shape(name):
            yield f"{name}: {list(a.shape(name))} | {list(b.shape(name))}"
            continue
        x, y = a.read(name), b.read(name)
        if x.dtype != y.dtype:
            yield f"{name}: {str(x.dtype).removeprefix('torch.')} | {str(y.dtype).removeprefix('torch.')}"
        x, y = x.to(torch.promote_types(x.dtype, y.dtype)), y.to(torch.promote_types(x.dtype, y.dtype))
        if not torch.equal(x, y):
            changed = x != y
            yield (
                f"{name}: {changed.float().mean():.2%} of {x.numel():,} values differ, by up to "
                f"{(x.float() - y.float()).abs().max():.3g}"
            )
