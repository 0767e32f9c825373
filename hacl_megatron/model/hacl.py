"""The assembled model: one pipeline stage of vision tower -> connector -> LLaMA, with contrastive heads at the end.

The vision tower (megatron-core's or transformers') and connector (layers, or a Q-Former and a projection) stand on
the first stage, the heads and temperature on the last. Shape legend as in `hacl_megatron.batch`; H is the language
model's hidden size, T' = T / tensor-parallel size under sequence parallelism and T without it.

A micro-batch may come in two packs (`hacl_megatron.batch.MicroBatch`). The one that runs ahead leaves tower features
and EOS states of texts behind, which the main one takes instead of computing them again.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hacl_megatron.batch import PackedBatch, SegmentLengths
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.lora import Lora
from hacl_megatron.model.connector import Connector, table_of_features
from hacl_megatron.model.heads import ContrastiveHeads
from hacl_megatron.model.hf_parts import HFVisionTower, QFormerConnector
from hacl_megatron.model.init import cpu_generator
from hacl_megatron.model.llama import LlamaStage
from hacl_megatron.model.lora import lora_parameters
from hacl_megatron.model.vision import VisionTower
from hacl_megatron.platform.attention import packed_segments
from hacl_megatron.platform.context_parallel.gathered_parts import gathered_parts, own_part
from hacl_megatron.platform.context_parallel.placed_rows import placed_rows
from hacl_megatron.platform.device import to_device

TRAINED_PARTS = ("vision_tower", "connector", "language_model", "heads")

VIEWS_AT_ONCE = 32
"""Of pictures in tiles, through a frozen tower. A micro-batch may hold hundreds of views; a frozen tower keeps nothing
of them but features, and 32 views (18,464 rows of a ViT-L/14 at 336 pixels) keep a GPU busy: more at once would only
take more memory, 4.7 MB a view for the widest of that tower's activations in bf16."""


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the last pipeline stage hands to the objective."""

    logits: Tensor
    """[K + J, padded vocab / tp]: this tensor-parallel rank's logits of the target rows, then of the rejected ones. Of
    a share of the pack [K' + J', padded vocab / tp] (`RowShare.token_places`); all else is of the whole pack."""
    image_embeddings: Tensor
    """fp32 [N, hidden / 4], unit length; empty if the pack holds no images."""
    caption_embeddings: Tensor
    """fp32 [N, hidden / 4], unit length; empty if the pack holds no texts and was given none."""
    hallucinated_embeddings: Tensor
    """fp32 [M, hidden / 4], unit length; as the captions."""
    temperature: Tensor
    """fp32 [1], the parameter itself."""
    texts: "TextStates"
    """The states that the two text embeddings were made of."""


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """Final-norm hidden states at the EOS rows of texts."""

    captions: Tensor
    """[N, H]"""
    hallucinated: Tensor
    """[M, H]"""


class HaclModel(MegatronModule):
    """One pipeline stage. `forward` returns hidden states [T', 1, H], or `ModelOutput` on the last stage."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        language_config: TransformerConfig,
        vision_config: TransformerConfig | None,
        padded_vocab_size: int,
        initial_temperature: float,
        same_heads: bool = False,
        seed: int,
        device: torch.device,
        groups: ProcessGroupCollection,
        lora: Lora | None = None,
        shares_images: bool = False,
        recompute_tower: bool = False,
    ) -> None:
        """
        Args:
            shares_images: tensor-parallel ranks share images out; a tower of megatron-core is to be whole then.
            recompute_tower: backward runs each layer of transformers' tower once more; megatron-core's goes by its
                configuration.
        """
        super().__init__(language_config)
        self.model_type = ModelType.encoder_or_decoder  # what megatron-core's schedules ask for
        self.pre_process = groups.pp.rank() == 0
        self.post_process = groups.pp.rank() == groups.pp.size() - 1
        self.groups = groups
        self.shares_images = shares_images and groups.tp.size() > 1
        self.sequence_parallel = language_config.sequence_parallel
        self.image_size = model.vision.image_size
        self.has_tiles = model.tiles is not None
        # FP8 products want multiples of 32 rows, which the read ones are not.
        self.read_rows_only = not language_config.fp8
        dtype = language_config.params_dtype
        if self.pre_process:
            if model.vision.backend == "hf":
                self.vision_tower = HFVisionTower(
                    model, seed=seed + 2, dtype=dtype, device=device, recompute=recompute_tower
                )
            else:
                self.vision_tower = VisionTower(model, vision_config, device, groups)
            fresh = {"generator": cpu_generator(seed), "dtype": dtype}
            widths = model.vision.hidden_size, model.language.hidden_size
            if model.qformer is None:
                self.connector = Connector(model.projector_type, *widths, with_newline=self.has_tiles, **fresh)
            else:
                self.connector = QFormerConnector(model.qformer, widths[1], seed=seed + 3, device=device, **fresh)
        self.language_model = LlamaStage(
            model.language,
            language_config,
            padded_vocab_size=padded_vocab_size,
            device=device,
            groups=groups,
            pre_process=self.pre_process,
            post_process=self.post_process,
            lora=lora,
            seed=seed,
        )
        if self.post_process:
            self.heads = ContrastiveHeads(
                model.language.hidden_size,
                model.projection_size,
                temperature=initial_temperature,
                generator=cpu_generator(seed + 1),
                dtype=dtype,
                same_init=same_heads,
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

    def freeze(self, *, language_model: bool, vision_tower: bool, qformer: bool = False) -> None:
        """Take parts out of training. Must happen before the data-parallel wrap, which sizes its buffers by it.

        The language model's adapters, if it has any, train all the same.
        """
        if language_model:
            self.language_model.requires_grad_(False)
            for parameter in lora_parameters(self.language_model):
                parameter.requires_grad_(True)
        if vision_tower and self.pre_process:
            self.vision_tower.requires_grad_(False)
        if qformer and self.pre_process and isinstance(self.connector, QFormerConnector):
            self.connector.freeze_qformer()

    @property
    def vision_tower_is_trained(self) -> bool:
        return self.pre_process and next(self.vision_tower.parameters()).requires_grad

    @property
    def query_states_are_constant(self) -> bool:
        """Whether nothing trains up to a Q-Former's output, which then is what the model starts from."""
        qformer = isinstance(self.connector, QFormerConnector)
        return qformer and not self.vision_tower_is_trained and not self.connector.qformer_is_trained

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> features [I, F, vision hidden] of the tower; a constant if it is frozen.

        Where ranks share the views out, each gets the features of its own (`own_views`).

        Views of pictures in tiles go through a frozen tower `VIEWS_AT_ONCE`.

        Behind a tower and a Q-Former that are both frozen, the states [I, V, Q-Former hidden] of the query tokens: so
        what is kept for a second pass is as late, and as small, as it can be.

        Without images it is one blank image: every micro-batch must touch every trained parameter (megatron-core
        reduces gradients as they arrive), the connector behind this one among them.
        """
        if self.shares_images or self.groups.cp.size() > 1:
            own = self.own_views(pixel_values.shape[0])
            pixel_values = pixel_values[own.start : own.stop]
        if pixel_values.shape[0] == 0:
            pixel_values = pixel_values.new_zeros(1, 3, self.image_size, self.image_size)
        with nullcontext() if self.vision_tower_is_trained else torch.no_grad():
            if self.has_tiles and not self.vision_tower_is_trained:
                parts = [self.vision_tower(part) for part in pixel_values.split(VIEWS_AT_ONCE)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            features = self.vision_tower(pixel_values)
            return self.connector.query_states(features) if self.query_states_are_constant else features

    def own_views(self, number: int) -> range:
        """Which of a pack's views this rank's tower and connector see: as many as any other's, or one more or less.

        Context-parallel ranks share them out; of each one's part, if `shares_images`, its tensor-parallel ranks do.
        """
        views = range(number)[own_part(number, self.groups.cp)]
        return views[own_part(len(views), self.groups.tp)] if self.shares_images else views

    def _of_all_views(self, features: Tensor, number: int) -> Tensor:
        """Connector's output of this rank's views -> of all [I, V, H]."""
        if not self.shares_images and self.groups.cp.size() == 1:
            return features
        features = features[: len(self.own_views(number))]  # a blank image, where it has none, is left out
        places = torch.arange(number)[own_part(number, self.groups.cp)]
        if self.shares_images:
            features = gathered_parts(features, len(places), self.groups.tp)
        if self.groups.cp.size() == 1:
            return features
        # Whose gradients are summed over the ranks, for each has those of its own rows.
        return placed_rows(features, to_device(places, features.device), number, self.groups.cp)

    def parameters_of_own_images(self) -> list[nn.Parameter]:
        """What trains and has, on each tensor-parallel rank, the gradient of that rank's own images alone."""
        if not (self.shares_images and self.pre_process):
            return []
        parts = (*self.vision_tower.parameters(), *self.connector.parameters())
        newline = getattr(self.connector, "image_newline", None)  # laid in where all ranks have all images
        return [parameter for parameter in parts if parameter.requires_grad and parameter is not newline]

    def _embed(self, batch: PackedBatch, tower_features: Tensor | None) -> Tensor:
        """Token embeddings with image features laid over the image rows: [T', 1, H]."""
        # In the order of `__init__`, which is that in which `--overlap-param-gather` fetches updated parameters.
        features = None
        if torch.is_grad_enabled() or batch.image_rows.numel():
            if tower_features is None:
                tower_features = self.tower_features(batch.pixel_values)
            options = {"from_queries": True} if self.query_states_are_constant else {}
            features = self.connector(tower_features, **options)
            features = self._of_all_views(features, batch.num_images).flatten(0, 1)  # [I * V, H]
            if self.has_tiles:  # behind the connector's call, for which `--overlap-param-gather` fetches the newline
                newline = self.connector.image_newline
                features = table_of_features(features, newline, batch.pooled_rows, batch.pooled_weights)
        own = batch if batch.share is None else batch.share
        hidden = self.language_model.embed(own.token_ids)
        if features is not None:
            rows = features.index_select(0, own.feature_rows).to(hidden.dtype)
            hidden = hidden.squeeze(1).index_copy(0, own.image_rows, rows).unsqueeze(1)
        if self.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.groups.tp)
        return hidden

    def forward(
        self,
        batch: PackedBatch,
        lengths: SegmentLengths,
        *,
        tower_features: Tensor | None = None,
        texts: TextStates | Callable[[], TextStates] | None = None,
    ) -> Tensor | ModelOutput:
        """Run one pack through this stage.

        Args:
            lengths: the pack's, on the host.
            tower_features: what `tower_features` gave for this pack's images; None: compute it.
            texts: EOS states of the pairs' texts, for a pack that leaves the texts out; or what computes them, to be
                called when all before the heads is on its way, so that a GPU has work while the host launches it.
        """
        segments = packed_segments(batch, lengths, read_rows_only=self.read_rows_only)
        own = batch if batch.share is None else batch.share
        embedded = self._embed(batch, tower_features) if self.pre_process else None
        hidden = self.language_model(embedded, own.position_ids, segments)
        if not self.post_process:
            return hidden
        # The same on every tensor-parallel rank from here on, gradients included; the LM head sums its own input's.
        hidden = hidden.squeeze(1)

        def states(rows: Tensor) -> Tensor:
            return hidden.index_select(0, torch.searchsorted(own.read_rows, rows) if self.read_rows_only else rows)

        if batch.share is None:
            asked = batch.target_rows
            if batch.rejected_rows.numel():
                asked = torch.cat([asked, batch.rejected_rows])
            of_tokens = states(asked)

            def eos(kind: int) -> Tensor:
                return states(batch.eos_rows[kind])
        else:
            of_tokens, *of_eos = _wanted_of_all_ranks(states(batch.share.wanted_rows), batch)
            eos = of_eos.__getitem__
        logits = self.language_model.logits(of_tokens)
        if texts is None:
            texts = TextStates(captions=eos(1), hallucinated=eos(2))
        elif not isinstance(texts, TextStates):
            texts = texts()
        images, captions, hallucinated, temperature = self.heads(eos(0), texts.captions, texts.hallucinated)
        return ModelOutput(
            logits=logits,
            image_embeddings=images,
            caption_embeddings=captions,
            hallucinated_embeddings=hallucinated,
            temperature=temperature,
            texts=texts,
        )


def _wanted_of_all_ranks(own: Tensor, batch: PackedBatch) -> list[Tensor]:
    """States [W', H] of a share's wanted rows -> those that this rank makes logits of [K' + J', H], and on every rank
    all at the EOS rows of images, captions and hallucinated captions."""
    share, counts = batch.share, [rows.numel() for rows in batch.eos_rows]
    num_tokens = batch.num_targets + batch.rejected_rows.numel()
    whole = placed_rows(own, share.wanted_places, num_tokens + sum(counts), share.group)
    of_tokens, *of_eos = whole.split([num_tokens, *counts])
    # Copies, or all of the whole would be kept for the backward pass.
    return [of_tokens.index_select(0, share.token_places), *(states.clone() for states in of_eos)]
