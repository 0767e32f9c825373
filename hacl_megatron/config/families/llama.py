"""LLaMA 1 to 3, Vicuna among them: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families.family import LanguageFamily
from hacl_megatron.config.families.rotary import read_rotary, write_rotary
from hacl_megatron.config.tensor_rows import row

LAYER = (
    row("input_layernorm.weight", "replicated", ("input_layernorm.weight", "h")),
    row("self_attention.linear_qkv.weight", "qkv",
        ("self_attn.q_proj.weight", "q h"), ("self_attn.k_proj.weight", "kv h"), ("self_attn.v_proj.weight", "kv h")),
    row("self_attention.linear_proj.weight", "row", ("self_attn.o_proj.weight", "h q")),
    row("pre_mlp_layernorm.weight", "replicated", ("post_attention_layernorm.weight", "h")),
    row("mlp.linear_fc1.weight", "gate_up", ("mlp.gate_proj.weight", "f h"), ("mlp.up_proj.weight", "f h")),
    row("mlp.linear_fc2.weight", "row", ("mlp.down_proj.weight", "h f")),
)  # fmt: skip
OUTSIDE = (
    row("embedding.word_embeddings.weight", "vocab", ("embed_tokens.weight", "v h")),
    row("decoder.final_layernorm.weight", "replicated", ("norm.weight", "h")),
    row("output_layer.weight", "vocab", ("lm_head.weight", "v h")),
)


def read_llama(parsed: Any, values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Sizes under the names that transformers gives them in LLaMA and its relatives.

    Raises:
        ValueError: sizes that do not go together, or rotary positions that `rotary` does not know.
    """
    rotary_base, rope_scaling = read_rotary(values, where)
    heads, groups = parsed.num_attention_heads, parsed.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if parsed.hidden_size % 4:
        raise ValueError(f"{where}: hidden_size {parsed.hidden_size} is not a multiple of 4, as contrastive heads need")
    # Only what the file states counts: without `head_dim` the width follows from the number of heads.
    head_dim = values.get("head_dim")
    if head_dim is None and parsed.hidden_size % heads:
        raise ValueError(f"{where}: hidden_size {parsed.hidden_size} is not a multiple of num_attention_heads {heads}")
    if head_dim == parsed.hidden_size // heads and parsed.hidden_size % heads == 0:
        head_dim = None
    return {
        "num_layers": parsed.num_hidden_layers,
        "hidden_size": parsed.hidden_size,
        "ffn_hidden_size": parsed.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "vocab_size": parsed.vocab_size,
        "kv_channels": head_dim,
        "norm_epsilon": parsed.rms_norm_eps,
        "rotary_base": rotary_base,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": parsed.max_position_embeddings,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def write_llama(language: LanguageConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The way back from `read_llama`, and what LLaMA's configuration asks beside sizes."""
    return {
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_dim,
        "vocab_size": language.vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": language.tie_word_embeddings,
        **tokens,
        **write_rotary(language.rotary_base, language.rope_scaling),
    }


LLAMA = LanguageFamily(
    name="llama",
    title="LLaMA",
    model_type="llama",
    architecture="LlamaForCausalLM",
    llava_model_types=("llava_llama", "llava"),
    llava_architecture="LlavaLlamaForCausalLM",
    layer=LAYER,
    outside=OUTSIDE,
    transformer={"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False},
    supported={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0, 0.0, None),
        "quantization_config": (None,),
    },
    read=read_llama,
    write=write_llama,
)
