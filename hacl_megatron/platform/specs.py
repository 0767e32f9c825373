"""Layer specs: megatron-core's own, with this project's attention (and, without Transformer Engine, norms) put in."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from hacl_megatron.platform.accelerators import layer_library
from hacl_megatron.platform.attention import PackedAttention
from hacl_megatron.platform.last_layer import LastLayer, LastSelfAttention, ReadRowsLinear
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
        attention = spec.submodules.self_attention
        attention.module = LastSelfAttention
        if attention.submodules.linear_qkv is ColumnParallelLinear:  # Transformer Engine's is left as it is
            attention.submodules.linear_qkv = ReadRowsLinear
        return spec


def _layer_spec(
    device: torch.device,
    dtype: torch.dtype,
    mask: AttnMaskType,
    norm: type,
    normalization: str,
    *,
    separate_norms: bool = False,
    norms_queries_and_keys: bool = False,
) -> LayerSpec:
    if layer_library(device, dtype) == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
        norm = TENorm
        if separate_norms:
            _separate_norms(spec, norm)
    else:
        spec = get_gpt_layer_local_spec(normalization=normalization)
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention
    attention.params = {**attention.params, "attn_mask_type": mask}
    attention.submodules.core_attention = PackedAttention
    if norms_queries_and_keys:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    return LayerSpec(spec, norm)


def _separate_norms(spec: ModuleSpec, norm: type) -> None:
    """Transformer Engine's layers with the norms on their own, under the names that checkpoints have for them."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    mlp = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, partial) else layer.mlp.submodules  # from 0.19 on
    mlp.linear_fc1 = TEColumnParallelLinear
    layer.sharded_state_dict_keys_map = {
        **layer.sharded_state_dict_keys_map,
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


def language_layer_spec(
    device: torch.device, dtype: torch.dtype, *, separate_norms: bool = False, norms_queries_and_keys: bool = False
) -> LayerSpec:
    """A LLaMA layer: RMSNorm, causal attention within packed segments.

    Args:
        dtype: of the parameters.
        separate_norms: do not fuse a norm with the linear layer behind it, whose input is then to be had (LoRA).
        norms_queries_and_keys: each head's, by an RMSNorm with weights that all heads share (Qwen3).
    """
    return _layer_spec(
        device, dtype, AttnMaskType.causal, RMSNorm, "RMSNorm",
        separate_norms=separate_norms, norms_queries_and_keys=norms_queries_and_keys,
    )  # fmt: skip


def vision_layer_spec(device: torch.device, dtype: torch.dtype) -> LayerSpec:
    """A CLIP ViT layer: LayerNorm, attention without a mask."""
    return _layer_spec(device, dtype, AttnMaskType.no_mask, LayerNorm, "LayerNorm")
