"""`TowerKind`, all that differs between kinds of vision towers, and the registry of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from hacl_megatron.config.tensor_rows import Row, Source


class TowerSizes(Protocol):
    """`config.architecture.VisionConfig`, which looks kinds up, as far as a record here needs it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    norm_epsilon: float
    activation: str


SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""Sizes among the fields of `VisionConfig`, and what most of transformers' configurations call them."""
TRAITS = {"norm_epsilon": "layer_norm_eps", "activation": "hidden_act"}
"""The other fields that a configuration holds, likewise."""


BACKBONE_KEYS = ("out_features", "out_indices", "stage_names")
"""JSON of what transformers' backbones hand on: no tower is asked for it here, and it speaks of all layers."""


class FileName(NamedTuple):
    """A parameter that files of models call otherwise than transformers' module does.

    With `parts` above 1 it is the `part`-th of as many equal runs of the file's rows: a SwiGLU's gate, of gate and up.
    """

    pattern: str
    """Of its name in the module."""
    in_files: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronTower:
    """What megatron-core builds of a tower, cut over tensor-parallel ranks: `model.vision`."""

    layer: tuple[Row, ...]
    """Of one layer; Hugging Face's names begin behind its number."""
    outside: tuple[Row, ...]
    """Of everything else in it."""
    unused: tuple[Source, ...]
    """Hugging Face's tensors that no feature passes through, of whole towers."""
    activations: tuple[str, ...]
    """What `hidden_act` may be."""
    kept: Mapping[str, str]
    """Facts that a round trip needs and the tower does not: name in `ModelConfig.extra` -> JSON key."""
    write: Callable[[TowerSizes, Mapping[str, Any]], dict[str, Any]]
    """(sizes, `ModelConfig.extra`) -> its configuration's JSON."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerKind:
    """Vision towers of one make: how Hugging Face has them, and how image features are taken of them."""

    model_type: str
    """transformers' own of the tower alone."""
    model_class: str
    """Its class in transformers, whose output has `last_hidden_state`."""
    origin: str
    """What people call the models that it comes from."""
    title: str
    """What they call the tower."""
    part_of: tuple[str, ...] = ()
    """`model_type`s of the whole models that it may be taken out of."""
    with_qformer: bool = False
    """Those have a Q-Former behind it, which is taken along."""
    stands_in: tuple[Literal["llava", "blip-2", "original"], ...]
    """What can be exported with it: transformers' models of that `model_type`, LLaVA's original layout."""

    has_class_token: bool
    """The tower puts a class token in front of the patches."""
    keeps_class_token: bool = False
    """The connector gets it too."""
    registers: str | None = None
    """Its configuration's number of tokens between class token and patches, which the connector gets too."""
    final_norm: bool = False
    """Features are `last_hidden_state` behind the tower's last norm; else hidden states as the layers leave them."""
    num_outer_norms: int
    """Norms outside of layers that features pass through."""
    layer_scales: int = 0
    """Learned factors of a whole row in each layer (layer scale)."""
    gated: str | None = None
    """Its configuration's switch for SwiGLU: three products in the feed-forward part in place of two."""
    interpolates_positions: bool = False
    """It takes images of any size; that in its configuration is of its positions alone."""
    layers: str = "encoder.layers"
    """Its list of layers, as a module's name."""
    unused: tuple[str, ...] = ()
    """Modules and parameters of the tower that no feature passes through; they are not built."""
    without_unused: Mapping[str, Any] = field(default_factory=dict)
    """JSON values of a tower that lacks them, where it has such; an export without them says so."""

    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    """Sizes among the fields of `VisionConfig`, and what its configuration calls them."""
    derived: Mapping[str, Callable[[Mapping[str, Any]], int]] = field(default_factory=dict)
    """The other sizes, which follow from its configuration."""
    traits: Mapping[str, str] = field(default_factory=lambda: TRAITS)
    """The other fields that its configuration holds, likewise."""
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Towers that LLaVA's checkpoints name without describing them (`mm_vision_tower`), and their published JSON."""
    megatron: MegatronTower | None = None
    """What megatron-core builds of it, CLIP alone (`VisionConfig.kind`); None: it runs as transformers has it."""

    mean: tuple[float, float, float]
    """Of red, green and blue, where no image processor says."""
    std: tuple[float, float, float]
    """Likewise."""
    aspect_ratio: Literal["square", "stretch"]
    """`--image-aspect-ratio`, where no image processor says."""
    resizing_processor: str = "SiglipImageProcessor"
    """transformers' image processor that resizes both sides of an image (`stretch`) as this tower has it."""

    taken_for: Mapping[str, str] = field(default_factory=dict)
    """`model_type`s and image processors that are taken for its own and are not: what to do instead."""
    spellings: tuple[tuple[str, str], ...]
    """Patterns of names in the files of its own folder, and how the name table spells what they match."""
    ignored: tuple[tuple[str, str], ...] = ()
    """Patterns of names there that belong to other parts, and in words to which."""
    file_names: tuple[FileName, ...] = ()
    """Where files and transformers' module differ in a name, whatever version of transformers wrote them."""
    wrapper: str = "vision_model."
    """What stands before its names where other models hold it; transformers 5 reads without it too."""

    @property
    def fixed_select_layer(self) -> int | None:
        """The only `--mm-vision-select-layer` that there is; None: any."""
        return -1 if self.final_norm else None

    def file_name(self, parameter: str) -> FileName:
        """What files call a parameter of transformers' module; its own name where they do not differ."""
        for name in self.file_names:
            if match := re.fullmatch(name.pattern, parameter):
                return name._replace(in_files=match.expand(name.in_files))
        return FileName(parameter, parameter)

    @property
    def select_strategy(self) -> str:
        """LLaVA's `vision_feature_select_strategy`: `default` drops the class token, where there is one."""
        return "default" if self.has_class_token else "full"


TOWERS: dict[str, TowerKind] = {}
"""By transformers' `model_type`; filled by `register_tower` in the order in which errors list them."""


def register_tower(kind: TowerKind) -> None:
    """Make a kind of towers known to conversions, training, planning and exports."""
    assert kind.model_type not in TOWERS, kind.model_type
    TOWERS[kind.model_type] = kind


def tower_kind(model_type: str | None) -> TowerKind:
    """The entry of a transformers vision model.

    Raises:
        ValueError: there is none.
    """
    if model_type not in TOWERS:
        raise ValueError(
            f"the vision tower's model_type is {model_type!r}, which no features are known of; expected one of "
            f"{', '.join(TOWERS)}"
        )
    return TOWERS[model_type]


def tower_of_whole(model_type: str | None) -> TowerKind | None:
    """The kind of the tower inside a whole model of transformers, a CLIP or BLIP-2; None for other models."""
    return next((kind for kind in TOWERS.values() if model_type in kind.part_of), None)


def instead_of(name: str) -> str:
    """`: …`, what to do where a file names a `model_type` or an image processor that is taken for a known one."""
    return next((f": {kind.taken_for[name]}" for kind in TOWERS.values() if name in kind.taken_for), "")


def tower_origins() -> str:
    """`CLIP, SigLIP, DINOv2 or BLIP-2`, for errors and `--help`."""
    *others, last = dict.fromkeys(kind.origin for kind in TOWERS.values())
    return f"{', '.join(others)} or {last}"
