"""`torchrun … -m hacl_megatron.train --config FILE.yaml [--flag value …]`: parse, build, run."""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.console import exit_with_error, is_first_rank, notify, report_crash, report_error
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig, parse_run_config, to_yaml, with_architecture
from hacl_megatron.data.templates import check_template
from hacl_megatron.platform.processes import start_platform, world_size_from_environment
from hacl_megatron.training.reporting.status import reason_not_to_restart, write_status

PACKAGE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the trainer; a user's mistake ends it with one line and exit code 2, anything else with 1."""
    quiet_libraries()
    try:
        config = parse_run_config(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        exit_with_error(error)
    save = config.checkpoint.save
    if (reason := reason_not_to_restart(save)) is not None:
        exit_with_error(f"not tried again: {reason}")
    try:
        train(config)
    except Exception as error:
        if not _is_for_the_user(error):
            report_crash(error)
            raise SystemExit(1) from None
        if report_error(error):
            write_status(save, "failed", reason=str(error))
        raise SystemExit(2) from None


def run(argv: Sequence[str]) -> None:
    """Train as the flags say; raises what goes wrong."""
    train(parse_run_config(argv))


def train(config: RunConfig) -> None:
    """Train as `config` says, from the newest checkpoint in `--load` on if there is one."""
    if config.training.dry_run:
        _dry_run(config)
        return
    _refuse_dry_run_flags(config)
    layout = check_flags(config, world_size_from_environment())
    check_template(config.data.version)
    from hacl_megatron.assemble import start_from

    resume_from = start_from.checkpoint_to_resume(config)
    config = with_architecture(config, start_from.resolve_architecture(config, resume_from))
    config.lora = start_from.resolve_lora(config, resume_from)
    architecture = config.architecture
    check_architecture(config, architecture, layout)
    if config.training.print_config:
        if is_first_rank():
            print(to_yaml(config), end="")
        return
    from hacl_megatron.training.watchdog import Watchdog

    joined_already = dist.is_initialized()
    from hacl_megatron.checkpoint.run.choose import agree_on_checkpoint

    device = start_platform(config.parallel.device, config.parallel.distributed_timeout_minutes)
    note = None
    if config.checkpoint.load is not None:
        resume_from, note = agree_on_checkpoint(Path(config.checkpoint.load), fallback=config.checkpoint.load_fallback)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.parallel.hang_timeout))
        trainer = build_trainer(config, architecture, layout, resume_from, device, watchdog.beat)
        if trainer.loader is not None:
            stack.callback(trainer.loader.close)
        if trainer.log is not None:
            stack.callback(trainer.log.close)
        stack.callback(trainer.close)
        if note is not None and trainer.log is not None:
            trainer.log.say(note)
        if dist.get_rank() == 0:
            _write_status_of(trainer, "running")
        stopped_for = trainer.train()
    if dist.get_rank() == 0:
        _write_status_of(trainer, "finished" if stopped_for is None else "stopped", stopped_for)
    # Not after a failure: the other ranks may hang in a collective then, and all that helps is to leave.
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not joined_already:
        dist.destroy_process_group()


def _write_status_of(trainer: Any, state: str, reason: str | None = None) -> None:
    done, wanted = trainer.progress.iteration, trainer.train_iters
    write_status(trainer.config.checkpoint.save, state, iteration=done, train_iters=wanted, reason=reason)


def _dry_run(config: RunConfig) -> None:
    from hacl_megatron.assemble import start_from
    from hacl_megatron.plan.dry_run import dry_run

    training = config.training
    world_size = training.world_size or world_size_from_environment()
    layout = check_flags(config, world_size, files=False)
    check_template(config.data.version)
    config = with_architecture(config, start_from.planned_architecture(config))
    config.lora = start_from.resolve_lora(config, start_from.checkpoint_to_resume(config))
    check_architecture(config, config.architecture, layout)
    notify(dry_run(config, config.architecture, layout, rank=training.dry_run_rank))


def _refuse_dry_run_flags(config: RunConfig) -> None:
    for name in ("world_size", "dry_run_rank"):
        if getattr(config.training, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is given without --dry-run; a run takes its processes from torchrun: leave it out"
            )


