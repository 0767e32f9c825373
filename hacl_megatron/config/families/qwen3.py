"""Qwen3: a LLaMA that norms each head's queries and keys; a head's width is stated, not derived."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families.llama import LLAMA
from hacl_megatron.config.families.qwen2 import QWEN2, read_qwen, write_qwen
from hacl_megatron.config.tensor_rows import row


def read_qwen3(parsed: Any, values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Where a config.json has no `head_dim` it is the class's own (128), whatever the number of heads."""
    return read_qwen(parsed, {**values, "head_dim": parsed.head_dim}, where)


def write_qwen3(language: LanguageConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {**write_qwen(language, tokens), "head_dim": language.head_dim, "attention_bias": False}


QWEN3 = replace(
    QWEN2,
    name="qwen3",
    title="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    llava_model_types=(),
    llava_architecture="",
    layer=(
        *LLAMA.layer[:2],
        row("self_attention.q_layernorm.weight", "replicated", ("self_attn.q_norm.weight", "d")),
        row("self_attention.k_layernorm.weight", "replicated", ("self_attn.k_norm.weight", "d")),
        *LLAMA.layer[2:],
    ),
    transformer={**LLAMA.transformer, "qk_layernorm": True},
    supported={**QWEN2.supported, "attention_bias": (False,)},
    read=read_qwen3,
    write=write_qwen3,
)
