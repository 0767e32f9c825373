"""The CLIP vision tower, tensor parallel, cut behind the layer that the connector reads."""

import torch
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
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, device: torch.device, groups: ProcessGroupCollection
    ) -> None:
        spec = vision_layer_spec(device, config.params_dtype)
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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> patch features [I, V, vision hidden], without the class token."""
        return super().forward(pixel_values.to(self.conv1.weight.dtype))[:, 1:]
