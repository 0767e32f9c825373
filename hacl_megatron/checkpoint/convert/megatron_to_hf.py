"""A checkpoint of this trainer -> a Hugging Face folder: what `tools/convert_megatron_to_hf.py` does.

.distcp chunks ─ worker threads read ahead ─ our unsharded tensors ─ `hf.export` ─→ OUT
hf_assets/: tokenizer, generation config, carried.safetensors ────────┤
run_config.yaml, metrics.jsonl: the model card ───────────────────────┘
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hacl_megatron.checkpoint.convert.lora_export import Merged, export_peft
from hacl_megatron.checkpoint.convert.model_card import model_card
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.assets.write import ChatTemplate
from hacl_megatron.checkpoint.hf.carried import CarriedTensors
from hacl_megatron.checkpoint.hf.config_write import VERSION_KEY, Layout
from hacl_megatron.checkpoint.hf.export import ExportReport, Provider, Tower, export_hf, export_projector
from hacl_megatron.checkpoint.hf.tower_config import IMAGE_FLAGS
from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, read_run_config
from hacl_megatron.config.lora import Lora

Format = Literal["hf", "llava", "projector", "peft"]
AHEAD_BYTES = 512 << 20
Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: Format = "hf",
    merge_lora: bool = True,
    dtype: torch.dtype | None = None,
    tower: Tower | None = None,
    image_aspect_ratio: str | None = None,
    chat_template: ChatTemplate | None = None,
    peft_base: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    workers: int = 2,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export one checkpoint folder (`iter_*`, see `run.folder.locate_checkpoint`).

    Args:
        format: `LlavaForConditionalGeneration` (hf; `Blip2ForConditionalGeneration` with a Q-Former), the original
            layout (llava), the connector alone (projector), or the adapters for the model of `hf` (peft).
        merge_lora: lay the checkpoint's LoRA, if it has any, into the weights of the first two; else leave it out.
        dtype: of the weights; default: each as the checkpoint has it, config.json saying that of most bytes. An adapter
            folder is of one, default the widest in it.
        tower: see `export_hf`.
        image_aspect_ratio: default `--image-aspect-ratio` of the run.
        chat_template: of the run's `--version`; see `export_hf`.
        peft_base: see `export_peft`.
        workers: threads that read ahead of the one that writes; each holds one tensor.

    Raises:
        ValueError: see `ShardedReader` and `export_hf`; nothing is left behind then.
    """
    checkpoint = Path(checkpoint)
    run = read_run_config(checkpoint)
    reader = ShardedReader(checkpoint, run.architecture)
    dtypes = None if dtype else reader.dtype
    if format == "peft" and dtype is None:
        trained = [*reader.adapter_names(), *(name for name in reader.names() if name.startswith("connector."))]
        dtype = reduce(torch.promote_types, {reader.dtype(name) for name in trained})
    weights_dtype = (dtype if dtypes is None else None) or main_dtype(reader)
    dtype = dtype or weights_dtype
    assets = checkpoint / ASSETS_FOLDER
    ways = {key: getattr(run.data, key) for key in IMAGE_FLAGS}
    # `plain` asks nothing: questions are put to what stage 1 made as they were to what it came from.
    asked = {} if run.data.version == "plain" else {VERSION_KEY: run.data.version}
    model = replace(reader.model_config, extra={**reader.model_config.extra, **ways, **asked})
    with ReadAhead(reader, workers, progress) as provider:
        if format == "projector":
            report = export_projector(provider, reader.model_config, out, dtype=dtype, dtypes=dtypes, force=force)
            if reader.model_config.qformer is not None and not run.model.freeze_qformer:
                report.notes.append("the Q-Former was trained too, and is not in llama_proj; --format hf holds it")
            return report
        lora = Lora.of(run.lora)

        def write_card(folder: Path, before: Path, model_class: str) -> list[str]:
            library = {"hf": "transformers", "peft": "peft"}.get(format)
            return model_card(checkpoint, run, model_class=model_class, library=library).write(folder, before)

        def whole(provider: Provider, out: str | Path, layout: Layout, force: bool, *, is_run: bool) -> ExportReport:
            return export_hf(
                provider,
                model,
                out,
                layout=layout,
                dtype=weights_dtype,
                dtypes=dtypes,
                assets=assets if assets.is_dir() else None,
                carried=CarriedTensors(assets, reader.model_config),
                image_aspect_ratio=image_aspect_ratio or run.data.image_aspect_ratio,
                chat_template=chat_template,
                tower=tower,
                max_shard_size=max_shard_size,
                force=force,
                write_card=write_card if is_run else None,
            )

        if format == "peft":
            return export_peft(
                provider,
                reader,
                run,
                out,
                write_base=lambda base: whole(provider, base, "hf", False, is_run=False),
                base=None if peft_base is None else Path(peft_base),
                dtype=dtype,
                force=force,
                write_card=write_card,
            )
        merged = provider if lora is None or not merge_lora else Merged(provider, reader, lora)
        report = whole(merged, out, format, force, is_run=lora is None or merge_lora)
        if stated := [f"{key} {ways[key]}" for key, (default, _) in IMAGE_FLAGS.items() if ways[key] != default]:
            report.notes.append(
                f"transformers' image processors have no {' or '.join(stated)}: treat pictures so before they do"
            )
        if lora is not None:
            report.notes.append(f"{lora} {'merged' if merge_lora else 'left out'}")
        return report


def main_dtype(reader: ShardedReader) -> torch.dtype:
    """The dtype that most bytes of the model have."""
    sizes: dict[torch.dtype, int] = {}
    for name in reader.names():
        dtype = reader.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(reader.shape(name)).numel() * dtype.itemsize
    return max(sizes, key=sizes.get)


class ReadAhead:
    """A provider that reads the tensors which follow the one asked for, in threads. A context manager."""

    def __init__(self, reader: ShardedReader, workers: int, progress: Progress | None = None):
        self._reader, self._workers, self._progress = reader, max(workers, 1), progress
        self._names = reader.names()
        self._position = {name: i for i, name in enumerate(self._names)}
        self._futures: dict[str, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(self._workers)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, name: str) -> Tensor:
        future = self._futures.pop(name, None)
        # Whatever was read ahead and not asked for (another part comes next) would only be held.
        ahead = self._following(name)
        self._futures = {key: value for key, value in self._futures.items() if key in ahead}
        tensor = future.result() if future is not None else self._reader.read(name)
        for key in ahead:
            if key not in self._futures:
                self._futures[key] = self._pool.submit(self._reader.read, key)
        if self._progress is not None:
            self._progress(tensor.nbytes)
        return tensor

    def _following(self, name: str) -> list[str]:
        """What to read ahead: one for each worker, and no more than `AHEAD_BYTES` together."""
        names, held = [], 0
        for key in self._names[self._position[name] + 1 :][: self._workers]:
            held += torch.Size(self._reader.shape(key)).numel() * self._reader.dtype(key).itemsize
            if held > AHEAD_BYTES:
                break
            names.append(key)
        return names
