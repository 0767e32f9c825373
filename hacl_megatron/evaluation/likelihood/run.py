"""Evaluates a checkpoint without generating, at any layout: parse in tools/evaluate.py, build and run here.

--load ─→ LoadedModel ─ForwardOnly─┐
--data-path, --questions ─→ Task ──┴─ TaskRunner ─→ F.TASK.jsonl, a record an item ─→ F.json
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from hacl_megatron.assemble.forward import ForwardOnly
from hacl_megatron.assemble.module import build_module, load_pretrained, pad_multiple
from hacl_megatron.assemble.processes import initialize_parallelism
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, find_checkpoint, read_run_config
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import EVAL_TASKS
from hacl_megatron.config.flags import ModelFlags, ParallelFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig, with_architecture
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.images import ImageDecoder, resolve_backend
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.store import FolderStore
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.answers.answerer import default_dtype, fingerprint
from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.evaluation.likelihood.item_packs import ItemReader
from hacl_megatron.evaluation.likelihood.task import Task
from hacl_megatron.evaluation.likelihood.task_run import TaskRunner
from hacl_megatron.evaluation.likelihood.validation_tasks import manifest_tasks
from hacl_megatron.evaluation.likelihood.yesno import SHORT_ANSWER, YesNo
from hacl_megatron.evaluation.scores import Scores, file_digest, format_table, installed_versions, write_whole
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.processes import select_device, start_platform, world_size_from_environment

TASKS = (*EVAL_TASKS, "yesno")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint's model on this rank, in evaluation mode, and how it was trained to see its data."""

    module: HaclModel
    groups: ProcessGroupCollection
    config: RunConfig
    source: Path
    """The checkpoint's own folder."""
    assets: Path
    """Folder of its tokenizer."""
    device: torch.device

    @property
    def reads_data(self) -> bool:
        return self.groups.mp.rank() == 0

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.assets))

    def settings(self) -> EncodingSettings:
        return EncodingSettings.of(self.config)

    def reader(self) -> ItemReader | None:
        """None on the ranks that receive their packs from another."""
        return item_reader(self.config) if self.reads_data else None

    def forward(self) -> ForwardOnly:
        return ForwardOnly(self.module, device=self.device)


def item_reader(config: RunConfig) -> ItemReader:
    """Reads images as a run of this configuration does."""
    return ItemReader(
        FolderStore(config.data.image_folder),
        ImageDecoder.of(config),
        visual_tokens=config.architecture.visual_tokens,
        pad_multiple=pad_multiple(config),
    )


def saved_config(load: Path) -> tuple[Path, RunConfig]:
    """The folder that `load` means, and the configuration of the run that left it; defaults for a Hugging Face folder.

    Raises:
        ValueError: it is neither a checkpoint of this trainer nor a Hugging Face LLaVA.
    """
    own = find_checkpoint(load)
    if own is not None:
        return own, read_run_config(own)
    if not (load / "config.json").is_file():
        raise ValueError(
            f"--load {load}: found no checkpoint; give a SAVE folder of a run, one of its iter_* folders, or a Hugging "
            "Face LLaVA or BLIP-2"
        )
    architecture = read_model_config(load)
    config = RunConfig(model=ModelFlags(bf16=True), data=data_flags(architecture))
    return load, with_architecture(config, architecture)


def evaluation_config(args: argparse.Namespace, load: Path) -> tuple[Path, RunConfig]:
    """`saved_config` with this machine's layout and the flags' data laid over it; what only training needs is gone."""
    source, saved = saved_config(load)
    dtype = args.dtype or (default_dtype(select_device(args.device)) if saved.model.bf16 else "float32")
    if dtype == "float16":
        raise ValueError("--dtype float16 with --load; give float32 or bfloat16, as models are trained here")
    parallel = ParallelFlags(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        decoder_first_pipeline_num_layers=args.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=args.decoder_last_pipeline_num_layers,
        make_vocab_size_divisible_by=saved.parallel.make_vocab_size_divisible_by,
        device=args.device,
    )
    # Converted weights come with the flag's default, which a small model may not reach.
    length = min(saved.data.model_max_length, saved.architecture.language.max_position_embeddings)
    data = replace(saved.data, image_folder=str(args.image_folder), model_max_length=length)
    for name in ("version", "image_backend", "model_max_length"):
        if getattr(args, name) is not None:
            setattr(data, name, getattr(args, name))
    check_template(data.version)
    model = ModelFlags(pretrained_checkpoint=str(source), bf16=dtype == "bfloat16")
    return source, RunConfig(
        model=model,
        lora=saved.lora,
        parallel=parallel,
        data=data,
        objective=saved.objective,
        architecture=saved.architecture,
    )


@contextlib.contextmanager
def joined_processes(config: RunConfig) -> Iterator[tuple[Layout, ProcessGroupCollection, torch.device]]:
    """This process as part of megatron-core's groups, as long as the context lasts."""
    layout = Layout.of(config, world_size_from_environment())
    joined_already = dist.is_initialized()
    device = start_platform(config.parallel.device)
    groups = initialize_parallelism(config, layout)
    yield layout, groups, device
    # Not after a failure: the other ranks may hang in a collective then, and all that helps is to leave.
    parallel_state.destroy_model_parallel()
    if not joined_already:
        dist.destroy_process_group()


