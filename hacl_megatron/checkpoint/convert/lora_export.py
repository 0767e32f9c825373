"""LoRA of a checkpoint out to Hugging Face: laid into the weights beside it, or as an adapter folder of `peft`.

Merged      W + alpha / rank * B A, tensor by tensor, for every export that `hf.export` writes
export_peft adapter_config.json, adapter_model.safetensors (adapters and connector), hacl_heads.safetensors, and base/
            where no folder is known that they could be laid over
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.convert.lora_base import find_base
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.adapters.low_rank import lora_targets
from hacl_megatron.checkpoint.hf.adapters.settings import ADAPTER_CONFIG
from hacl_megatron.checkpoint.hf.config_write import to_config_json
from hacl_megatron.checkpoint.hf.export import ExportReport, Provider, WriteCard, cast, write_heads
from hacl_megatron.checkpoint.hf.fresh_folder import check_target, fresh_folder
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.hf.safetensors_writer import SafetensorsWriter
from hacl_megatron.config.lora import Lora
from hacl_megatron.config.run import RunConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FOLDER = "base"
"""Sub-folder for a base that is nowhere else."""
_CONNECTOR = "multi_modal_projector"


class Merged:
    """A provider of the same parameters with the adapters laid in, in fp32 where there are any."""

    def __init__(self, provider: Provider, reader: ShardedReader, lora: Lora) -> None:
        self._provider, self._reader, self._lora = provider, reader, lora

    def __call__(self, name: str) -> Tensor:
        tensor, rule = self._provider(name), self._reader.table.rules[name]
        targets = lora_targets(rule.ours, rule.sources)
        if not any(target in self._lora.targets for target in targets.values()):
            return tensor
        shapes = dict(zip(rule.sources, rule.source_shapes, strict=True))

        def read(source: str, rows: slice, columns: slice) -> Tensor:
            target = targets[source]
            if target not in self._lora.targets:
                return torch.zeros(shapes[source])[rows, columns]
            a, b = self._reader.read_lora(_layer(source), target)
            return (self._lora.scale * (b.float() @ a.float()))[rows, columns]

        # The rule that fuses Hugging Face's matrices fuses what is added to them.
        return tensor.float() + rule.read_shard(read, tp_rank=0, tp_size=1, padded_vocab_size=0)


def export_peft(
    provider: Provider,
    reader: ShardedReader,
    run: RunConfig,
    out: str | Path,
    *,
    write_base: Callable[[Path], ExportReport],
    base: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    force: bool = False,
    write_card: WriteCard | None = None,
) -> ExportReport:
    """Write what `PeftModel.from_pretrained(LlavaForConditionalGeneration, out)` loads.

    The connector has trained too: it goes along whole, as one of peft's `modules_to_save`; the heads in their own file.

    Args:
        write_base: writes the weights beside the LoRA as a folder of transformers.
        base: a folder that holds these already; default: what the run started from, if it does. Without one the base is
            written into `out`.

    Raises:
        ValueError: the checkpoint has no LoRA, `peft` is not installed, HF's layout has no such connector, `base` is
            another model, or `out` is taken.
    """
    lora, config, out = Lora.of(run.lora), reader.model_config, Path(out)
    if lora is None:
        raise ValueError(f"{reader.folder} has no LoRA, so there is no adapter to write; use --format hf or llava")
    to_config_json(config, "hf", dtype=str(dtype).removeprefix("torch."))  # or say that HF's layout cannot have it
    if config.qformer is not None:
        raise ValueError(
            "--format peft is for LlavaForConditionalGeneration, but this model has a Q-Former; --format hf merges its "
            "LoRA"
        )
    if config.tiles is not None:
        raise ValueError(
            "--format peft has no place for the trained image_newline, which is in no module of transformers' model; "
            "--format hf merges the LoRA"
        )
    check_target(out, force=force, why_not=_why_no_adapter)
    found, why = find_base(reader, run, base)
    settings = _peft_config(lora, reader, out / BASE_FOLDER if found is None else found)
    plan = {name: shape for name, shape in _plan(reader, lora)}
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in plan.values())
    with fresh_folder(out, total, force=force, why_not=_why_no_adapter) as folder:
        written = write_base(folder / BASE_FOLDER) if found is None else None
        settings.save_pretrained(folder)
        layout = {name: (dtype, shape) for name, shape in plan.items()}
        with SafetensorsWriter(folder / ADAPTER_WEIGHTS, layout) as writer:
            for name, tensor in _tensors(provider, reader, lora):
                writer.write(name, cast(tensor, dtype, name))
        write_heads(reader.table, provider, folder / HEADS_FILE)
        card_notes = [] if write_card is None else write_card(folder, out, "PeftModel")
    notes = [*card_notes, f"load it beside {settings.base_model_name_or_path}"]
    if written is not None:
        notes.append(
            f"that base, {written.num_bytes / 1e9:.3f} GB, is written too, for there is none elsewhere ({why}); "
            "--peft-base DIR names one that an earlier export or --leave-lora-out has written"
        )
        notes += written.notes
    return ExportReport(folder=out, num_tensors=len(plan), num_bytes=total, notes=notes)


def _peft_config(lora: Lora, reader: ShardedReader, base: Path):
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError(
            "--format peft needs the package peft: pip install -e '.[lora]', or write merged weights with --format hf"
        ) from None
    theirs = {target: source.split(".")[-2] for rule in reader.table.rules.values()
              for source, target in lora_targets(rule.ours, rule.sources).items()}  # fmt: skip
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        # CLIP's layers have projections of the same names.
        target_modules=rf".*language_model.*\.({'|'.join(theirs[target] for target in lora.targets)})",
        modules_to_save=[_CONNECTOR],
        base_model_name_or_path=str(base.absolute()),
        inference_mode=True,
    )


def _plan(reader: ShardedReader, lora: Lora) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in the file, shape), in the order of `_tensors`."""
    for rule in reader.table.rules.values():
        targets = lora_targets(rule.ours, rule.sources)
        for source, shape in zip(rule.sources, rule.source_shapes, strict=True):
            if targets.get(source) in lora.targets:
                yield _spelled(reader, source, "lora_A"), (lora.rank, shape[1])
                yield _spelled(reader, source, "lora_B"), (shape[0], lora.rank)
            elif rule.ours.startswith("connector."):
                yield _spelled(reader, source), shape


def _tensors(provider: Provider, reader: ShardedReader, lora: Lora) -> Iterator[tuple[str, Tensor]]:
    for rule in reader.table.rules.values():
        if rule.ours.startswith("connector."):
            for source, tensor in rule.to_sources(provider(rule.ours)):
                yield _spelled(reader, source), tensor
        for source, target in lora_targets(rule.ours, rule.sources).items():
            if target in lora.targets:
                a, b = reader.read_lora(_layer(source), target)
                yield _spelled(reader, source, "lora_A"), a
                yield _spelled(reader, source, "lora_B"), b


def _spelled(reader: ShardedReader, source: str, kind: str | None = None) -> str:
    """As peft names it around transformers' module tree, in which the decoder is `model.language_model`."""
    name = reader.table.spelled(source, "hf").replace("language_model.model.", "language_model.")
    if kind is not None:
        name = name.removesuffix("weight") + f"{kind}.weight"
    return f"base_model.model.model.{name}"


def _layer(source: str) -> int:
    return int(source.split(".")[2])


def _why_no_adapter(out: Path) -> str | None:
    if (out / ADAPTER_CONFIG).is_file() and (out / HEADS_FILE).is_file():
        return None
    return f"is no earlier adapter (no {ADAPTER_CONFIG} with {HEADS_FILE})"
