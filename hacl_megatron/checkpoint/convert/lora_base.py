"""The base that an adapter folder names: a `LlavaForConditionalGeneration` with the very weights that the run froze.

A run may have started from a LLaMA and a tower, from the original layout, from a checkpoint, or have trained its tower:
then no folder is such a base, and the export writes one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.config_read import layout_of, read_model_config
from hacl_megatron.checkpoint.hf.import_weights import open_sources
from hacl_megatron.checkpoint.hf.json_files import read_json
from hacl_megatron.checkpoint.run.folder import find_checkpoint, read_run_config
from hacl_megatron.config.run import RunConfig


def find_base(reader: ShardedReader, run: RunConfig, given: Path | None) -> tuple[Path | None, str]:
    """(Folder of a base, or None; why the last one that came into question is none).

    Args:
        given: a folder that must be one. Default: what the run started from, through checkpoints, where that is one.

    Raises:
        ValueError: `given` is none.
    """
    if given is not None:
        if why := why_no_base(given, reader):
            raise ValueError(f"--peft-base {given}: {why}; leave the flag out, and the base is written too")
        return given, ""
    why = "the run started from random weights"
    for folder in origins(run):
        if not (found := why_no_base(folder, reader)):
            return folder, ""
        why = f"{folder}: {found}"
    return None, why


def why_no_base(folder: Path, reader: ShardedReader) -> str | None:
    """Why transformers does not load from `folder` the model that the adapters were trained beside, or None.

    Sizes are compared, and the weights of the first and the last layers and of what lies outside of layers.
    """
    if not (folder / "config.json").is_file():
        return "no config.json there"
    try:
        settings = read_json(folder / "config.json")
        if layout_of(settings, folder) != "hf" or settings["model_type"] != "llava":
            return f"no LlavaForConditionalGeneration, but of model_type {settings['model_type']!r}"
        config, ours = read_model_config(folder), reader.model_config
        config = replace(config, vision=config.vision.on(ours.vision.backend))
        for part in ("language", "vision", "vision_select_layer"):
            if getattr(config, part) != getattr(ours, part):
                return f"its {part.replace('_', ' ')} has other sizes or settings than the checkpoint's"
        sources = open_sources(folder, config)
    except ValueError as error:
        return str(error)
    rows = ours.language.vocab_size
    for name in _compared(reader):
        theirs = sources.table.rules[name].read_shard(sources.read, tp_rank=0, tp_size=1, padded_vocab_size=rows)
        mine = reader.read(name)
        narrower = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        # One of the two may have been rounded to the other's dtype; bfloat16 and float16 are rounded from either.
        if not any(torch.equal(mine.to(dtype), theirs.to(dtype)) for dtype in {narrower, mine.dtype}):
            return f"its {name} is another than the checkpoint's"
    return None


def origins(run: RunConfig) -> Iterator[Path]:
    """What the run started from, what that was made from, and so on; checkpoints themselves left out."""
    seen: set[Path] = set()
    while run.model.pretrained_checkpoint is not None:
        folder = Path(run.model.pretrained_checkpoint).absolute()
        if folder in seen:
            return
        seen.add(folder)
        try:
            checkpoint = find_checkpoint(folder)
            if checkpoint is None:
                yield folder
                return
            run = read_run_config(checkpoint)
        except ValueError:  # gone or damaged meanwhile: nothing there to start from
            return


def _compared(reader: ShardedReader) -> list[str]:
    """Our names of what `why_no_base` reads: of every block of layers the first and the last, and all outside."""
    last = {
        "language_model.": reader.model_config.language.num_layers - 1,
        "vision_tower.": reader.model_config.num_vision_layers_built - 1,
    }
    names = []
    for name in reader.names():
        part = next((prefix for prefix in last if name.startswith(prefix)), None)
        numbers = [int(word) for word in name.split(".") if word.isdigit()]
        if part is not None and (not numbers or numbers[0] in (0, last[part])):
            names.append(name)
    return names
