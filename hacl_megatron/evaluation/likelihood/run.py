"""Evaluates a checkpoint without generating, at any layout: the flags in tools/evaluate.py, the work here.

--load ─→ HaclModel ─ForwardOnly───┐
--data-path, --questions ─→ Task ──┴─ TaskRunner ─→ F.TASK.jsonl, a record an item ─→ F.json
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hacl_megatron.assemble.loaded_model import LoadSettings, forward_config, load_model
from hacl_megatron.assemble.processes import joined_processes
from hacl_megatron.checkpoint.run.folder import assets_of
from hacl_megatron.config.console import say
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.images import resolve_backend
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.json_text import json_text
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.evaluation.likelihood.task import Task
from hacl_megatron.evaluation.likelihood.task_run import TaskRunner
from hacl_megatron.evaluation.likelihood.task_table import MANIFEST_TASKS, manifest_tasks
from hacl_megatron.evaluation.likelihood.yesno import SHORT_ANSWER, YesNo
from hacl_megatron.evaluation.model_files import fingerprint
from hacl_megatron.evaluation.scores import Scores, file_digest, format_table, installed_versions, write_whole


@dataclass(frozen=True, kw_only=True)
class LikelihoodRequest:
    """What to evaluate on which checkpoint: the flags of tools/evaluate.py by the same names."""

    load: Path
    """SAVE folder of a run, one of its `iter_*` folders, or a Hugging Face LLaVA or BLIP-2."""
    settings: LoadSettings
    """How that is run here."""
    tasks: tuple[str, ...]
    """Names of `task_table.TASKS`, each once, in the order to run them."""
    output: Path
    """F.json: the results file; a task's records go to F.TASK.jsonl beside it."""
    data_path: tuple[Path, ...] = ()
    """LLaVA JSON files with captions and hallucinated captions, for the tasks over a manifest."""
    questions: Path | None = None
    """File of POPE's questions, for `yesno`."""
    prompt_suffix: str | None = None
    """Text behind each of these questions; None: the published one."""
    limit: int | None = None
    """Take so many first samples of `data_path` alone."""
    pool_size: int | None = None
    """`retrieval` looks for each pair among so many; None: among all."""
    batch_size: int = 8
    """Items in a pack."""


def evaluate_checkpoint(request: LikelihoodRequest) -> dict[str, Scores] | None:
    """Run the tasks asked for, write and print their results; scores by task on rank 0, None elsewhere.

    Raises:
        ValueError: a user's mistake, before the model is loaded where that is possible.
    """
    _check(request)
    source, config = forward_config(request.load, request.settings)
    with joined_processes(config) as run:
        # Data before weights: mistakes in it are found in no time.
        tasks: dict[str, Task | None] = dict.fromkeys(request.tasks)
        if run.reads_data:
            tokenizer = load_tokenizer(str(assets_of(source)))
            check_template(config.data.version, tokenizer)
            tasks = _tasks(request, config, tokenizer)
        runner = TaskRunner.of(load_model(source, run), run, batch_size=request.batch_size)
        settings = _settings(request, source, config) if dist.get_rank() == 0 else {}
        scores = {}
        for name, task in tasks.items():
            records = _run(runner, name, task, request.output, settings)
            if records is not None:
                scores[name] = task.score(records)
        runner.close()
        if dist.get_rank() == 0:
            _write(request, scores, settings)
    return scores or None


def _check(request: LikelihoodRequest) -> None:
    if set(request.tasks) & set(MANIFEST_TASKS) and not request.data_path:
        raise ValueError(f"--tasks {' '.join(request.tasks)} needs --data-path, LLaVA JSON with captions and twins")
    if YesNo.name in request.tasks and request.questions is None:
        raise ValueError("--tasks yesno needs --questions, a file of POPE's questions")
    for name in ("batch_size", "limit"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}, expected at least 1")


def _tasks(request: LikelihoodRequest, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Task]:
    """The tasks in the order asked for."""
    settings = EncodingSettings.of(config)
    tasks: dict[str, Task] = {}
    if names := [name for name in request.tasks if name in MANIFEST_TASKS]:
        manifest = Manifest.read([str(path) for path in request.data_path], version=config.data.version)
        options = {"retrieval": {"pool_size": request.pool_size}}
        tasks |= manifest_tasks(names, manifest, tokenizer, settings, limit=request.limit, options=options)
    if YesNo.name in request.tasks:
        suffix = SHORT_ANSWER if request.prompt_suffix is None else request.prompt_suffix
        tasks[YesNo.name] = YesNo(request.questions, tokenizer, settings, suffix=suffix)
    return {name: tasks[name] for name in request.tasks}


def _settings(request: LikelihoodRequest, source: Path, config: RunConfig) -> dict[str, Any]:
    """What decides the records: a journal with other settings is not continued. No layout, which changes nothing."""
    inputs = [*request.data_path, *([request.questions] if request.questions else [])]
    return {
        "model": fingerprint(source),
        "inputs": {str(path): file_digest(path) for path in inputs},
        "dtype": "bfloat16" if config.model.bf16 else "float32",
        "version": config.data.version,
        "model_max_length": config.data.model_max_length,
        "image_aspect_ratio": config.data.image_aspect_ratio,
        "image_transparency": config.data.image_transparency,
        "image_orientation": config.data.image_orientation,
        "image_backend": resolve_backend(config.data.image_backend),
        "contrastive_image_context": config.objective.contrastive_image_context,
        "prompt_suffix": request.prompt_suffix,
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


def _write(request: LikelihoodRequest, scores: dict[str, Scores], settings: dict[str, Any]) -> None:
    for task in scores.values():
        say(f"{format_table(task)}\n")
    content = {
        "load": str(request.load),
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
    write_whole(request.output, json_text(content, indent=1) + "\n")
    print(f"results: {request.output}")


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None
