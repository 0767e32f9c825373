"""Builds what a run needs from its configuration: process groups, model, optimiser, schedule, loaders.

The order matters: weights are loaded and parts frozen before the data-parallel wrap sizes its gradient buffers, and the
optimiser is built last, around the wrapped parameters.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hacl_megatron.checkpoint.choose import agree_on_checkpoint
from hacl_megatron.checkpoint.hf_import import load_adapter, load_hf_weights
from hacl_megatron.checkpoint.hf_to_sharded import drawn_by_conversion
from hacl_megatron.checkpoint.sharded import find_checkpoint, load_checkpoint
from hacl_megatron.checkpoint.sharded_reader import read_run_config
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.architecture_checks import padded_vocab_size
from hacl_megatron.config.flags import ModelFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import Lora, is_lora
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.sections import megatron_fields
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.model.transformer_configs import language_transformer_config, vision_transformer_config
from hacl_megatron.objective.queue import NegativeQueue
from hacl_megatron.training.schedule import build_optimizer, build_scheduler


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
    groups: ProcessGroupCollection

    def gather_parameters(self) -> None:
        """Make every rank's parameters the updated ones: with `--overlap-param-gather` the next forward pass would.

        Every data-parallel rank must call it.
        """
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)


def pad_multiple(config: RunConfig) -> int:
    """Packs are padded to a multiple of this: what sequence parallelism splits, and the 32 rows of FP8 products."""
    parallel = config.parallel
    rows = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return rows * 32 if config.transformer.get("fp8") else rows


def initialize_parallelism(config: RunConfig, layout: Layout) -> ProcessGroupCollection:
    """Create megatron-core's process groups and seed every rank's generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def build_module(
    config: RunConfig, architecture: ModelConfig, layout: Layout, groups: ProcessGroupCollection, device: torch.device
) -> HaclModel:
    """This rank's stage with initial weights, nothing loaded, frozen or wrapped yet."""
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    return HaclModel(
        architecture,
        language_config=language_transformer_config(
            architecture,
            config.parallel,
            device=device,
            dtype=dtype,
            overrides=megatron_fields("transformer", config.transformer),
        ),
        vision_config=vision_transformer_config(architecture, config.parallel, device=device, dtype=dtype),
        padded_vocab_size=padded_vocab_size(architecture.language.vocab_size, config.parallel),
        initial_temperature=config.objective.initial_temperature,
        same_heads=config.objective.heads_init == "same",
        seed=config.training.seed,
        device=device,
        groups=groups,
        lora=Lora.of(config.lora),
    )


def parts_of_transformers(flags: ModelFlags, architecture: ModelConfig) -> list[str]:
    """A line for the user on each part that transformers builds."""
    vision, qformer = architecture.vision, architecture.qformer
    lines = []
    if vision.backend == "hf":
        lines.append(
            f"vision tower: transformers' {vision.hf['model_type']}, {'frozen' if flags.freeze_ViT else 'trained'}, "
            "whole on every tensor-parallel rank, without dropout"
        )
    if qformer is not None:
        lines.append(
            f"connector: Q-Former of {qformer.num_query_tokens} query tokens an image, "
            f"{'frozen' if flags.freeze_qformer else 'trained'}, without dropout; its projection trains"
        )
    return lines


def load_pretrained(module: HaclModel, config: RunConfig, architecture: ModelConfig, layout: Layout) -> str:
    """Fill `module` from `--pretrained-checkpoint` and `--pretrain-mm-mlp-adapter`; returns a line for the user."""
    source, own, has_lora = config.model.pretrained_checkpoint, None, False
    lines = []
    if source is None:
        lines.append("random weights")
    elif (own := find_checkpoint(Path(source))) is not None:
        agree_on_checkpoint(own, fallback=False, flag="--pretrained-checkpoint")  # or say which file is cut
        # Extra states are FP8 scales: Transformer Engine's alone, and of the optimiser's kind, so they start fresh.
        has_lora = read_run_config(own).lora.lora_rank is not None
        # What no Hugging Face file held starts by this run's --seed and flags, as from the Hugging Face folder itself.
        drawn = drawn_by_conversion(own)

        def starts_fresh(name: str) -> bool:
            return name.endswith("_extra_state") or (is_lora(name) and not has_lora) or name in drawn

        state = module.sharded_state_dict(metadata={})
        wanted = {name: part for name, part in state.items() if not starts_fresh(name)}
        found = module.load_state_dict(load_checkpoint({"model": wanted}, own)["model"], strict=False)
        assert all(starts_fresh(name) for name in found.missing_keys) and not found.unexpected_keys, found
        lines.append(f"weights from {own}" + (f"; fresh: {', '.join(drawn)}" if drawn else ""))
    else:
        report = load_hf_weights(
            module,
            source,
            architecture,
            tp_rank=module.groups.tp.rank(),
            tp_size=layout.tp,
            layer_offset=get_transformer_layer_offset(module.config, None, module.groups.pp.rank()),
            padded_vocab_size=padded_vocab_size(architecture.language.vocab_size, config.parallel),
            adapter=config.model.pretrain_mm_mlp_adapter,
        )
        lines.append(report.summary())
    adapter = config.model.pretrain_mm_mlp_adapter
    if adapter is not None and (source is None or own is not None):
        load_adapter(module, adapter, architecture)
        lines.append(f"connector from {adapter}")
    if (lora := Lora.of(config.lora)) is not None:
        lines.append(f"{lora}, {'from there too' if has_lora else 'fresh'}")
    return "; ".join(lines)


def build_trainee(
    module: HaclModel, config: RunConfig, groups: ProcessGroupCollection, device: torch.device, train_iters: int
) -> Trainee:
    """Freeze, wrap and give `module` its optimiser and schedule."""
    parallel = config.parallel
    flags = config.model
    module.freeze(
        language_model=config.language_model_is_frozen, vision_tower=flags.freeze_ViT, qformer=flags.freeze_qformer
    )
    ddp_fields = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # a non-finite step is skipped and counted, not fatal
    )
    model = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(**{**ddp_fields, **megatron_fields("ddp", config.ddp)}),
        module,
        pg_collection=groups,
    )
    optimizer = build_optimizer(
        model,
        config.optimizer,
        dtype=module.config.params_dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        log_num_zeros=config.logging.log_num_zeros_in_grad,
        groups=groups,
        overrides=megatron_fields("optimizer", config.optimizer_overrides),
    )
    _connect_schedule(module.config, model)
    model.train()
    return Trainee(
        module=module,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, train_iters),
        queue=build_queue(module, config, device),
        has_queue=config.objective.contrastive_negatives == "queue",
        groups=groups,
    )


def build_queue(module: HaclModel, config: RunConfig, device: torch.device) -> NegativeQueue | None:
    """An empty queue of negatives where the heads are, if the flags ask for one."""
    if config.objective.contrastive_negatives != "queue" or not module.post_process:
        return None
    return NegativeQueue(config.objective.queue_size, module.heads.text_projector.out_features, device=device)


def _connect_schedule(transformer: TransformerConfig, model: DistributedDataParallel) -> None:
    """Tell megatron-core's pipeline schedules how gradients are finished and when they may be reduced."""
    transformer.finalize_model_grads_func = finalize_model_grads
    if model.ddp_config.overlap_grad_reduce:
        transformer.no_sync_func = model.no_sync
