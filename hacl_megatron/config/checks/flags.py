"""Everything that can be wrong with a run's flags and number of processes before a GPU is touched.

Each check is a ValueError of one line: what was found, what was expected, what to do. What needs the model's sizes
too is in `architecture`.
"""

import math
from typing import Any

from hacl_megatron.config.checks.files import check_inputs, check_outputs, check_places
from hacl_megatron.config.checks.require import dashed as _dashed
from hacl_megatron.config.checks.require import require as _require
from hacl_megatron.config.checks.sections import check_sections
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.console import notify
from hacl_megatron.config.flags import TEMPERATURE_RANGE
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import check_lora
from hacl_megatron.config.parser import GROUPS
from hacl_megatron.config.run import RunConfig

EVAL_TASKS = ("preference", "retrieval")
"""What `--eval-tasks` may name."""


# Closed intervals, except that `above(x)` and `below(x)` leave x out.
def above(bound: float) -> float:
    return math.nextafter(bound, math.inf)


def below(bound: float) -> float:
    return math.nextafter(bound, -math.inf)


_FINITE = below(math.inf)
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size",
            "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "make_vocab_size_divisible_by",
            "distributed_timeout_minutes", "model_max_length", "num_workers", "io_threads", "prefetch_steps",
            "max_image_pixels", "max_skipped_steps", "micro_batch_size", "micro_batch_tokens", "queue_size",
            "global_batch_size", "train_iters", "exit_interval", "eval_iters", "log_interval", "world_size",
            "save_retain", "save_keep_interval", "profile_step_start", "profile_step_end", "lora_rank",
        ),
        (1, _FINITE),
    ),
    **dict.fromkeys(
        (
            "contrastive_weight", "preference_weight", "generation_weight", "lr", "min_lr", "connector_lr", "vision_lr",
            "heads_lr", "weight_decay", "clip_grad", "eval_interval", "save_interval", "shuffle_block",
            "dry_run_rank", "hang_timeout", "profile_ranks", "data_cache_gb",
        ),
        (0, _FINITE),
    ),
    "max_bad_fraction": (0, 1),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "lr_warmup_fraction", "contrastive_warmup_fraction", "lora_dropout"),
        (0, below(1)),
    ),
    **dict.fromkeys(
        (
            "adam_eps", "num_train_epochs", "exit_duration_in_mins", "data_weights", "lora_alpha", "preference_beta",
            "hallucination_weight",
        ),
        (above(0), _FINITE),
    ),
    "preference_label_smoothing": (0, below(0.5)),
    "initial_temperature": TEMPERATURE_RANGE,
    "seed": (0, 2**32 - 1),
}  # fmt: skip
"""Smallest and largest value of every number among the flags; None, where a flag takes it, is always well."""


def check_flags(config: RunConfig, world_size: int, *, files: bool = True) -> Layout:
    """Check everything that the flags alone decide, and divide the processes and the batch.

    Without `files` (a plan, a dry run) data, weights and output folders need not be there.

    Three settings are changed in place, each with a line for the user: over a single tensor-parallel rank sequence
    parallelism is switched off and `--vision-parallel` left out, and bf16 switches the distributed optimiser on.

    Raises:
        ValueError: one line for the first mistake found.
    """
    check_places(config)
    _check_limits(config)
    layout = Layout.of(config, world_size)
    if config.model.bf16 and not config.parallel.use_distributed_optimizer:
        # megatron-core's other mixed-precision optimiser cannot save an fp32 parameter (temperature) beside bf16 ones.
        config.parallel.use_distributed_optimizer = True
        notify("--use-distributed-optimizer is switched on: --bf16 needs it to keep the temperature in fp32.")
    _check_parallelism(config)
    _check_length(config)
    _check_rates(config)
    _check_contrast(config)
    _check_losses(config)
    _check_profile(config, layout)
    check_lora(config.lora)
    if files:
        check_inputs(config)
        check_outputs(config)
    if config.model.mm_projector_type is not None:
        connector_depth(config.model.mm_projector_type)  # or a ValueError for an unknown one
    if config.parallel.sequence_parallel and layout.tp == 1:
        config.parallel.sequence_parallel = False
        notify(
            "--sequence-parallel is switched off: --tensor-model-parallel-size is 1, there is nothing to split over."
        )
    if config.parallel.vision_parallel is not None and layout.tp == 1:
        notify(
            f"--vision-parallel {config.parallel.vision_parallel} is left out: --tensor-model-parallel-size is 1, each "
            "rank runs the whole tower."
        )
        config.parallel.vision_parallel = None
    check_sections(config)
    return layout


# ---------------------------------------------------------------------------------------------------------------- flags


def _check_limits(config: RunConfig) -> None:
    flags: dict[str, Any] = {}
    for group in GROUPS:
        flags.update(vars(getattr(config, group)))
    for name, (low, high) in LIMITS.items():
        values = flags[name] if isinstance(flags[name], list) else [flags[name]]
        value = next((value for value in values if not (value is None or low <= value <= high)), None)
        if value is None:  # none is outside; what is no number would be
            continue
        if high == _FINITE:
            expected = f"more than {low:.0f}" if low == above(0) else f"at least {low}"
        else:
            expected = f"{low} <= value < 1" if high == below(1) else f"{low} <= value <= {high}"
        raise ValueError(f"{_dashed(name)} is {value}, expected {expected}; change it")


