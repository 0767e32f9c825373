"""Vision towers that run as transformers has them (`--vision-backend hf`), and how image features are taken of each.

model_type            features
clip_vision_model     hidden_states[select layer] without the class token     (LLaVA)
siglip_vision_model   hidden_states[select layer]; there is no class token
blip_2_vision_model   last_hidden_state, behind post_layernorm, class token kept   (BLIP-2, MiniGPT-4)
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TowerKind:
    """What the features of a kind of tower are."""

    model_class: str
    """Its class in transformers, whose output has `last_hidden_state`."""
    has_class_token: bool
    """The tower puts a class token in front of the patches."""
    keeps_class_token: bool = False
    """The connector gets it too."""
    final_norm: bool = False
    """Features are `last_hidden_state` behind the tower's last norm; else hidden states as the layers leave them."""
    unused: tuple[str, ...] = ()
    """Modules of the tower that no feature passes through; they are not built."""

    @property
    def fixed_select_layer(self) -> int | None:
        """The only `--mm-vision-select-layer` that there is; None: any."""
        return -1 if self.final_norm else None


TOWERS: dict[str, TowerKind] = {
    "clip_vision_model": TowerKind(
        model_class="CLIPVisionModel", has_class_token=True, unused=("post_layernorm",)
    ),
    "siglip_vision_model": TowerKind(
        model_class="SiglipVisionModel", has_class_token=False, unused=("post_layernorm", "head")
    ),
    "blip_2_vision_model": TowerKind(
        model_class="Blip2VisionModel", has_class_token=True, keeps_class_token=True, final_norm=True
    ),
}  # fmt: skip
"""By transformers' `model_type`."""


HF_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""Sizes among the fields of `VisionConfig`, and what transformers' configurations call them."""


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
