"""Optimiser, parameter groups, learning-rate schedule and the temperature's clamp, on megatron-core's optimisers."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hacl_megatron.config.flags import ObjectiveFlags, OptimizerFlags, TrainingFlags
from hacl_megatron.config.layout import iterations_of_epochs
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.sections import megatron_fields, refusals_of
from hacl_megatron.objective.contrastive import clamp_temperature_
from hacl_megatron.training.optimizer.grad_norm import HEADS_APART


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """megatron-core's configuration of Adam, as flags and the YAML's `optimizer:` section say."""
    flags, dtype = config.optimizer, torch.bfloat16 if config.model.bf16 else torch.float32
    fields = dict(
        optimizer="adam",
        lr=flags.lr,
        min_lr=flags.min_lr,
        weight_decay=flags.weight_decay,
        adam_beta1=flags.adam_beta1,
        adam_beta2=flags.adam_beta2,
        adam_eps=flags.adam_eps,
        clip_grad=flags.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        log_num_zeros_in_grad=config.logging.log_num_zeros_in_grad,
    )
    with refusals_of("optimizer"):
        return OptimizerConfig(**{**fields, **megatron_fields("optimizer", config.optimizer_overrides)})


def build_optimizer(
    model: DistributedDataParallel, flags: OptimizerFlags, config: OptimizerConfig
) -> MegatronOptimizer:
    """Adam over the trained parameters of `model`, in groups by weight decay and peak rate.

    No weight decay on biases, 1-dim parameters and the temperature (Megatron's rule). A rank without trained
    parameters gets an optimiser that steps nothing and still takes part in the gradient norm.
    """
    optimizer = get_megatron_optimizer(
        config, [model], config_overrides=_group_overrides(flags), use_gloo_process_groups=False
    )
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, config)  # so that a run whose every step was skipped can be saved
        part.optimizer.register_step_post_hook(_clamp_temperature)
    return optimizer


def _group_overrides(flags: OptimizerFlags) -> dict[ParamKey, dict[str, Any]]:
    def named(label: str, test) -> ParamKey:
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=test))

    overrides: dict[ParamKey, dict[str, Any]] = {
        named("no weight decay", lambda p, name: p.dim() == 1 or name.endswith(".bias")): {"wd_mult": 0.0},
        named("temperature", lambda p, name: name.endswith("heads.temperature")): {"is_temperature": True},
    }
    if flags.connector_lr is not None:
        overrides[named("connector", lambda p, name: "connector." in name)] = {"max_lr": flags.connector_lr}
    if flags.vision_lr is not None:
        overrides[named("vision tower", lambda p, name: "vision_tower." in name)] = {"max_lr": flags.vision_lr}
    if flags.clip_heads_apart:
        overrides[named("heads apart", lambda p, name: "heads." in name)] = {HEADS_APART: True}
    if flags.heads_lr is not None:
        overrides[named("heads", lambda p, name: "heads." in name)] = {"max_lr": flags.heads_lr}
    return overrides


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core's optimisers around a torch optimiser each; none on a rank without trained parameters."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


@torch.no_grad()
def _clamp_temperature(inner: torch.optim.Optimizer, args, kwargs) -> None:
    # The group holds the fp32 value that the optimiser just stepped (or this rank's shard of it, maybe empty), before
    # megatron-core copies or gathers it into the model.
    for group in inner.param_groups:
        if group.get("is_temperature"):
            for parameter in group["params"]:
                clamp_temperature_(parameter)


@contextmanager
def groups_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, megatron-core tells this run's parameter groups apart whatever it is given to load; then all is put back.

    A resumed run follows the rates and decays that it was started with. And megatron-core cannot match the groups, not
    even with themselves when it allocates their state: by weight decay and kind alone (0.16.1), those that differ in
    their rate come back with each other's parameters or not at all; by all settings (0.19.2), a changed rate finds no
    group. So weight-decay factors number them for as long as the loading takes.
    """
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "step")} for group in _groups(optimizer)
    ]
    for index, group in enumerate(_groups(optimizer)):
        group["wd_mult"] = float(index)
    yield
    for group, own in zip(_groups(optimizer), settings, strict=True):
        group.update(own)


