"""The assembled model: one pipeline stage of vision tower -> connector -> LLaMA, with contrastive heads at the end.

The vision tower and connector live on the first stage, the heads and temperature on the last. Shape legend as in
`hacl_megatron.batch`; H is the language model's hidden size, T' = T / tensor-parallel size under sequence
parallelism and T without it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hacl_megatron.batch import PackedBatch
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.model.connector import Connector
from hacl_megatron.model.heads import ContrastiveHeads
from hacl_megatron.model.init import cpu_generator
from hacl_megatron.model.llama import LlamaStage
from hacl_megatron.model.vision import VisionTower
from hacl_megatron.platform.attention import packed_segments

TRAINED_PARTS = ("vision_tower", "connector", "language_model", "heads")


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the last pipeline stage hands to the objective."""

    logits: Tensor
    """[K, padded vocab / tp]: this tensor-parallel rank's logits of the target rows."""
    image_embeddings: Tensor
    """fp32 [N, hidden / 4], unit length."""
    caption_embeddings: Tensor
    """fp32 [N, hidden / 4], unit length."""
    hallucinated_embeddings: Tensor
    """fp32 [M, hidden / 4], unit length."""
    temperature: Tensor
    """fp32 [1], the parameter itself."""


class HaclModel(MegatronModule):
    """One pipeline stage. `forward` returns hidden states [T', 1, H], or `ModelOutput` on the last stage."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        language_config: TransformerConfig,
        vision_config: TransformerConfig,
        padded_vocab_size: int,
        initial_temperature: float,
        seed: int,
        device: torch.device,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(language_config)
        self.model_type = ModelType.encoder_or_decoder  # what megatron-core's schedules ask for
        self.pre_process = groups.pp.rank() == 0
        self.post_process = groups.pp.rank() == groups.pp.size() - 1
        self.groups = groups
        self.sequence_parallel = language_config.sequence_parallel
        self.image_size = model.vision.image_size
        dtype = language_config.params_dtype
        if self.pre_process:
            self.vision_tower = VisionTower(model, vision_config, device, groups)
            self.connector = Connector(
                model.projector_type,
                model.vision.hidden_size,
                model.language.hidden_size,
                generator=cpu_generator(seed),
                dtype=dtype,
            )
        self.language_model = LlamaStage(
            model.language,
            language_config,
            padded_vocab_size=padded_vocab_size,
            device=device,
            groups=groups,
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process:
            self.heads = ContrastiveHeads(
                model.language.hidden_size,
                model.projection_size,
                temperature=initial_temperature,
                generator=cpu_generator(seed + 1),
                dtype=dtype,
            )
        self.to(device)

    # megatron-core looks these up on the outermost module.
    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.language_model.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor] | None) -> None:
        """Hidden states [T', 1, H] from the previous stage (megatron-core's schedules pass a list of one)."""
        if isinstance(input_tensor, list | tuple):
            (input_tensor,) = input_tensor
        self.language_model.set_input_tensor(input_tensor)

    def freeze(self, *, language_model: bool, vision_tower: bool) -> None:
        """Take parts out of training. Must happen before the data-parallel wrap, which sizes its buffers by it."""
        if language_model:
            self.language_model.requires_grad_(False)
        if vision_tower and self.pre_process:
            self.vision_tower.requires_grad_(False)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> language-model inputs [I, V, H]."""
        trained = next(self.vision_tower.parameters()).requires_grad
        if pixel_values.shape[0] == 0:
            # Every micro-batch must touch every trained parameter (megatron-core reduces gradients as they arrive),
            # so a batch without images runs one blank image and keeps nothing of it.
            blank = pixel_values.new_zeros(1, 3, self.image_size, self.image_size)
            return self.connector(self._tower_features(blank, trained))[:0]
        return self.connector(self._tower_features(pixel_values, trained))

    def _tower_features(self, pixel_values: Tensor, trained: bool) -> Tensor:
        with nullcontext() if trained else torch.no_grad():
            return self.vision_tower(pixel_values)

    def _embed(self, batch: PackedBatch) -> Tensor:
        """Token embeddings with image features laid over the image rows: [T', 1, H]."""
        hidden = self.language_model.embed(batch.token_ids)
        features = self.image_features(batch.pixel_values).flatten(0, 1)  # [I * V, H]
        rows = features.index_select(0, batch.feature_rows).to(hidden.dtype)
        hidden = hidden.squeeze(1).index_copy(0, batch.image_rows, rows).unsqueeze(1)
        if self.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.groups.tp)
        return hidden

    def forward(self, batch: PackedBatch, segment_lengths: tuple[int, ...]) -> Tensor | ModelOutput:
        """Run one micro-batch through this stage. `segment_lengths` are `cu_seqlens` differences on the host."""
        segments = packed_segments(batch.cu_seqlens, segment_lengths)
        hidden = self.language_model(self._embed(batch) if self.pre_process else None, batch.position_ids, segments)
        if not self.post_process:
            return hidden
        if self.sequence_parallel:
            # What follows is the same on every tensor-parallel rank (the LM head sums its own input gradient), so
            # each rank takes its slice of one gradient back, and nothing is summed here.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        hidden = hidden.squeeze(1)
        logits = self.language_model.logits(hidden.index_select(0, batch.target_rows))
        images, captions, hallucinated, temperature = self.heads(
            hidden.index_select(0, batch.image_eos_rows),
            hidden.index_select(0, batch.caption_eos_rows),
            hidden.index_select(0, batch.hallucinated_eos_rows),
        )
        return ModelOutput(
            logits=logits,
            image_embeddings=images,
            caption_embeddings=captions,
            hallucinated_embeddings=hallucinated,
            temperature=temperature,
        )
