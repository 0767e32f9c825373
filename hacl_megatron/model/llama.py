"""One pipeline stage of a LLaMA on megatron-core: embedding, layers, final norm, LM head, as the stage has them.

Shape legend: T packed rows, T' = T or, under sequence parallelism, T / tensor-parallel size; H hidden size.
"""

import math
from dataclasses import replace

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.lora import Lora
from hacl_megatron.model.lora import add_lora
from hacl_megatron.platform.attention import PackedSegments, rotates_itself
from hacl_megatron.platform.last_layer import without_sequence_parallel
from hacl_megatron.platform.specs import language_layer_spec


def rotary_inverse_frequencies(language: LanguageConfig) -> Tensor:
    """Inverse frequencies [head_dim / 2], fp32, scaled as the configuration says.

    Source: transformers `modeling_rope_utils`. Llama-3's (`_compute_llama3_parameters`, from Meta's `apply_scaling`):
    long wavelengths are divided by `factor`, short ones kept, those between blended linearly. YaRN
    (`_compute_yarn_parameters`) does so by the number of turns within the original context. Dynamic scaling changes
    nothing up to `max_position_embeddings`, beyond which no sample goes.
    """
    dim, base = language.head_dim, language.rotary_base
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    scaling = language.rope_scaling
    if scaling is None or scaling["rope_type"] == "dynamic":
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "yarn":
        low, high = (
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (high == low)
        blend = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


class LlamaStage(LanguageModule):
    """The layers of this pipeline stage, with the embedding on the first and norm and LM head on the last."""

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        *,
        padded_vocab_size: int,
        device: torch.device,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        lora: Lora | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config, groups)
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = language.tie_word_embeddings
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocab_size,
                max_sequence_length=language.max_position_embeddings,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,  # image features are laid in first, over all rows
                tp_group=groups.tp,
            )
        spec = language_layer_spec(
            device, config.params_dtype, separate_norms=lora is not None, norms_queries_and_keys=config.qk_layernorm
        )
        layers = [spec.layer] * num_layers_on_stage(config, groups)
        if post_process:
            layers[-1] = spec.last_layer
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=spec.norm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
        )
        if post_process:
            # The last layer hands on gathered rows, so every tensor-parallel rank has this norm's whole gradient.
            for parameter in self.decoder.final_layernorm.parameters():
                parameter.sequence_parallel = False
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                # megatron-core's own layer, whose fused weight gradients would need Apex.
                config=replace(without_sequence_parallel(config), gradient_accumulation_fusion=False),
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self.has_lora = lora is not None
        if lora is not None:
            add_lora(self.decoder, language, lora, seed=seed, groups=groups)
        self.register_buffer("inverse_frequencies", rotary_inverse_frequencies(language), persistent=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] -> embeddings [T, 1, H] of all rows."""
        return self.embedding(input_ids=token_ids.unsqueeze(0), position_ids=None)

    def forward(self, hidden: Tensor | None, position_ids: Tensor, segments: PackedSegments) -> Tensor:
        """Embeddings [T', 1, H] (None behind the first stage) through this stage's layers.

        Returns [T', 1, H], on the last stage [Q, 1, H]: the read rows, gathered under sequence parallelism.
        """
        angles = position_ids.float().unsqueeze(1) * self.inverse_frequencies  # [T, head_dim / 2]
        if self.has_lora and hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # a checkpointed layer gives its parameters gradients only then
        if rotates_itself(angles.device):
            rotary = None
            segments = replace(segments, rotary=(angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)))
        else:
            rotary = torch.cat((angles, angles), dim=-1)[:, None, None, :]  # [T, 1, 1, head_dim]
        return self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=segments
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [K, H], equal on all tensor-parallel ranks -> this rank's logits [K, padded vocab / tp].

        The gradient of `hidden` is summed over tensor-parallel ranks by the layer.
        """
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden.unsqueeze(1), weight=weight)[0].squeeze(1)

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        self.decoder.set_input_tensor(input_tensor)


def num_layers_on_stage(config: TransformerConfig, groups: ProcessGroupCollection) -> int:
    """LLaMA layers that this pipeline stage holds, uneven splits included."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return get_num_layers_to_build(config, None, groups.pp.rank())
