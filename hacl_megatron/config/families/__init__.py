"""Families of language models, a file each; a new one is registered here and stands in no other place.

A checkpoint's family is known by its `model_type` (`family_of_model_type`), a run's by `LanguageConfig.family`.
"""

from hacl_megatron.config.families.family import (
    FAMILIES,
    LanguageFamily,
    family_of_model_type,
    language_family,
    register_family,
)
from hacl_megatron.config.families.llama import LLAMA
from hacl_megatron.config.families.mistral import MISTRAL
from hacl_megatron.config.families.qwen2 import QWEN2
from hacl_megatron.config.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "LLAMA", "LanguageFamily", "family_of_model_type", "language_family", "register_family"]

register_family(LLAMA)
register_family(MISTRAL)
register_family(QWEN2)
register_family(QWEN3)
