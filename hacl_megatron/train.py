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
from hacl_megatron.config.architecture_checks import check_architecture
from hacl_megatron.config.checks import check_flags
from hacl_megatron.config.console import exit_with_error, is_first_rank, notify, report_crash, report_error
from hacl_megatron.config.flags import LoraFlags, ModelFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import settle_lora
from hacl_megatron.config.run import RunConfig, parse_run_config, to_yaml, with_architecture
from hacl_megatron.platform.processes import start_platform, world_size_from_environment
from hacl_megatron.training.status import reason_not_to_restart, write_status

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
    resume_from = _checkpoint_to_resume(config)
    config = with_architecture(config, resolve_architecture(config, resume_from))
    config.lora = resolve_lora(config, resume_from)
    architecture = config.architecture
    check_architecture(config, architecture, layout)
    if config.training.print_config:
        if is_first_rank():
            print(to_yaml(config), end="")
        return
    from hacl_megatron.training.watchdog import Watchdog

    joined_already = dist.is_initialized()
    from hacl_megatron.checkpoint.choose import agree_on_checkpoint

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


def resolve_architecture(config: RunConfig, resume_from: Path | None) -> ModelConfig:
    """Sizes of the model: the checkpoint's to resume, else the pretrained one's, else the YAML's `model:` section.

    `--mm-projector-type` and `--mm-vision-select-layer` are laid over it by `with_architecture`.
    """
    from hacl_megatron.checkpoint.hf_config import read_model_config
    from hacl_megatron.checkpoint.sharded import find_checkpoint
    from hacl_megatron.checkpoint.sharded_reader import read_run_config

    if resume_from is not None:
        found = read_run_config(resume_from).architecture
        _refuse_other_parts(config.model, found, resume_from)
        return found
    if config.model.pretrained_checkpoint is not None:
        source = Path(config.model.pretrained_checkpoint)
        own = find_checkpoint(source)
        tower = config.model.vision_tower
        if own is not None and tower is not None:
            raise ValueError(f"--pretrained-checkpoint {source} holds its vision tower; leave --vision-tower out")
        found = read_run_config(own).architecture if own is not None else read_model_config(source, tower)
        _refuse_other_sizes(config, found, source)
        if own is not None:
            _refuse_other_parts(config.model, found, own)
        return found
    assert config.architecture is not None  # check_flags has asked for one of the three
    return config.architecture


def resolve_lora(config: RunConfig, resume_from: Path | None) -> LoraFlags:
    """The flags' adapters, or those of the checkpoint that is resumed or started from where the flags ask for none."""
    from hacl_megatron.checkpoint.sharded import find_checkpoint
    from hacl_megatron.checkpoint.sharded_reader import read_run_config

    source, found = config.model.pretrained_checkpoint, resume_from
    if found is None and source is not None and Path(source).is_dir():
        found = find_checkpoint(Path(source))
    if found is None:
        return config.lora
    return settle_lora(config.lora, read_run_config(found).lora, str(found), resumes=resume_from is not None)


def planned_architecture(config: RunConfig) -> ModelConfig:
    """As `resolve_architecture`, but the YAML's `model:` section is enough where the weights are not here yet."""
    resume_from = _checkpoint_to_resume(config)
    folders = [config.model.pretrained_checkpoint, config.model.vision_tower]
    missing = [folder for folder in folders if folder is not None and not Path(folder).is_dir()]
    if resume_from is None and (missing or config.model.pretrained_checkpoint is None):
        if config.architecture is None:
            found = f"{missing[0]}: no such folder" if missing else "there is no --pretrained-checkpoint"
            raise ValueError(
                f"{found}, and the --config file has no `model:` section; give one of them, for the model's sizes"
            )
        return config.architecture
    return resolve_architecture(config, resume_from)


def _dry_run(config: RunConfig) -> None:
    from hacl_megatron.training.dry_run import dry_run

    training = config.training
    world_size = training.world_size or world_size_from_environment()
    layout = check_flags(config, world_size, files=False)
    config = with_architecture(config, planned_architecture(config))
    config.lora = resolve_lora(config, _checkpoint_to_resume(config))
    check_architecture(config, config.architecture, layout)
    notify(dry_run(config, config.architecture, layout, rank=training.dry_run_rank))


def _refuse_dry_run_flags(config: RunConfig) -> None:
    for name in ("world_size", "dry_run_rank"):
        if getattr(config.training, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is given without --dry-run; a run takes its processes from torchrun: leave it out"
            )


def _refuse_other_parts(flags: ModelFlags, found: ModelConfig, checkpoint: Path) -> None:
    # Loading would not notice: a linear connector is the first layer of an MLP, and the rest would be left out.
    asked = flags.mm_projector_type
    if asked is not None and asked != found.projector_type:
        raise ValueError(
            f"--mm-projector-type is {asked}, but the connector in checkpoint {checkpoint} is {found.projector_type}; "
            "leave the flag out"
        )
    if flags.vision_backend not in (None, found.vision.backend):
        raise ValueError(
            f"--vision-backend is {flags.vision_backend}, but the vision tower in checkpoint {checkpoint} is "
            f"{found.vision.backend}'s; leave the flag out, or export the checkpoint and start from that"
        )