def without_groups(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded optimiser state dict to load, without this run's parameter groups, which may differ from the saved."""
    _inner_state(state).pop("param_groups", None)
    return state


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load a saved optimiser state dict, inside `groups_kept`; of its parameter groups only the step count is taken.

    Every group has made the same number of steps, but a fused Adam counts none in a group that is empty on the rank
    that saved it: the largest is right.
    """
    if not _groups(optimizer):  # a pipeline stage without trained parameters
        return
    inner = _inner_state(state)
    step = max(group.get("step", 0) for group in inner["param_groups"])
    inner["param_groups"] = _inner_state(optimizer.state_dict())["param_groups"]
    inner.setdefault("state", {})  # empty on a stage where nothing trains, and so not in the file
    optimizer.load_state_dict(state)
    for group in _groups(optimizer):
        group["step"] = step


def _groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    return [group for part in optimizer_parts(optimizer) for group in part.optimizer.param_groups]


def _inner_state(state: dict[str, Any]) -> dict[str, Any]:
    """The part of megatron-core's optimiser state dict that the wrapped torch optimiser knows."""
    return state.get("optimizer", state)


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """How far a run goes, and how its schedules (learning rate, lambda) count the way.

    A run of `--train-iters` counts iterations. One of `--num-train-epochs` counts samples, in steps of the batch that
    it began with, so that it goes on where it was at another batch size: stopped after 4 of 8 iterations of 8 samples
    and resumed at 16, it is at step 4 of 8, and each of the 2 iterations that are left makes 2 steps. All of these
    are whole numbers, and the rates the very same, while the batch is one size.
    """

    train_iters: int
    """The last iteration."""
    steps: float
    """Of the schedule, in all."""
    increment: float = 1
    """Steps of the schedule that an iteration makes."""
    position: float = 0
    """Steps of the schedule behind this run when it starts, skipped ones included."""
    samples_a_step: float | None = None
    """None where iterations are counted."""
    rate_scale: float = 1
    """What the steps that the saved learning rate has made are to be multiplied by."""

    @classmethod
    def of(
        cls,
        flags: TrainingFlags,
        *,
        num_samples: int,
        batch: int,
        iteration: int = 0,
        drawn: int = 0,
        samples_a_step: float | None = None,
    ) -> "RunLength":
        """For a run that starts after `iteration` iterations which drew `drawn` samples.

        Args:
            num_samples: of an epoch.
            batch: this run's global batch size.
            samples_a_step: as the checkpoint has it, None where that counted iterations or its writer knew no other
                way: their batch, or the mean of several, is a step then.
        """
        saved_position = iteration if samples_a_step is None else _quotient(drawn, samples_a_step)
        if flags.train_iters is not None:
            return cls(
                train_iters=max(flags.train_iters, iteration),
                steps=max(flags.train_iters, iteration),
                position=iteration,
                rate_scale=_quotient(iteration, saved_position) if iteration else 1,
            )
        if samples_a_step is None:
            samples_a_step = _quotient(drawn, iteration) if iteration else batch
        end = iterations_of_epochs(flags.num_train_epochs, num_samples, batch, done=iteration, drawn=drawn)
        return cls(
            train_iters=end,
            steps=_quotient(drawn + (end - iteration) * batch, samples_a_step),
            increment=_quotient(batch, samples_a_step),
            position=saved_position,
            samples_a_step=samples_a_step,
        )


def _quotient(dividend: float, divisor: float) -> float:
    """An int where it is whole."""
    return dividend / divisor if dividend % divisor else int(dividend // divisor)


def build_scheduler(optimizer: MegatronOptimizer, flags: OptimizerFlags, steps: float) -> OptimizerParamScheduler:
    """Linear warm-up over `lr_warmup_fraction` of the `steps`, then decay to `min_lr` at the last (`RunLength`)."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        lr_warmup_steps=int(flags.lr_warmup_fraction * steps),
        lr_decay_steps=steps,
        lr_decay_style=flags.lr_decay_style,
        start_wd=flags.weight_decay,
        end_wd=flags.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def contrastive_weight_at(flags: ObjectiveFlags, step: float, steps: float) -> float:
    """Lambda at a step of the schedule, counted from 1: over `contrastive_warmup_fraction` of them it rises.

    Geometrically, from a ten-thousandth. The heads learn meanwhile at their full rate, since Adam divides by the
    gradient's size; the connector hears of them once they know something and L_G has taught it the model's words.
    """
    warmup = int(flags.contrastive_warmup_fraction * steps)
    return flags.contrastive_weight * 10.0 ** min(0.0, 4.0 * (step / max(warmup, 1) - 1.0))


def default_learning_rate(scheduler: OptimizerParamScheduler) -> float:
    """What `--lr` comes to in the next step, for the log; also where every group that trains has a rate of its own."""
    return scheduler.get_lr({})


def load_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any], length: RunLength) -> str | None:
    """Go on from a saved schedule's position, by this run's flags; a line where that makes the learning rate jump."""
    before = copy(scheduler)
    vars(before).update((name, value) for name, value in saved.items() if name in vars(before))
    scheduler.load_state_dict({**saved, "num_steps": saved["num_steps"] * length.rate_scale})
    was, now = default_learning_rate(before), default_learning_rate(scheduler)
    if abs(now - was) <= 1e-6 * max(was, now):
        return None
    return (
        f"learning rate: the saved run's schedule stood at {was:.3g}, this run's stands at {now:.3g} in the same "
        f"place; it ends at iteration {length.train_iters}, by this run's rates and length"
    )
