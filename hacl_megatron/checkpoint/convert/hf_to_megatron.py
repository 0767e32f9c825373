"""A Hugging Face folder -> a distributed checkpoint of this trainer: what `tools/convert_hf_to_megatron.py` does.

open_sources: every tensor named, its shape checked ─ plan of chunks ─ disk space ─ write_sharded ┐
run_config.yaml, hf_assets/ (tokenizer, processor, carried.safetensors) ──────────────────────────┴─ rename → SAVE
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.convert.writer import plan_chunks, write_sharded
from hacl_megatron.checkpoint.hf.adapters.low_rank import KeptLora, LowRank
from hacl_megatron.checkpoint.hf.assets.tokenizer_files import DEFINITIONS, TOKENIZER_FILES
from hacl_megatron.checkpoint.hf.carried import CARRIED_FILE, write_carried
from hacl_megatron.checkpoint.hf.config_read import data_flags
from hacl_megatron.checkpoint.hf.fresh_folder import check_target, fresh_folder
from hacl_megatron.checkpoint.hf.import_weights import SourceTensors
from hacl_megatron.checkpoint.hf.json_files import read_json
from hacl_megatron.checkpoint.hf.names import Rule
from hacl_megatron.checkpoint.run.folder import (
    ASSETS_FOLDER,
    LATEST_FILE,
    RUN_CONFIG_FILE,
    asset_files,
    copy_assets,
    iteration_folder,
    write_atomically,
)
from hacl_megatron.checkpoint.run.integrity import write_files
from hacl_megatron.checkpoint.run.part_files import checksums_of
from hacl_megatron.config.checks.architecture import padded_vocab_size
from hacl_megatron.config.checks.foreign_files import LARGEST_TOKENIZER, own_file
from hacl_megatron.config.flags import LoraFlags, ModelFlags, ParallelFlags
from hacl_megatron.config.lora import TARGETS, Lora, adapter_name
from hacl_megatron.config.run import RunConfig, to_yaml

SOURCE_FILE = "converted_from.json"
"""In a SAVE folder that a conversion wrote: where the weights came from, and what became of each tensor."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What was written."""

    checkpoint: Path
    num_parameters: int
    num_bytes: int
    fresh: list[str]
    """Parameters that no file held: heads, or the connector of a two-part start."""
    ignored: dict[str, str]
    """Tensor of the source -> why the model does not use it."""


