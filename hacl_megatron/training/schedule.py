"""Optimiser, parameter groups, learning-rate schedule and the temperature's clamp, on megatron-core's optimisers."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from hacl_megatron.config.flags import OptimizerFlags
from hacl_megatron.objective.contrastive import clamp_temperature_

_OWN_KEYS = ("params", "lr", "step")  # of a parameter group: what a checkpoint restores


def build_optimizer(
    model: DistributedDataParallel,
    flags: OptimizerFlags,
    *,
    dtype: torch.dtype,
    use_distributed_optimizer: bool,
    overlap_param_gather: bool,
    log_num_zeros: bool,
    groups: ProcessGroupCollection,
    overrides: dict[str, Any],
) -> MegatronOptimizer:
    """Adam over the trained parameters of `model`, in groups by weight decay and peak rate.

    No weight decay on biases, 1-dim parameters and the temperature (Megatron's rule). A rank without trained
    parameters gets an optimiser that steps nothing and still takes part in the gradient norm.
    """
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
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
        log_num_zeros_in_grad=log_num_zeros,
    )
    config = OptimizerConfig(**{**fields, **overrides})
    optimizer = get_megatron_optimizer(
        config, [model], config_overrides=_group_overrides(flags), use_gloo_process_groups=False
    )
    for inner in _inner_optimizers(optimizer):
        inner.register_step_post_hook(_clamp_temperature)
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
    if flags.heads_lr is not None:
        overrides[named("heads", lambda p, name: "heads." in name)] = {"max_lr": flags.heads_lr}
    return overrides


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


@torch.no_grad()
def _clamp_temperature(inner: torch.optim.Optimizer, args, kwargs) -> None:
    # The group holds the fp32 value that the optimiser just stepped (or this rank's shard of it, maybe empty), before
    # megatron-core copies or gathers it into the model.
    for group in inner.param_groups:
        if group.get("is_temperature"):
            for parameter in group["params"]:
                clamp_temperature_(parameter)


def group_settings(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Each parameter group's settings (rates, weight decay, marks), in order."""
    return [
        {key: value for key, value in group.items() if key not in _OWN_KEYS}
        for inner in _inner_optimizers(optimizer)
        for group in inner.param_groups
    ]


def restore_group_settings(optimizer: MegatronOptimizer, settings: Sequence[dict[str, Any]]) -> None:
    """Put `group_settings` back after a checkpoint was loaded.

    megatron-core 0.16.1 matches saved to present groups by weight decay and kind alone, so groups that differ in their
    rate only come back with each other's. And a resumed run follows the rates it was started with, not the saved.
    """
    groups = [group for inner in _inner_optimizers(optimizer) for group in inner.param_groups]
    for group, saved in zip(groups, settings, strict=True):
        group.update(saved)


def build_scheduler(optimizer: MegatronOptimizer, flags: OptimizerFlags, train_iters: int) -> OptimizerParamScheduler:
    """Linear warm-up over `lr_warmup_fraction` of the iterations, then decay to `min_lr` at the last. Unit: steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        lr_warmup_steps=int(flags.lr_warmup_fraction * train_iters),
        lr_decay_steps=train_iters,
        lr_decay_style=flags.lr_decay_style,
        start_wd=flags.weight_decay,
        end_wd=flags.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def default_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate that the groups without a rate of their own follow, for the log."""
    rates = [group["lr"] for group in optimizer.param_groups if group.get("default_config")]
    return rates[0] if rates else optimizer.param_groups[0]["lr"] if optimizer.param_groups else 0.0
