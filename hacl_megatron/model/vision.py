"""The CLIP vision tower, tensor parallel, cut behind the layer that the connector reads."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.platform.specs import vision_layer_spec


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class VisionTower(CLIPViTModel):
    """megatron-core's CLIP ViT with as many layers as `mm_vision_select_layer` needs.

    Its configuration is its own: no sequence parallelism (577 rows do not divide) and one pipeline stage, for it
    stands whole on the first stage of the language model.

    Where the configuration has one tensor-parallel rank and `groups` more, each has the whole tower, the same on all.
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, device: torch.device, groups: ProcessGroupCollection
    ) -> None:
        spec = vision_layer_spec(device, config.params_dtype)
        replicas = groups.tp if config.tensor_model_parallel_size == 1 < groups.tp.size() else None
        groups = groups if replicas is None else _alone(groups)
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[spec.layer] * config.num_layers),
            ln_pre_impl=spec.norm,
            patch_dim=model.vision.patch_size,
            img_h=model.vision.image_size,
            img_w=model.vision.image_size,
            pg_collection=groups,
        )
        self.to(config.params_dtype)  # megatron-core builds the patch convolution in fp32 whatever the dtype
        self._replicas = replicas
        if replicas is not None:
            self.to(device)
            self._make_replica()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> patch features [I, V, vision hidden], without the class token."""
        return super().forward(pixel_values.to(self.conv1.weight.dtype))[:, 1:]

    @torch.no_grad()
    def _make_replica(self) -> None:
        """Random weights are those of the first rank; no parameter counts as one of a divided tensor."""
        for parameter in self.parameters():
            parameter.tensor_model_parallel = False  # else the gradients' norm would count it once a rank
            if not parameter.is_meta:
                dist.broadcast(parameter, dist.get_global_rank(self._replicas, 0), group=self._replicas)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """megatron-core's, in which one of the replicas is the first."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._replicas is not None:
            for sharded in nested_values(state):
                first, _, last = sharded.replica_id
                sharded.replica_id = (first, self._replicas.rank(), last)
        return state


def _alone(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The same groups, but this rank has no other to divide tensors with: nothing is ever sent in that group."""
    own = copy.copy(groups)
    own.tp = dist.new_group(ranks=[dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return own
