"""`LanguageFamily`, all that differs between families of language models, and the registry of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.tensor_rows import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageFamily:
    """Language models of one make: how Hugging Face has them, and what megatron-core builds of them.

    What all families share is `model.llama`: norms before attention and MLP, rotary positions, a gated MLP. A relative
    of LLaMA's is `dataclasses.replace(LLAMA, name=..., ...)` with what it has of its own.
    """

    name: str
    """`LanguageConfig.family`."""
    title: str
    """What people call one of them."""
    model_type: str
    """transformers' own, which also names its configuration class."""
    architecture: str
    """Class of the whole model in transformers, as its config.json has it."""
    llava_model_types: tuple[str, ...] = ()
    """`model_type`s of LLaVA's original layout around it, the first as it is written; none: there is no such layout."""
    llava_architecture: str = ""
    """Class of that whole model, where there is one."""

    layer: tuple[Row, ...]
    """Of one layer; Hugging Face's names begin behind `model.layers.N.`."""
    outside: tuple[Row, Row, Row]
    """Embedding, final norm and output layer; names begin behind `model.`, but for the output layer's."""
    transformer: Mapping[str, Any]
    """Fields of megatron-core's TransformerConfig that say how its layers compute, `add_qkv_bias` and `qk_layernorm`
    (RMSNorm of each head's queries and keys) among them."""

    special_tokens: Mapping[str, int | None] = field(default_factory=lambda: {"bos_token_id": 1, "eos_token_id": 2})
    """What its configuration class says of them where a config.json is silent; None: nothing."""
    supported: Mapping[str, tuple[Any, ...]]
    """What a key of its config.json must be, where it is there; the rest cannot be computed here."""
    read: Callable[[Any, Mapping[str, Any], Path], dict[str, Any]]
    """(parsed configuration of transformers, its JSON, file for errors) -> fields of `LanguageConfig` but `family`."""
    write: Callable[[LanguageConfig, Mapping[str, Any]], dict[str, Any]]
    """(sizes, token ids by their JSON keys) -> its JSON but `model_type` and `architectures`."""

    @property
    def norms_queries_and_keys(self) -> bool:
        return bool(self.transformer.get("qk_layernorm"))

    @property
    def embedding(self) -> str:
        """Hugging Face's name of the embedding."""
        return self.outside[0].sources[0].name

    @property
    def lm_head(self) -> str:
        """Hugging Face's name of the output layer, which stands outside of `model.`."""
        return self.outside[2].sources[0].name

    @property
    def modules(self) -> tuple[str, ...]:
        """Hugging Face's names of the modules inside `model.`."""
        return (self.embedding.partition(".")[0], "layers", self.outside[1].sources[0].name.partition(".")[0])


FAMILIES: dict[str, LanguageFamily] = {}
"""By name; filled by `register_family` in the order in which errors list them."""


def register_family(family: LanguageFamily) -> None:
    """Make a family known to conversions, training, planning and exports."""
    known = [name for other in FAMILIES.values() for name in (other.model_type, *other.llava_model_types)]
    assert family.name not in FAMILIES and family.model_type not in known, family.name
    FAMILIES[family.name] = family


def language_family(name: str) -> LanguageFamily:
    """The family of a `LanguageConfig`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"the model's language.family is {name!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_model_type(model_type: str | None) -> LanguageFamily | None:
    """The family whose models, or LLaVA's original layout around them, have that `model_type`; None for others."""
    for family in FAMILIES.values():
        if model_type in (family.model_type, *family.llava_model_types):
            return family
    return None
