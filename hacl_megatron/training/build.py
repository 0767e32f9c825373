"""Builds a run from its configuration and trains it: the one place that knows all the parts.

flags, checkpoint ─resolve→ RunConfig ─→ Run (groups, device) ─┬→ module ─weights─→ Trainee ─┐
                                                               ├→ loader, Validation ────────┼→ Trainer ─ train
                                                               └→ MetricsLog, Saving ────────┘
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hacl_megatron.assemble import start_from
from hacl_megatron.assemble.forward import ForwardOnly
from hacl_megatron.assemble.module import (
    build_module,
    language_config,
    load_pretrained,
    pad_multiple,
    parts_of_transformers,
)
from hacl_megatron.assemble.parameters import trained_and_frozen, whole_model
from hacl_megatron.assemble.processes import draw_apart, initialize_parallelism
from hacl_megatron.assemble.run import Run
from hacl_megatron.assemble.same_run import data_facts, facts_of
from hacl_megatron.checkpoint.run.choose import agree_on_checkpoint
from hacl_megatron.checkpoint.run.folder import copy_assets
from hacl_megatron.checkpoint.run.publish import clean
from hacl_megatron.config.console import notify
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.loader import StepLoader, build_loader
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.step_maker import MicroBatching
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.likelihood.item_packs import ItemReader
from hacl_megatron.evaluation.likelihood.task_run import TaskRunner
from hacl_megatron.evaluation.likelihood.task_table import manifest_tasks
from hacl_megatron.evaluation.likelihood.validation_tasks import ValidationTasks
from hacl_megatron.platform.accelerators import describe_choice
from hacl_megatron.platform.agreement import agree, default_store, told_by_rank_0
from hacl_megatron.platform.folder_lock import FolderInUse, FolderLock
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.training.loop import Trainer
from hacl_megatron.training.optimizer.schedule import RunLength
from hacl_megatron.training.packs import pack_plan
from hacl_megatron.training.reference.scores import ReferenceScores
from hacl_megatron.training.reference.scoring import PLAN
from hacl_megatron.training.reference.start import ReferenceRequest, References, make_scores, references_of
from hacl_megatron.training.reporting.bad_samples import BAD_SAMPLES_FILE
from hacl_megatron.training.reporting.changes import nothing_left, what_differs
from hacl_megatron.training.reporting.doubts import doubts
from hacl_megatron.training.reporting.metrics import MetricsLog, keep_iterations
from hacl_megatron.training.reporting.profiling import ProfileWindow
from hacl_megatron.training.reporting.status import (
    RunStatus,
    TrainingStopped,
    before_this_run,
    hold,
    tell_hang,
    write_status,
)
from hacl_megatron.training.sample_cost import sample_cost
from hacl_megatron.training.saving import Saving
from hacl_megatron.training.signals import StoppedEarly, StopRequests
from hacl_megatron.training.state import Progress, StartingPoint, restore_run, saved_progress
from hacl_megatron.training.trainee import Trainee, build_trainee, check_configurations
from hacl_megatron.training.validation import Validation
from hacl_megatron.training.watchdog import Watchdog


def train(config: RunConfig, layout: Layout) -> None:
    """Train as the resolved `config` says, from the newest checkpoint in `--load` on if there is one.

    Joins the process group, and leaves it unless it was joined before.
    """
    joined_already = dist.is_initialized()
    device = start_platform(
        config.parallel.device, config.parallel.distributed_timeout_minutes, layout.tp, layout.cp, facts_of(config)
    )
    try:
        _run(config, layout, device)
    except StoppedEarly as reason:
        if dist.get_rank() == 0:
            then = "goes on from there" if config.checkpoint.save is not None else "begins anew, for there is no --save"
            notify(f"stopped while the reference scored: {reason}; the next start {then}")
            write_status(config.checkpoint.save, "stopped", reason=str(reason))
    # Not after a failure: the other ranks may hang in a collective then, and all that helps is to leave.
    parallel_state.destroy_model_parallel()
    if not joined_already:
        dist.destroy_process_group()


def _run(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """From the lock of --save to the last state of its run_status.json."""
    resume_from = note = None
    with contextlib.ExitStack() as stack:
        save = config.checkpoint.save
        lock = None if save is None else _hold_save(config, stack)
        if config.checkpoint.load is not None:
            resume_from, note = agree_on_checkpoint(
                Path(config.checkpoint.load), fallback=config.checkpoint.load_fallback
            )
        status: RunStatus | None = None
        watchdog = stack.enter_context(
            Watchdog(config.parallel.hang_timeout, on_hang=lambda reason: tell_hang(status, reason))
        )
        trainer = build_trainer(config, layout, resume_from, device, watchdog.beat, lock)
        if trainer.loader is not None:
            stack.callback(trainer.loader.close)
        if trainer.log is not None:
            stack.callback(trainer.log.close)
        stack.callback(trainer.close)
        if dist.get_rank() == 0:
            for line in (note, before_this_run(save)):
                if line is not None and trainer.log is not None:
                    trainer.log.say(line)
            status = RunStatus(save, trainer.told_so_far)
            status.write("running")
            if lock is not None:
                lock.beside = status.refresh
            trainer.stop_requests.on_leaving = partial(status.write, "killed")
        try:
            stopped_for = trainer.train()
        except TrainingStopped as error:
            if status is not None:
                status.write("failed", str(error))
            raise
        if status is not None:
            status.write("finished" if stopped_for is None else "stopped", stopped_for)


def _hold_save(config: RunConfig, stack: contextlib.ExitStack) -> FolderLock | None:
    """See that no other run writes into --save for as long as `stack` lasts. The lock, on rank 0.

    Raises:
        FolderInUse: on every rank; another run does.
    """
    folder = Path(str(config.checkpoint.save))
    lock = FolderLock(folder, what=f"--save {folder}", say=notify)

    def take() -> str:
        try:
            lock.take()
        except FolderInUse as refusal:
            return json.dumps([None, str(refusal)])
        except OSError as error:
            return json.dumps([None, f"--save {folder} cannot be written to: {error}"])
        return json.dumps([lock.token, None])

    token, refusal = json.loads(told_by_rank_0(default_store(), dist.get_rank(), dist.get_world_size(), take))
    if refusal is not None:
        raise FolderInUse(refusal)
    hold(token)
    if dist.get_rank() != 0:
        return None
    stack.callback(lock.release)
    clean(folder)
    return lock


def build_trainer(
    config: RunConfig,
    layout: Layout,
    resume_from: Path | None,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
    lock: FolderLock | None = None,
) -> Trainer:
    """Everything a run consists of, ready to `train()`; it calls `beat` whenever something is done.

    `lock` is that of --save, on rank 0.
    """
    run = Run(config=config, layout=layout, groups=initialize_parallelism(config, layout), device=device)
    progress, data_state = (Progress(), None) if resume_from is None else saved_progress(resume_from)

    # Configurations and data before weights: mistakes in them are found in no time.
    language_config(config, device)
    check_configurations(config)
    assets = start_from.assets_folder(config, resume_from)
    tokenizer = load_tokenizer(config.model.tokenizer or assets) if run.reads_data else None
    exports = start_from.refuse_without_export(config, resume_from) if dist.get_rank() == 0 else []
    loader = open_loader(run, tokenizer, data_state=data_state) if run.reads_data else None
    facts = None if loader is None or tokenizer is None else data_facts(config, tokenizer, loader.digests)
    agree(default_store(), dist.get_rank(), dist.get_world_size(), "data", facts)
    num_samples = _from_rank_0(loader.num_samples if loader is not None else None)
    length = RunLength.of(
        config.training,
        num_samples=num_samples,
        batch=layout.global_batch_size,
        iteration=progress.iteration,
        drawn=progress.drawn_samples,
        samples_a_step=progress.samples_a_step,
    )
    progress.samples_a_step = length.samples_a_step

    module = build_module(config, run.groups, device)
    draw_apart(config, run.groups)
    changes: list[str] = []
    said = [] if resume_from is not None else [load_pretrained(module, config)]
    trainee = build_trainee(module, config, length.steps)
    if resume_from is not None:
        notes = restore_run(trainee, resume_from, length)
        changes = what_differs(resume_from, config, layout)
        said = [f"resumed iteration {progress.iteration} from {resume_from}", *changes, *notes]
        if length.train_iters == progress.iteration:
            said.append(nothing_left(config.training, progress, num_samples))
    elif config.checkpoint.load is not None:
        said.append(f"--load {config.checkpoint.load} holds no checkpoint yet: the run begins at iteration 0")
    said += [*doubts(config), *exports]
    references = References()
    stop_requests = StopRequests(config.training.exit_duration_in_mins)  # heard while the reference scores, too
    if dist.get_rank() == 0:
        stop_requests.on_leaving = partial(write_status, config.checkpoint.save, "killed")
    if config.preference.has_reference:
        if loader is not None:
            loader.close()
        request = ReferenceRequest(
            run=run,
            forward=ForwardOnly(trainee.module, trainee.model, device=device),
            tokenizer=tokenizer,
            open_loader=_twins_loader(run, tokenizer),
            resume_from=resume_from,
            beat=beat,
            why_stop=stop_requests.reason,
        )
        try:
            references, lines = references_of(request)
        except StoppedEarly:
            stop_requests.close()
            raise
        said += lines
        if tokenizer is not None:
            loader = open_loader(run, tokenizer, data_state=data_state, references=references.training)
    validation = _open_validation(run, trainee, tokenizer, references.validation)
    log = _open_log(run, progress.iteration, length.train_iters, num_samples, said) if dist.get_rank() == 0 else None
    hf_model = config.architecture if start_from.starts_from_hf(config, resume_from) else None
    return Trainer(
        run,
        trainee,
        StartingPoint(
            progress=progress,
            data_state=data_state or {},
            num_samples=num_samples,
            length=length,
            changes=tuple(changes),
        ),
        loader=loader,
        validation=validation,
        saving=Saving(
            run,
            trainee,
            saved_at=progress.iteration,
            write_assets=partial(copy_assets, assets, weights_of=hf_model, tokenizer=config.model.tokenizer),
            say=None if log is None else log.say,
            lock=lock,
        ),
        log=log,
        profile=ProfileWindow.of(config.logging, _tensorboard_dir(config), dist.get_rank(), device),
        stop_requests=stop_requests,
        beat=beat,
    )


def score_reference(config: RunConfig, layout: Layout, output: Path) -> None:
    """Score the twins of a resolved configuration's training data by the weights that it starts from, into `output`.

    Joins the process group, and leaves it unless it was joined before.
    """
    joined_already = dist.is_initialized()
    device = start_platform(
        config.parallel.device, config.parallel.distributed_timeout_minutes, layout.tp, layout.cp, facts_of(config)
    )
    run = Run(config=config, layout=layout, groups=initialize_parallelism(config, layout), device=device)
    tokenizer = None
    if run.reads_data:
        tokenizer = load_tokenizer(config.model.tokenizer or start_from.assets_folder(config, None))
    module = build_module(config, run.groups, device)
    lines = [load_pretrained(module, config)]
    request = ReferenceRequest(
        run=run,
        forward=ForwardOnly(module, device=device),
        tokenizer=tokenizer,
        open_loader=_twins_loader(run, tokenizer),
        resume_from=None,
    )
    lines += make_scores(request, output)
    if dist.get_rank() == 0:
        for line in lines:
            notify(line)
    parallel_state.destroy_model_parallel()
    if not joined_already:
        dist.destroy_process_group()


def open_loader(
    run: Run,
    tokenizer: Tokenizer,
    *,
    for_validation: bool = False,
    data_state: dict[str, Any] | None = None,
    references: ReferenceScores | None = None,
    only: list[int] | None = None,
) -> StepLoader:
    """The loader over the training data, from `data_state` on, or over the validation data from its start.

    For the ranks that read data. With `only` it is over these sample ids once, packed for a reference.
    """
    config, layout, balance = run.config, run.layout, run.config.training.balance_micro_batches
    return build_loader(
        config,
        tokenizer,
        global_batch_size=layout.global_batch_size,
        micro_batching=MicroBatching(
            micro_batch_size=layout.micro_batch_size,
            micro_batch_tokens=config.training.micro_batch_tokens,
            balance=config.objective.contrastive_negatives != "micro-batch" if balance is None else balance,
            cost=sample_cost(config, layout, forward_only=for_validation or only is not None),
            plan=partial(pack_plan, config, with_gradients=not for_validation) if only is None else lambda _: PLAN,
        ),
        data_parallel_rank=run.groups.dp.rank(),
        data_parallel_size=layout.dp,
        pad_multiple=pad_multiple(config),
        for_validation=for_validation,
        data_state=data_state,
        only=only,
        references=references,
        decode_device="mixed" if torch.cuda.is_available() and config.parallel.device != "cpu" else "cpu",
    )


def _twins_loader(run: Run, tokenizer: Tokenizer | None) -> Callable[[list[int], bool], StepLoader]:
    """Opens a loader over sample ids of the training or the validation data, to score them."""
    return lambda ids, for_validation: open_loader(run, tokenizer, for_validation=for_validation, only=ids)


def _open_validation(
    run: Run, trainee: Trainee, tokenizer: Tokenizer | None, references: ReferenceScores | None
) -> Validation | None:
    config = run.config
    if not (config.data.valid_data_path and config.training.eval_interval):
        return None
    return Validation(
        partial(open_loader, run, tokenizer, for_validation=True, references=references)
        if run.reads_data
        else lambda: None,
        num_batches=config.training.eval_iters,
        batch_size=run.layout.global_batch_size,
        evaluate_tasks=_open_tasks(run, trainee, tokenizer) if config.training.eval_tasks else None,
    )


def _open_tasks(run: Run, trainee: Trainee, tokenizer: Tokenizer | None) -> ValidationTasks:
    """`--eval-tasks` over the samples that a validation sees."""
    config, layout, names = run.config, run.layout, run.config.training.eval_tasks
    make_runner = partial(
        TaskRunner,
        ForwardOnly(trainee.module, trainee.model, device=run.device),
        groups=run.groups,
        vocab_size=config.architecture.language.vocab_size,
        batch_size=layout.micro_batch_size,
    )
    if tokenizer is None:
        return ValidationTasks(dict.fromkeys(names), make_runner, None)
    tasks = manifest_tasks(
        names,
        Manifest.read(config.data.valid_data_path, version=config.data.version, cache_dir=config.data.data_cache_dir),
        tokenizer,
        EncodingSettings.of(config),
        limit=config.training.eval_iters * layout.global_batch_size,
    )
    return ValidationTasks(tasks, make_runner, partial(ItemReader.of, config))


def _tensorboard_dir(config: RunConfig) -> Path | None:
    save = config.checkpoint.save
    folder = config.logging.tensorboard_dir or (f"{save}/tensorboard" if save else None)
    return Path(folder) if folder else None


def _open_log(run: Run, iteration: int, train_iters: int, num_samples: int, said: list[str]) -> MetricsLog:
    """The run's log, with what is to be known at its start said; a resumed run's lines beyond `iteration` are gone."""
    config, layout = run.config, run.layout
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    save = Path(config.checkpoint.save) if config.checkpoint.save else None
    if save is not None:
        keep_iterations(save / BAD_SAMPLES_FILE, iteration)
    log = MetricsLog(
        tensorboard_dir=_tensorboard_dir(config),
        jsonl=save / "metrics.jsonl" if save is not None else None,
        first_iteration=iteration,
        last_iteration=train_iters,
        wandb_project=config.logging.wandb_project,
        wandb_dir=save,
        config=asdict(config),
    )
    log.say("\n".join([*said, trained_and_frozen(whole_model(config))]))
    log.say(
        f"{layout} on {run.device.type}, "
        f"{layout.global_batch_size} samples a step, {num_samples} an epoch, {train_iters} iterations"
        + "".join(f"\n{line}" for line in (*parts_of_transformers(config), *describe_choice(run.device, dtype)))
    )
    return log


def _from_rank_0(value: int | None) -> int:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
