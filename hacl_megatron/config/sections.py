"""YAML sections whose entries are handed to megatron-core: `transformer:`, `ddp:` and `optimizer:`.

Any field of the three dataclasses can be set but those that a flag, the checkpoint or the trainer owns: two places for
one setting would contradict each other sooner or later. megatron-core is imported only when a section is not empty.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from hacl_megatron.config.console import quiet_imports
from hacl_megatron.config.names import did_you_mean
from hacl_megatron.config.typed_yaml import convert, underscored

SECTIONS = {
    "transformer": "megatron.core.transformer.transformer_config.TransformerConfig",
    "ddp": "megatron.core.distributed.distributed_data_parallel_config.DistributedDataParallelConfig",
    "optimizer": "megatron.core.optimizer.optimizer_config.OptimizerConfig",
}

_ARCHITECTURE = "the checkpoint (or the `model:` section) says it"
_TRAINER = "the trainer sets it, because its loss depends on it"
_FOR_NOW = "it is not supported for now"
_DENSE = "the language model is a dense LLaMA"

OWNED: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer": {
        "use --tensor-model-parallel-size": ("tensor_model_parallel_size",),
        "use --pipeline-model-parallel-size": ("pipeline_model_parallel_size",),
        "use --sequence-parallel": ("sequence_parallel",),
        "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers": (
            "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
        ),
        "use --bf16": ("bf16", "fp16", "params_dtype", "pipeline_dtype", "enable_autocast", "autocast_dtype"),
        "use --device": ("transformer_impl", "use_cpu_initialization"),
        _ARCHITECTURE: (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias",
            "gated_linear_unit", "glu_linear_offset", "activation_func", "activation_func_clamp_value",
            "rotary_interleaved", "no_rope_freq", "mrope_section", "qk_layernorm", "qk_l2_norm", "softmax_scale",
            "softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate", "multi_latent_attention",
            "experimental_attention_variant", "apply_residual_connection_post_layernorm", "is_hybrid_model",
            "heterogeneous_block_specs", "mtp_num_layers",
        ),
        _TRAINER: (
            "variable_seq_lengths", "calculate_per_token_loss", "moe_token_dispatcher_type", "timers",
            "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func",
        ),
        _FOR_NOW: (
            "context_parallel_size", "hierarchical_context_parallel_sizes", "hybrid_context_parallel", "cp_comm_type",
            "max_seqlen_per_dp_cp_rank", "virtual_pipeline_model_parallel_size", "microbatch_group_size_per_vp_stage",
        ),
        _DENSE: ("num_moe_experts", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    },
    "ddp": {
        "use --overlap-grad-reduce": ("overlap_grad_reduce",),
        "use --overlap-param-gather": ("overlap_param_gather",),
        "use --use-distributed-optimizer": ("use_distributed_optimizer",),
        _TRAINER: ("average_in_collective", "gradient_reduce_div_fusion"),
        _FOR_NOW: (
            "num_distributed_optimizer_instances", "use_megatron_fsdp", "use_custom_fsdp",
            "data_parallel_sharding_strategy", "outer_dp_sharding_strategy", "fsdp_double_buffer",
        ),
    },
    "optimizer": {
        "use --lr": ("lr",),
        "use --min-lr": ("min_lr",),
        "use --connector-lr and --heads-lr": ("decoupled_lr", "decoupled_min_lr"),
        "use --weight-decay": ("weight_decay", "decoupled_weight_decay"),
        "use --clip-grad": ("clip_grad",),
        "use --adam-beta1": ("adam_beta1",),
        "use --adam-beta2": ("adam_beta2",),
        "use --adam-eps": ("adam_eps",),
        "use --bf16": ("bf16", "fp16", "params_dtype"),
        "use --use-distributed-optimizer": ("use_distributed_optimizer",),
        "use --overlap-param-gather": ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        "use --log-num-zeros-in-grad": ("log_num_zeros_in_grad",),
        "this trainer's optimiser is Adam": ("optimizer",),
        _TRAINER: ("timers",),
    },
}  # fmt: skip
"""For each section: what to do instead, and the fields it is said of."""


@cache
def field_hints(section: str) -> dict[str, Any]:
    """Public fields of a section's megatron-core dataclass and their types, as the installed version has them."""
    module, _, name = SECTIONS[section].rpartition(".")
    with quiet_imports():
        record = getattr(importlib.import_module(module), name)
        hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record) if not field.name.startswith("_")}


def sections_with(name: str) -> list[str]:
    """Sections that take a field of this name."""
    return [section for section in SECTIONS if name in field_hints(section) and _owner(section, name) is None]


def check_section(section: str, values: Any, where: str) -> dict[str, Any]:
    """The section with underscores in its keys and its values as YAML has them, all of them checked.

    Raises:
        ValueError: naming `where`, for an unknown field (with the nearest ones), one that is set elsewhere, or a value
            of another type.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: found {values!r} under {section!r}, expected a mapping of megatron-core's fields")
    values = underscored(values, where)
    for name, value in values.items():
        if (owner := _owner(section, name)) is not None:
            raise ValueError(f"{where}: {section}.{name} cannot be set here; {owner}")
        hints = field_hints(section)
        if name not in hints:
            free = [field for field in hints if _owner(section, field) is None]
            record = SECTIONS[section].rpartition(".")[2]
            advice = did_you_mean(name, free, f"see megatron-core's {record}")
            raise ValueError(f"{where}: {record} has no field {name!r}; {advice}")
        try:
            _convert_field(section, name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {section}.{name}: {error}") from None
    return values


def megatron_fields(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked section as arguments of its megatron-core dataclass: names become enum members and dtypes."""
    return {name: _convert_field(section, name, value) for name, value in values.items()}


def _convert_field(section: str, name: str, value: Any) -> Any:
    return convert(value, field_hints(section)[name])


def _owner(section: str, name: str) -> str | None:
    """What to use instead of this field, if it is set elsewhere."""
    return next((owner for owner, names in OWNED[section].items() if name in names), None)
