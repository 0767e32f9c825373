"""Layer specs: megatron-core's own, with this project's attention (and, without Transformer Engine, norms) put in."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from hacl_megatron.platform.accelerators import layer_library
from hacl_megatron.platform.attention import PackedAttention
from hacl_megatron.platform.last_layer import LastLayer, LastSelfAttention
from hacl_megatron.platform.norms import LayerNorm, RMSNorm


@dataclass(frozen=True)
class LayerSpec:
    """What `TransformerBlock` needs: the spec of one layer and the class of a norm that stands alone."""

    layer: ModuleSpec
    norm: type

    @property
    def last_layer(self) -> ModuleSpec:
        """The same layer, computed for the rows that are read alone."""
        spec = deepcopy(self.layer)
        spec.module = LastLayer
        spec.submodules.self_attention.module = LastSelfAttention
        return spec


def _layer_spec(device: torch.device, mask: AttnMaskType, norm: type, normalization: str) -> LayerSpec:
    if layer_library(device) == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
        norm = TENorm
    else:
        spec = get_gpt_layer_local_spec(normalization=normalization)
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention
    attention.params = {**attention.params, "attn_mask_type": mask}
    attention.submodules.core_attention = PackedAttention
    return LayerSpec(spec, norm)


def language_layer_spec(device: torch.device) -> LayerSpec:
    """A LLaMA layer: RMSNorm, causal attention within packed segments."""
    return _layer_spec(device, AttnMaskType.causal, RMSNorm, "RMSNorm")


def vision_layer_spec(device: torch.device) -> LayerSpec:
    """A CLIP ViT layer: LayerNorm, attention without a mask."""
    return _layer_spec(device, AttnMaskType.no_mask, LayerNorm, "LayerNorm")