def build_trainer(
    config: RunConfig,
    architecture: ModelConfig,
    layout: Layout,
    resume_from: Path | None,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
):
    """Everything a run consists of, ready to `train()`; it calls `beat` whenever something is done."""
    from hacl_megatron.assemble import start_from
    from hacl_megatron.assemble.module import build_module, load_pretrained, parts_of_transformers
    from hacl_megatron.assemble.parameters import trained_and_frozen, whole_model
    from hacl_megatron.assemble.processes import initialize_parallelism
    from hacl_megatron.checkpoint.run.folder import copy_assets
    from hacl_megatron.data.tokenizer import load_tokenizer
    from hacl_megatron.training import state
    from hacl_megatron.training.loop import Trainer
    from hacl_megatron.training.reporting.metrics import MetricsLog, keep_iterations
    from hacl_megatron.training.reporting.profiling import ProfileWindow
    from hacl_megatron.training.trainee import build_trainee

    groups = initialize_parallelism(config, layout)
    progress, data_state = state.Progress(), None
    if resume_from is not None:
        progress, data_state = state.saved_progress(resume_from)

    reads_data = groups.mp.rank() == 0
    assets = start_from.assets_folder(config, resume_from)
    loader = None
    tokenizer = load_tokenizer(config.model.tokenizer or assets) if reads_data else None
    if reads_data:
        loader = open_loader(config, architecture, layout, groups, tokenizer, data_state=data_state)
    num_samples = _from_rank_0(loader.num_samples if loader is not None else None)
    train_iters = config.training.train_iters
    if train_iters is None:
        train_iters = ceil(config.training.num_train_epochs * num_samples / layout.global_batch_size)

    module = build_module(config, architecture, layout, groups, device)
    said = None if resume_from is not None else load_pretrained(module, config, architecture, layout)
    trainee = build_trainee(module, config, groups, device, train_iters)
    if resume_from is not None:
        state.restore_run(trainee, resume_from)
        said = f"resumed iteration {progress.iteration} from {resume_from}"

    make_valid_loader = None
    if config.data.valid_data_path and config.training.eval_interval:
        make_valid_loader = _no_loader
        if reads_data:
            make_valid_loader = partial(
                open_loader, config, architecture, layout, groups, tokenizer, for_validation=True
            )
    evaluate_tasks = None
    if config.training.eval_tasks:
        evaluate_tasks = open_tasks(config, layout, trainee, tokenizer, device)
    hf_model = architecture if start_from.starts_from_hf(config, resume_from) else None
    log, save = None, config.checkpoint.save
    tensorboard = config.logging.tensorboard_dir or (f"{save}/tensorboard" if save else None)
    tensorboard_dir = Path(tensorboard) if tensorboard else None
    if dist.get_rank() == 0:
        if save:
            keep_iterations(Path(save) / "bad_samples.jsonl", progress.iteration)
        log = MetricsLog(
            tensorboard_dir=tensorboard_dir,
            jsonl=Path(save) / "metrics.jsonl" if save else None,
            first_iteration=progress.iteration,
            last_iteration=train_iters,
            wandb_project=config.logging.wandb_project,
            wandb_dir=Path(save) if save else None,
            config=asdict(config),
        )
        log.say(f"{said}\n{trained_and_frozen(whole_model(config, architecture))}")
        log.say(
            f"tensor x pipeline x data parallel {layout.tp} x {layout.pp} x {layout.dp} on {device.type}, "
            f"{layout.global_batch_size} samples a step, {num_samples} an epoch, {train_iters} iterations"
            + "".join(f"\n{line}" for line in parts_of_transformers(config.model, architecture))
        )
    return Trainer(
        config,
        architecture,
        layout,
        trainee,
        progress,
        data_state=data_state or {},
        loader=loader,
        make_valid_loader=make_valid_loader,
        evaluate_tasks=evaluate_tasks,
        num_samples=num_samples,
        train_iters=train_iters,
        log=log,
        write_assets=partial(copy_assets, assets, weights_of=hf_model, tokenizer=config.model.tokenizer),
        profile=ProfileWindow.of(config.logging, tensorboard_dir, dist.get_rank(), device),
        device=device,
        beat=beat,
    )


def open_loader(
    config: RunConfig,
    architecture: ModelConfig,
    layout: Layout,
    groups: Any,
    tokenizer: Any,
    *,
    for_validation: bool = False,
    data_state: dict[str, Any] | None = None,
):
    """The loader over the training data, from `data_state` on, or over the validation data from its start."""
    from hacl_megatron.assemble.module import pad_multiple
    from hacl_megatron.data.loader import MicroBatching, build_loader
    from hacl_megatron.training.packs import pack_plan

    balance = config.training.balance_micro_batches
    return build_loader(
        config,
        tokenizer,
        global_batch_size=layout.global_batch_size,
        micro_batching=MicroBatching(
            micro_batch_size=layout.micro_batch_size,
            micro_batch_tokens=config.training.micro_batch_tokens,
            balance=config.objective.contrastive_negatives != "micro-batch" if balance is None else balance,
            plan=partial(pack_plan, config, with_gradients=not for_validation),
        ),
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=layout.dp,
        pad_multiple=pad_multiple(config),
        for_validation=for_validation,
        data_state=data_state,
        decode_device="mixed" if torch.cuda.is_available() and config.parallel.device != "cpu" else "cpu",
    )


def open_tasks(config: RunConfig, layout: Layout, trainee: Any, tokenizer: Any, device: torch.device):
    """`--eval-tasks` over the samples that a validation sees; `tokenizer` is there on the ranks that read data."""
    from hacl_megatron.assemble.forward import ForwardOnly
    from hacl_megatron.data.encoding import EncodingSettings
    from hacl_megatron.data.manifest import Manifest
    from hacl_megatron.evaluation.likelihood.run import item_reader
    from hacl_megatron.evaluation.likelihood.task_run import TaskRunner
    from hacl_megatron.evaluation.likelihood.validation_tasks import ValidationTasks, manifest_tasks

    training, data, architecture = config.training, config.data, config.architecture
    forward = ForwardOnly(trainee.module, trainee.model, device=device)
    make_runner = partial(
        TaskRunner,
        forward,
        groups=trainee.groups,
        vocab_size=architecture.language.vocab_size,
        batch_size=layout.micro_batch_size,
    )
    if tokenizer is None:
        return ValidationTasks(dict.fromkeys(training.eval_tasks), make_runner, None)
    settings = EncodingSettings.of(config)
    tasks = manifest_tasks(
        training.eval_tasks,
        Manifest.read(data.valid_data_path, version=data.version),
        tokenizer,
        settings,
        limit=training.eval_iters * layout.global_batch_size,
    )
    return ValidationTasks(tasks, make_runner, partial(item_reader, config))


def _no_loader() -> None:
    """Validation on a rank that receives its batches from another."""


def _from_rank_0(value: int | None) -> int:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _is_for_the_user(error: BaseException) -> bool:
    """Raised by this package's own code, and so written for the user; anything else keeps its traceback."""
    from hacl_megatron.training.loop import TrainingStopped

    if isinstance(error, TrainingStopped):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def quiet_libraries() -> None:
    """Hide what megatron-core says on import about libraries that a machine need not have."""
    import logging

    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\.distributed\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