def _check_parallelism(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.overlap_param_gather:
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            _require(getattr(parallel, name), "--overlap-param-gather is given alone", f"add {_dashed(name)}")
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        _require(
            getattr(parallel, name) is None or parallel.pipeline_model_parallel_size > 1,
            f"{_dashed(name)} is given, but --pipeline-model-parallel-size is 1",
            "leave it out, or give more stages",
        )


def _check_length(config: RunConfig) -> None:
    training = config.training
    _require(
        (training.train_iters is None) != (training.num_train_epochs is None),
        "both --train-iters and --num-train-epochs are given"
        if training.train_iters
        else "neither --train-iters nor --num-train-epochs is given",
        "give exactly one of them",
    )
    _require(
        training.eval_interval == 0 or bool(config.data.valid_data_path),
        f"--eval-interval is {training.eval_interval}, but there is nothing to validate on",
        "give --valid-data-path, or --eval-interval 0",
    )
    for task in training.eval_tasks:
        _require(task in EVAL_TASKS, f"--eval-tasks {task} is unknown", f"expected {' or '.join(EVAL_TASKS)}")
    training.eval_tasks = list(dict.fromkeys(training.eval_tasks))
    _require(
        not training.eval_tasks or training.eval_interval > 0,
        "--eval-tasks is given, but --eval-interval is 0",
        "say how often to validate, or leave it out",
    )


def _check_rates(config: RunConfig) -> None:
    _require(
        config.optimizer.vision_lr is None or not config.model.freeze_ViT,
        "--vision-lr is given, but the vision tower is frozen",
        "add --freeze-ViT false, or leave it out",
    )
    rates, min_lr = _rates(config), config.optimizer.min_lr
    for name, rate in rates.items():
        _require(
            min_lr <= rate,
            f"--min-lr {min_lr} is above {_dashed(name)} {rate}",
            "the schedule decays from the one to the other: lower --min-lr",
        )
    _require(
        not config.optimizer.clip_heads_apart or config.optimizer.clip_grad > 0,
        "--clip-heads-apart is given with --clip-grad 0",
        "nothing would be clipped: leave it out, or give --clip-grad a norm",
    )
    trains = {
        "lr": not config.language_model_is_constant,
        "connector_lr": True,
        "vision_lr": not config.model.freeze_ViT,
        "heads_lr": config.objective.contrastive_weight > 0,
    }
    _require(
        any(rates[name] > 0 for name, part_trains in trains.items() if part_trains),
        "nothing would train: the learning rate of every part that is not frozen is 0",
        "raise --lr, --connector-lr, --vision-lr or --heads-lr",
    )


def _rates(config: RunConfig) -> dict[str, float]:
    """Peak learning rates by flag, defaults filled in."""
    optimizer = config.optimizer
    given = {name: getattr(optimizer, name) for name in ("lr", "connector_lr", "vision_lr", "heads_lr")}
    return {name: optimizer.lr if rate is None else rate for name, rate in given.items()}


def _check_contrast(config: RunConfig) -> None:
    training = config.training
    if config.objective.contrastive_negatives == "micro-batch":
        for name in ("micro_batch_tokens", "balance_micro_batches"):
            _require(
                not getattr(training, name),
                f"{_dashed(name)} is given with --contrastive-negatives micro-batch",
                "it would change which pairs are negatives of each other: leave it out, or use global-batch",
            )
    if config.objective.hallucination_weight != 1:
        _require(
            config.objective.hallucination_negatives != "none",
            "--hallucination-weight is given with --hallucination-negatives none",
            "there is nothing to weigh: leave it out, or use own or all",
        )
        _require(
            config.objective.contrastive_weight > 0,
            "--hallucination-weight is given with --contrastive-weight 0",
            "there is nothing to weigh: leave it out, or give the contrast a weight",
        )
    _require(
        training.micro_batch_tokens is None or training.micro_batch_size == 1,
        f"both --micro-batch-size {training.micro_batch_size} and --micro-batch-tokens are given",
        "give one of them",
    )


def _check_losses(config: RunConfig) -> None:
    flags = config.preference
    _require(
        bool(config.losses_that_train),
        "nothing would train: --generation-weight and --contrastive-weight are 0, and there is no --preference-loss "
        "with a --preference-weight",
        "give one of the losses a weight",
    )
    _require(
        flags.reference_scores is None or flags.has_reference,
        f"--reference-scores is given with --preference-loss {flags.preference_loss}",
        "only dpo and mdpo have a reference: leave it out",
    )
    _require(
        flags.has_reference or not flags.preference_label_smoothing,
        f"--preference-label-smoothing is given with --preference-loss {flags.preference_loss}",
        "only dpo and mdpo have it: leave it out",
    )
    if flags.preference_loss == "none" and flags.preference_weight not in (0, 1):
        notify(f"--preference-weight {flags.preference_weight:g} weighs nothing: --preference-loss is none.")


def _check_profile(config: RunConfig, layout: Layout) -> None:
    logging, length = config.logging, config.training.train_iters
    start, end = logging.profile_step_start, logging.profile_step_end
    for name, given, other in (("end", end, start), ("start", start, end)):
        _require(
            given is not None or other is None,
            f"--profile-step-{'start' if name == 'end' else 'end'} is given alone",
            f"add --profile-step-{name}",
        )
    if start is None:
        return
    _require(
        start < end,
        f"--profile-step-start {start} is not before --profile-step-end {end}",
        "the trace holds the iterations from the one up to the other: raise the end",
    )
    _require(
        length is None or start <= length,
        f"--profile-step-start {start} is behind the last of {length} iterations",
        "nothing would be traced: lower it",
    )
    _require(
        bool(logging.tensorboard_dir or config.checkpoint.save),
        "--profile-step-start is given without a folder to write the trace to",
        "add --save or --tensorboard-dir",
    )
    for rank in logging.profile_ranks:
        _require(
            rank < layout.world_size,
            f"--profile-ranks {rank}: there are {layout.world_size} processes",
            f"expected ranks below {layout.world_size}",
        )
