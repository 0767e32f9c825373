"""megatron-core `TransformerConfig`s of the two towers, from the architecture and the run's flags."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.families import language_family
from hacl_megatron.config.families.rotary import attention_factor
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.image_sharing import tower_ranks
from hacl_megatron.model.vision import ACTIVATIONS
from hacl_megatron.platform.accelerators import layer_library


def language_transformer_config(
    model: ModelConfig, parallel: ParallelFlags, *, device: torch.device, dtype: torch.dtype, overrides: dict[str, Any]
) -> TransformerConfig:
    """The language model's configuration. `overrides` are fields of the YAML's `transformer:` section."""
    language = model.language
    on_gpu = device.type == "cuda"
    has_te_layers = layer_library(device, dtype) == "transformer_engine"
    factor = attention_factor(language.rope_scaling)
    fields = dict(
        **language_family(language.family).transformer,
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.head_dim,
        layernorm_epsilon=language.norm_epsilon,
        # Queries and keys are turned whole, so YaRN's factor on both is its square on their products.
        softmax_scale=None if factor == 1 else factor**2 * language.head_dim**-0.5,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # packs differ in length from micro-batch to micro-batch
        batch_p2p_sync=False,  # waits for the device behind every exchange of two stages, for the sake of old torch
        moe_token_dispatcher_type="alltoall",  # megatron-core asks for it beside variable lengths; there is no MoE
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=True,  # on the CPU: `platform.cpu.kernels.swiglu`
        # Fusions that need CUDA, or torch.compile, which costs minutes on a CPU and gains nothing there.
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        # Transformer Engine's kernels: rotation in one pass over queries and keys each (row by row, by the angles of
        # that row, so positions may be any), and weight gradients added to DDP's fp32 buffer by the product itself.
        apply_rope_fusion=has_te_layers,
        gradient_accumulation_fusion=has_te_layers,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
    )
    return TransformerConfig(**{**fields, **overrides})


def vision_transformer_config(
    model: ModelConfig, parallel: ParallelFlags, *, device: torch.device, dtype: torch.dtype, recompute: bool = False
) -> TransformerConfig | None:
    """The vision tower's: tensor parallel unless ranks share images out, whole on its pipeline stage, never sequence
    parallel. None for a tower of transformers, which has its own. `recompute`: each layer, once more backward."""
    vision = model.vision
    if vision.backend == "hf":
        return None
    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_vision_layers_built,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tower_ranks(model, parallel),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        bias_activation_fusion=False,  # quick GELU has no fused form in megatron-core
        bias_dropout_fusion=device.type == "cuda",
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(recomputed if recompute else {}),
    )