def load_model(
    source: Path, config: RunConfig, layout: Layout, groups: ProcessGroupCollection, device: torch.device
) -> LoadedModel:
    """Build this rank's stage and fill it from the checkpoint; every rank calls it."""
    architecture = config.architecture
    check_architecture(config, architecture, layout)
    module = build_module(config, architecture, layout, groups, device)
    load_pretrained(module, config, architecture, layout)
    module.requires_grad_(False)
    assets = source / ASSETS_FOLDER if (source / ASSETS_FOLDER).is_dir() else source
    return LoadedModel(module=module.eval(), groups=groups, config=config, source=source, assets=assets, device=device)


# ------------------------------------------------------------------------------------------------------- tools/evaluate


def evaluate_checkpoint(args: argparse.Namespace) -> dict[str, Scores] | None:
    """Run `--tasks` as the flags of tools/evaluate.py say; scores by task on rank 0, None elsewhere.

    Raises:
        ValueError: a user's mistake, before the model is loaded where that is possible.
    """
    _check(args)
    source, config = evaluation_config(args, args.load)
    with joined_processes(config) as (layout, groups, device):
        # Data before weights: mistakes in it are found in no time.
        tokenizer_at = source / ASSETS_FOLDER if (source / ASSETS_FOLDER).is_dir() else source
        tasks: dict[str, Task | None] = dict.fromkeys(args.tasks)
        if groups.mp.rank() == 0:
            tasks = _tasks(args, config, load_tokenizer(str(tokenizer_at)))
        model = load_model(source, config, layout, groups, device)
        reader = model.reader()
        runner = TaskRunner(
            model.forward(),
            reader,
            groups=groups,
            vocab_size=config.architecture.language.vocab_size,
            batch_size=args.batch_size,
        )
        settings = _settings(args, source, config) if dist.get_rank() == 0 else {}
        scores = {}
        for name, task in tasks.items():
            records = _run(runner, name, task, args.output, settings)
            if records is not None:
                scores[name] = task.score(records)
        if reader is not None:
            reader.close()
        if dist.get_rank() == 0:
            _write(args, scores, settings)
    return scores or None


def _check(args: argparse.Namespace) -> None:
    if not args.tasks:
        raise ValueError(f"--load needs --tasks: one or more of {', '.join(TASKS)}")
    args.tasks = list(dict.fromkeys(args.tasks))
    if args.image_folder is None:
        raise ValueError("--load needs --image-folder, the folder that image names are relative to")
    if set(args.tasks) & set(EVAL_TASKS) and not args.data_path:
        raise ValueError(f"--tasks {' '.join(args.tasks)} needs --data-path, LLaVA JSON with captions and twins")
    if "yesno" in args.tasks and args.questions is None:
        raise ValueError("--tasks yesno needs --questions, a file of POPE's questions")
    for name in ("batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}, expected at least 1")


def _tasks(args: argparse.Namespace, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Task]:
    """The tasks in the order asked for."""
    settings = EncodingSettings.of(config)
    tasks: dict[str, Task] = {}
    if names := [name for name in args.tasks if name in EVAL_TASKS]:
        manifest = Manifest.read([str(path) for path in args.data_path], version=config.data.version)
        options = {"retrieval": {"pool_size": args.pool_size}}
        tasks |= manifest_tasks(names, manifest, tokenizer, settings, limit=args.limit, options=options)
    if "yesno" in args.tasks:
        suffix = SHORT_ANSWER if args.prompt_suffix is None else args.prompt_suffix
        tasks["yesno"] = YesNo(args.questions, tokenizer, settings, suffix=suffix)
    return {name: tasks[name] for name in args.tasks}


def _settings(args: argparse.Namespace, source: Path, config: RunConfig) -> dict[str, Any]:
    """What decides the records: a journal with other settings is not continued. No layout, which changes nothing."""
    inputs = [*(args.data_path or []), *([args.questions] if args.questions else [])]
    return {
        "model": fingerprint(source),
        "inputs": {str(path): file_digest(path) for path in inputs},
        "dtype": "bfloat16" if config.model.bf16 else "float32",
        "version": config.data.version,
        "model_max_length": config.data.model_max_length,
        "image_aspect_ratio": config.data.image_aspect_ratio,
        "image_backend": resolve_backend(config.data.image_backend),
        "contrastive_image_context": config.objective.contrastive_image_context,
        "prompt_suffix": args.prompt_suffix,
    }


def _run(
    runner: TaskRunner, name: str, task: Task | None, output: Path, settings: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """All of a task's records on rank 0, those of an earlier run of the same command included."""
    if dist.get_rank() != 0:
        return runner.run(task)
    from tqdm import tqdm

    path = output.with_name(f"{output.stem}.{name}.jsonl")
    with Journal(path, {"task": name, **settings}, lambda record: record["key"]) as journal:
        total, done = len(task.item_keys()), dict(journal.done)
        with tqdm(total=total, initial=min(len(done), total), desc=name, unit="item") as bar:

            def keep(record: dict[str, Any]) -> None:
                journal.append(record)
                bar.update()

            return runner.run(task, done=done, keep=keep)


def _write(args: argparse.Namespace, scores: dict[str, Scores], settings: dict[str, Any]) -> None:
    for task in scores.values():
        print(format_table(task), end="\n\n")
    content = {
        "load": str(args.load),
        "tasks": {
            name: {
                "metrics": {metric: finite(value) for metric, value in task.metrics.items()},
                "counts": task.counts,
                "notes": list(task.notes),
                **({"details": task.details} if task.details else {}),
            }
            for name, task in scores.items()
        },
        "settings": settings,
        "versions": installed_versions(),
    }
    write_whole(args.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"results: {args.output}")


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None
