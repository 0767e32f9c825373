"""Qwen2 and Qwen2.5: a LLaMA whose queries, keys and values have biases."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families.llama import LLAMA, read_llama, write_llama
from hacl_megatron.config.tensor_rows import row


def read_qwen(parsed: Any, values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """As LLaMA's; ValueError where a layer's window slides, which none does in the published models."""
    kinds = set(getattr(parsed, "layer_types", None) or ())
    if parsed.use_sliding_window or kinds - {"full_attention"}:
        raise ValueError(
            f"{where}: use_sliding_window is {parsed.use_sliding_window!r}, layer_types are {sorted(map(str, kinds))}; "
            "this trainer supports full attention only"
        )
    return read_llama(parsed, values, where)


def write_qwen(language: LanguageConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA's keys without those that say which layers have biases: the class does. A head's width is derived."""
    derived = {"attention_bias", "mlp_bias"} | ({"head_dim"} if language.kv_channels is None else set())
    values = {key: value for key, value in write_llama(language, tokens).items() if key not in derived}
    return {**values, "use_sliding_window": False}


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    title="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    llava_model_types=("llava_qwen",),
    llava_architecture="LlavaQwenForCausalLM",
    layer=(
        *LLAMA.layer[:2],
        row("self_attention.linear_qkv.bias", "qkv",
            ("self_attn.q_proj.bias", "q"), ("self_attn.k_proj.bias", "kv"), ("self_attn.v_proj.bias", "kv")),
        *LLAMA.layer[2:],
    ),
    transformer={**LLAMA.transformer, "add_qkv_bias": True},
    special_tokens={"bos_token_id": None, "eos_token_id": None},
    supported={key: LLAMA.supported[key] for key in ("hidden_act", "attention_dropout", "quantization_config")},
    read=read_qwen,
    write=write_qwen,
)  # fmt: skip
