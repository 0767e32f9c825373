"""Mistral 7B and Nemo: a LLaMA, of which the first ones see a window that slides.

The window is not computed. It has no effect on samples that fit in it, and a `--model-max-length` beyond it is refused
(`config.checks.architecture`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families.llama import LLAMA, read_llama, write_llama


def read_mistral(parsed: Any, values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Where a config.json has no `sliding_window` it is the class's own (4096); null is none."""
    return {**read_llama(parsed, values, where), "sliding_window": parsed.sliding_window}


def write_mistral(language: LanguageConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA's keys without those for biases, which the class has none of."""
    values = {key: value for key, value in write_llama(language, tokens).items() if not key.endswith("_bias")}
    return {**values, "sliding_window": language.sliding_window}


MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    llava_model_types=("llava_mistral",),
    llava_architecture="LlavaMistralForCausalLM",
    supported={key: LLAMA.supported[key] for key in ("hidden_act", "attention_dropout", "quantization_config")},
    read=read_mistral,
    write=write_mistral,
)
