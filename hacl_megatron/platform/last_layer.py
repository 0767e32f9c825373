"""The last LLaMA layer, computed for the rows that are read: its keys and values for all, the rest for those alone.

What the objective reads of the last layer are target and EOS rows; of a long image prompt that is a small part. Rows
are read from a segment's first one to its end (`PackedBatch.read_rows`), and the layer returns those rows only.

The layer works on gathered rows: under sequence parallelism a rank's part of the read rows would be uneven.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from hacl_megatron.platform.attention import PackedSegments


class LastLayer(TransformerLayer):
    """Hidden states [T', 1, H] (T' = T / tensor-parallel size under sequence parallelism) -> [Q, 1, H]."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        self.input_is_split = config.sequence_parallel
        super().__init__(without_sequence_parallel(config), *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        *_unused: Any,
        rotary_pos_emb: Tensor | None,
        packed_seq_params: PackedSegments,
        **_unused_too: Any,
    ) -> tuple[Tensor, None]:
        if self.input_is_split:
            # What follows is the same on every tensor-parallel rank, gradients included: each takes its part of one.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        read = packed_seq_params.read_rows
        residual = hidden_states if read is None else hidden_states.index_select(0, read)
        attention = self.self_attention(
            self.input_layernorm(hidden_states), rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            hidden_states = add(attention, residual, self.hidden_dropout)
        return self._forward_mlp(hidden_states), None


class LastSelfAttention(SelfAttention):
    """Keys and values of all rows, queries of those that are read."""

    def forward(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, packed_seq_params: PackedSegments
    ) -> tuple[Tensor, Tensor | None]:
        read = packed_seq_params.read_rows
        query, key, value = self._project(hidden_states, read)
        if rotary_pos_emb is not None:
            key = apply_rotary_pos_emb(key, rotary_pos_emb, config=self.config)
            read_emb = rotary_pos_emb if read is None else rotary_pos_emb.index_select(0, read)
            query = apply_rotary_pos_emb(query, read_emb, config=self.config)
        context = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params.of_read_rows())
        return self.linear_proj(context)

    def _project(self, hidden_states: Tensor, read: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 1, H] -> query [Q, 1, h, d], key and value [T, 1, g, d]."""
        width, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        widths = self.num_attention_heads_per_partition // groups * width, width, width
        if read is not None and isinstance(self.linear_qkv, ReadRowsLinear):
            query, key, value = self.linear_qkv(hidden_states, read, widths)[0]
        else:
            # Transformer Engine's layer holds the norm too and cannot be cut: queries of all rows, most thrown away.
            mixed = self.linear_qkv(hidden_states)[0].unflatten(-1, (groups, sum(widths)))
            query, key, value = mixed.split(widths, dim=-1)
            if read is not None:
                query = query.index_select(0, read)
        query = query.flatten(-2).unflatten(-1, (-1, width))
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value


class ReadRowsLinear(tensor_parallel.ColumnParallelLinear):
    """`linear_qkv` whose queries may be wanted of some rows alone.

    The product is this module's own forward pass, so that whatever stands before and behind a layer's call has its
    turn: `--overlap-param-gather` waits for the layer's updated weight, LoRA adds its part.
    """

    def forward(
        self, hidden: Tensor, read: Tensor | None = None, widths: Sequence[int] | None = None
    ) -> tuple[Tensor | tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """[T, 1, H] -> what its base class gives, or with `read` (queries [Q, 1, g, q], keys and values [T, 1, g, d]).

        Args:
            read: int64 [Q]: rows of which the queries are wanted.
            widths: q and twice d: of each of g groups of heads the weight has so many rows of queries, keys, values.
        """
        if read is None:
            return super().forward(hidden)
        query_width, width, _ = widths
        weight, bias = self.weight.unflatten(0, (-1, sum(widths))), self.bias
        of_query = of_pairs = None
        if bias is not None:
            of_query, of_pairs = (
                part.flatten() for part in bias.unflatten(0, (-1, sum(widths))).split([query_width, 2 * width], dim=1)
            )
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        query = F.linear(hidden.index_select(0, read), weight[:, :query_width].flatten(0, 1), of_query)
        pairs = F.linear(hidden, weight[:, query_width:].flatten(0, 1), of_pairs).unflatten(-1, (-1, 2 * width))
        return (query.unflatten(-1, (-1, query_width)), *pairs.split([width, width], dim=-1)), None


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """The same configuration for a layer whose input is already gathered (the last layer, the LM head)."""
    return replace(config, sequence_parallel=False) if config.sequence_parallel else config