def convert_to_sharded(
    sources: SourceTensors,
    folder: str | Path,
    save: str | Path,
    *,
    fresh: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    workers: int = 2,
    adapters: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write SAVE/iter_0000000, which `--pretrained-checkpoint SAVE` loads at every layout.

    Args:
        sources: of `open_sources`.
        folder: the Hugging Face folder, for tokenizer and processor.
        fresh: initial values of the parameters that the sources may lack, by our names.
        dtype: of all parameters but the heads; default each tensor's own.
        workers: threads, each of which reads, fuses and writes a chunk of a layer at a time.
        adapters: folder that was laid over `folder` (`hf.adapters`): its tokenizer and its LLaVA's config.json win.
        force: replace an earlier conversion at `save`.
        progress: called with the bytes written since the last call, and with all there are.

    Raises:
        ValueError: `save` is taken, the disk is too full, or layers of one tensor differ in dtype. Nothing is left
            behind then.
    """
    save, config, table = Path(save), sources.table.config, sources.table
    check_target(save, force=force, why_not=why_no_conversion)
    for file, name in asset_files(Path(folder)):
        if name.suffix == ".json":
            read_json(file, LARGEST_TOKENIZER)
    if not any((Path(folder) / name).is_file() for name in DEFINITIONS):
        sources.notes.append(f"{folder} has no tokenizer: give --tokenizer to the runs that start here")
    names = [rule.ours for rule in table.rules.values() if any(s not in sources.found for s in rule.sources)]
    fresh_tensors = {source: tensor for ours in names for source, tensor in table.rules[ours].to_sources(fresh[ours])}

    kept = _kept_rules(sources.kept)

    def dtype_of(rule: Rule) -> torch.dtype:
        if rule.ours in kept:
            _, pair, kind = kept[rule.ours]
            return dtype or pair.dtype(kind)
        found = [
            fresh_tensors[source].dtype if source in fresh_tensors else sources.dtype(source) for source in rule.sources
        ]
        if rule.ours.startswith("heads.") or dtype is None:
            whole = found[0]
            for other in found[1:]:
                whole = torch.promote_types(whole, other)
            return whole
        return dtype

    def read(source: str, rows: slice, columns: slice) -> Tensor:
        if source in kept:
            _, pair, kind = kept[source]
            return pair.read(kind)[rows, columns]
        if source not in fresh_tensors:
            return sources.read(source, rows, columns)
        tensor = fresh_tensors[source]
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, columns]

    padded = padded_vocab_size(config.language.vocab_size, ParallelFlags())
    chunks = plan_chunks(table, dtype_of, padded, [rule for rule, *_ in kept.values()])
    total = sum(chunk.num_bytes for chunk in chunks)
    with fresh_folder(save, total, force=force, why_not=why_no_conversion) as partial:
        checkpoint = iteration_folder(partial, 0)
        checkpoint.mkdir()
        copy_assets(Path(folder), checkpoint / ASSETS_FOLDER)
        if adapters is not None:
            _copy_assets_over(adapters, checkpoint / ASSETS_FOLDER, sources)
        write_carried(sources, checkpoint / ASSETS_FOLDER / CARRIED_FILE, dtype)
        run = RunConfig(
            # Of merged LoRA the base is another model; of kept, an export's adapters go beside it.
            model=ModelFlags(
                pretrained_checkpoint=str(folder if adapters is None or sources.kept is not None else adapters)
            ),
            lora=LoraFlags() if sources.kept is None else _lora_flags(sources.kept.lora),
            data=data_flags(config),
            architecture=config,
        )
        (checkpoint / RUN_CONFIG_FILE).write_text(to_yaml(run), encoding="utf-8")
        stored = write_sharded(
            checkpoint,
            chunks,
            read,
            padded_vocab_size=padded,
            workers=workers,
            progress=None if progress is None else lambda done: progress(done, total),
        )
        names_inside = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
        names_inside.remove(RUN_CONFIG_FILE)  # a text that people edit
        write_files(checkpoint, names_inside, checksums_of(stored))
        report = {"files": sources.files, "notes": sources.notes, "fresh": names, "ignored": sources.ignored}
        (partial / SOURCE_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_atomically(partial / LATEST_FILE, "0\n")
    num_parameters = sum(math.prod(chunk.sizes) for chunk in chunks)
    return ConversionReport(
        checkpoint=iteration_folder(save, 0),
        num_parameters=num_parameters,
        num_bytes=total,
        fresh=names,
        ignored=dict(sources.ignored),
    )


def _kept_rules(kept: KeptLora | None) -> dict[str, tuple[Rule, LowRank, str]]:
    """Our name of every adapter's parameter -> its rule, whose one source has that name too, the pair, "A" or "B"."""
    rules = {}
    for canonical, pair in kept.pairs.items() if kept is not None else ():
        layer, target = int(canonical.split(".")[2]), canonical.split(".")[-2]
        for kind in ("A", "B"):
            ours = adapter_name(layer, target, kind)
            shape = pair.shape(kind)
            rule = Rule(ours=ours, partition="replicated", sources=(ours,), source_shapes=(shape,))
            rules[ours] = rule, pair, kind
    return rules


def _lora_flags(lora: Lora) -> LoraFlags:
    return LoraFlags(
        lora_rank=lora.rank,
        lora_alpha=float(lora.alpha),
        lora_dropout=lora.dropout,
        lora_target_modules=[] if lora.targets == TARGETS else list(lora.targets),
    )


def _copy_assets_over(adapters: Path, assets: Path, sources: SourceTensors) -> None:
    """The adapters' own tokenizer and config.json over the base's."""
    names = [name for name in TOKENIZER_FILES if own_file(adapters / name, LARGEST_TOKENIZER)]
    if any(name.startswith("tokenizer.") for name in names):
        for name in TOKENIZER_FILES:
            if not name.startswith("chat_template"):  # which a processor has; else two tokenizers' files side by side
                (assets / name).unlink(missing_ok=True)
            if name in names:
                shutil.copyfile(adapters / name, assets / name)
        sources.notes.append(f"tokenizer: that of {adapters}")
    own = adapters / "config.json"
    if sources.table.config.extra.get("layout") == "llava" and own.is_file() and "mm_vision_tower" in read_json(own):
        shutil.copyfile(own, assets / "config.json")


def drawn_by_conversion(checkpoint: Path) -> list[str]:
    """Parameters of a checkpoint that no file held when it was converted, by our names; none if a run has saved it."""
    report = checkpoint.parent / SOURCE_FILE
    if checkpoint.name != iteration_folder(checkpoint.parent, 0).name or not report.is_file():
        return []
    drawn = read_json(report).get("fresh")
    if not isinstance(drawn, list):
        raise ValueError(f"{report}: `fresh` is {drawn!r}, expected a list of parameters; convert again")
    return drawn


def why_no_conversion(save: Path) -> str | None:
    """Why a folder is not one that a conversion may replace, or None: a run may have gone on in it since."""
    if not (save / SOURCE_FILE).is_file():
        return f"is no earlier conversion (no {SOURCE_FILE})"
    others = sorted({path.name for path in save.iterdir()} - {SOURCE_FILE, LATEST_FILE, iteration_folder(save, 0).name})
    return f"holds {others[0]} too, more than a conversion" if others else None
