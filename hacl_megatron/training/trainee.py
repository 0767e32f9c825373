"""What is trained: a module with parts frozen, wrapped for data parallelism, with its optimiser and schedule.

The order matters: weights are loaded and parts frozen before the data-parallel wrap sizes its gradient buffers, and the
optimiser is built last, around the wrapped parameters.
"""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.sections import megatron_fields, refusals_of
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.objective.queue import NegativeQueue
from hacl_megatron.platform.host_groups import Groups
from hacl_megatron.training.optimizer.image_gradients import finalize_shared_image_grads
from hacl_megatron.training.optimizer.schedule import build_optimizer, build_scheduler, optimizer_config


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The model being trained, with what updates it. One per process."""

    module: HaclModel
    """This rank's pipeline stage."""
    model: DistributedDataParallel
    """The same, wrapped: gradients are reduced over data-parallel ranks."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    queue: NegativeQueue | None
    """Earlier pairs, on the last pipeline stage of a run with `--contrastive-negatives queue`."""
    has_queue: bool
    """Whether the last stage has one."""
    groups: Groups

    def gather_parameters(self) -> None:
        """Make every rank's parameters the updated ones: with `--overlap-param-gather` the next forward pass would.

        Every data-parallel rank must call it.
        """
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def gather_image_parameters(self) -> None:
        """The same for what only images go through, ahead of a pass that leaves it out where a pack has none.

        Gathers begin as modules are called, and ranks must begin them in one order, whatever their packs hold.
        """
        if not (self.model.ddp_config.overlap_param_gather and self.module.pre_process):
            return
        for part in (self.module.vision_tower, self.module.connector):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    self.model.param_to_bucket_group[parameter].finish_param_sync()


def build_trainee(module: HaclModel, config: RunConfig, train_iters: float) -> Trainee:
    """Freeze, wrap and give `module` its optimiser and a schedule over `train_iters` steps (`RunLength.steps`)."""
    flags, groups = config.model, module.groups
    module.freeze(
        language_model=config.language_model_is_frozen, vision_tower=flags.freeze_ViT, qformer=flags.freeze_qformer
    )
    model = DistributedDataParallel(module.config, data_parallel_config(config), module, pg_collection=groups)
    optimizer = build_optimizer(model, config.optimizer, optimizer_config(config))
    _connect_schedule(module.config, model)
    model.train()
    return Trainee(
        module=module,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, train_iters),
        queue=build_queue(module, config),
        has_queue=config.objective.contrastive_negatives == "queue",
        groups=groups,
    )


def check_configurations(config: RunConfig) -> None:
    """Have megatron-core check its configurations before anything is built.

    Raises:
        ValueError: one line for the first thing it has against them.
    """
    data_parallel_config(config)
    optimizer_config(config)


def data_parallel_config(config: RunConfig) -> DistributedDataParallelConfig:
    """How gradients are reduced over data-parallel ranks."""
    parallel = config.parallel
    fields = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # a non-finite step is skipped and counted, not fatal
    )
    with refusals_of("ddp"):
        return DistributedDataParallelConfig(**{**fields, **megatron_fields("ddp", config.ddp)})


def build_queue(module: HaclModel, config: RunConfig) -> NegativeQueue | None:
    """An empty queue of negatives where the heads are, if the flags ask for one."""
    if config.objective.contrastive_negatives != "queue" or not module.post_process:
        return None
    heads = module.heads
    return NegativeQueue(
        config.objective.queue_size, heads.text_projector.out_features, device=heads.temperature.device
    )


def _connect_schedule(transformer: TransformerConfig, model: DistributedDataParallel) -> None:
    """Tell megatron-core's pipeline schedules how gradients are finished and when they may be reduced."""
    shares_images = model.module.shares_images
    transformer.finalize_model_grads_func = finalize_shared_image_grads if shares_images else finalize_model_grads
    if model.ddp_config.overlap_grad_reduce:
        transformer.no_sync_func = model.no_sync
