"""Kinds of vision towers, a file each; a new one is registered here and stands in no other place.

model_type            features
clip_vision_model     hidden_states[select layer] without the class token     (LLaVA)
siglip_vision_model   hidden_states[select layer]; there is no class token
dinov2                hidden_states[select layer] without the class token; registers, where it has some, are kept
blip_2_vision_model   last_hidden_state, behind post_layernorm, class token kept   (BLIP-2, MiniGPT-4)
"""

from hacl_megatron.config.towers.blip2 import BLIP2
from hacl_megatron.config.towers.clip import CLIP
from hacl_megatron.config.towers.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from hacl_megatron.config.towers.siglip import SIGLIP
from hacl_megatron.config.towers.tower import (
    TOWERS,
    MegatronTower,
    TowerKind,
    instead_of,
    register_tower,
    tower_kind,
    tower_of_whole,
    tower_origins,
)

__all__ = [
    "BLIP2", "CLIP", "DINOV2", "DINOV2_WITH_REGISTERS", "SIGLIP", "TOWERS", "MegatronTower", "TowerKind",
    "instead_of", "register_tower", "tower_kind", "tower_of_whole", "tower_origins",
]  # fmt: skip

register_tower(CLIP)
register_tower(SIGLIP)
register_tower(DINOV2)
register_tower(DINOV2_WITH_REGISTERS)
register_tower(BLIP2)