def _refuse_other_sizes(config: RunConfig, found: ModelConfig, source: Path) -> None:
    asked, found = config.architecture, with_architecture(config, found).architecture
    for part in ("language", "vision", "image", "qformer"):
        if asked is not None and getattr(asked, part) != getattr(found, part):
            raise ValueError(
                f"the YAML's model.{part} is {getattr(asked, part)}, but --pretrained-checkpoint {source} holds "
                f"{getattr(found, part)}; leave the `model:` section out"
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
    from hacl_megatron.checkpoint.sharded import copy_assets
    from hacl_megatron.data.tokenizer import load_tokenizer
    from hacl_megatron.training import setup, state
    from hacl_megatron.training.loop import Trainer
    from hacl_megatron.training.metrics import MetricsLog, keep_iterations
    from hacl_megatron.training.plan.parameters import trained_and_frozen, whole_model
    from hacl_megatron.training.profiling import ProfileWindow

    groups = setup.initialize_parallelism(config, layout)
    progress, data_state = state.Progress(), None
    if resume_from is not None:
        progress, data_state = state.saved_progress(resume_from)

    reads_data = groups.mp.rank() == 0
    assets = _assets_folder(config, resume_from)
    loader = None
    tokenizer = load_tokenizer(config.model.tokenizer or assets) if reads_data else None
    if reads_data:
        loader = open_loader(config, architecture, layout, groups, tokenizer, data_state=data_state)
    num_samples = _from_rank_0(loader.num_samples if loader is not None else None)
    train_iters = config.training.train_iters
    if train_iters is None:
        train_iters = ceil(config.training.num_train_epochs * num_samples / layout.global_batch_size)

    module = setup.build_module(config, architecture, layout, groups, device)
    said = None if resume_from is not None else setup.load_pretrained(module, config, architecture, layout)
    trainee = setup.build_trainee(module, config, groups, device, train_iters)
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
    hf_model = architecture if _starts_from_hf(config, resume_from) else None
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
            + "".join(f"\n{line}" for line in setup.parts_of_transformers(config.model, architecture))
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
    from hacl_megatron.data.loader import MicroBatching, build_loader
    from hacl_megatron.training import setup
    from hacl_megatron.training.packs import pack_plan

    balance = config.training.balance_micro_batches
    return build_loader(
        data_paths=config.data.valid_data_path if for_validation else config.data.data_path,
        contrastive_paths=[] if for_validation else config.data.contrastive_data_path,
        data=config.data,
        model=architecture,
        tokenizer=tokenizer,
        image_context=config.objective.contrastive_image_context,
        seed=config.training.seed,
        global_batch_size=layout.global_batch_size,
        micro_batching=MicroBatching(
            micro_batch_size=layout.micro_batch_size,
            micro_batch_tokens=config.training.micro_batch_tokens,
            balance=config.objective.contrastive_negatives != "micro-batch" if balance is None else balance,
            plan=partial(pack_plan, config, with_gradients=not for_validation),
        ),
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=layout.dp,
        pad_multiple=setup.pad_multiple(config),
        shuffle=not for_validation,
        data_state=data_state,
        decode_device="mixed" if torch.cuda.is_available() and config.parallel.device != "cpu" else "cpu",
    )


def open_tasks(config: RunConfig, layout: Layout, trainee: Any, tokenizer: Any, device: torch.device):
    """`--eval-tasks` over the samples that a validation sees; `tokenizer` is there on the ranks that read data."""
    from hacl_megatron.data.conversation import EncodingSettings
    from hacl_megatron.data.manifest import Manifest
    from hacl_megatron.evaluate import item_reader
    from hacl_megatron.evaluation.task_run import TaskRunner
    from hacl_megatron.evaluation.validation_tasks import ValidationTasks, manifest_tasks
    from hacl_megatron.training.forward import ForwardOnly

    training, data, architecture = config.training, config.data, config.architecture
    forward = ForwardOnly(
        trainee.module,
        trainee.model,
        groups=trainee.groups,
        image_size=architecture.vision.image_size,
        device=device,
    )
    make_runner = partial(
        TaskRunner,
        forward,
        groups=trainee.groups,
        vocab_size=architecture.language.vocab_size,
        batch_size=layout.micro_batch_size,
    )
    if tokenizer is None:
        return ValidationTasks(dict.fromkeys(training.eval_tasks), make_runner, None)
    settings = EncodingSettings(
        version=data.version,
        model_max_length=data.model_max_length,
        visual_tokens=architecture.visual_tokens,
        image_context=config.objective.contrastive_image_context,
    )
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


def _checkpoint_to_resume(config: RunConfig) -> Path | None:
    """What `--load` names; its files are looked at later, by one rank for all."""
    from hacl_megatron.checkpoint.choose import choose_checkpoint
    from hacl_megatron.checkpoint.sharded import find_checkpoint

    load = config.checkpoint.load
    if load is None:
        return None
    try:
        return find_checkpoint(Path(load))
    except ValueError:
        if not config.checkpoint.load_fallback:
            raise
        return choose_checkpoint(Path(load), fallback=True)[0]


def _assets_folder(config: RunConfig, resume_from: Path | None) -> Path | None:
    """Where tokenizer and image-processor files are: in a checkpoint of ours, or in the Hugging Face folder itself."""
    from hacl_megatron.checkpoint.sharded import ASSETS_FOLDER, find_checkpoint

    if resume_from is not None:
        return resume_from / ASSETS_FOLDER
    for source in (config.model.pretrained_checkpoint, config.model.tokenizer):
        if source is not None:
            own = find_checkpoint(Path(source))
            return own / ASSETS_FOLDER if own is not None else Path(source)
    raise ValueError("no tokenizer: give --tokenizer FOLDER, since there is no --pretrained-checkpoint to take it from")


def _starts_from_hf(config: RunConfig, resume_from: Path | None) -> bool:
    """Whether the weights come from a Hugging Face folder, which then holds tensors that exports will need."""
    from hacl_megatron.checkpoint.sharded import find_checkpoint

    source = config.model.pretrained_checkpoint
    return resume_from is None and source is not None and find_checkpoint(Path(source)) is None


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
