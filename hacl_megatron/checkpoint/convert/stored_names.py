"""Under which key of a distributed checkpoint one of our parameters is stored.

megatron-core stacks the layers of a block along a new first dim and stores a layer's norms under the linear layer that
follows them, where Transformer Engine fuses them:

    language_model.decoder.layers.3.input_layernorm.weight
    → row 3 of language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight
"""

import re

from hacl_megatron.checkpoint.hf.names import FUSED_NORMS

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"
_LAYER = re.compile(r"(.*\.decoder\.layers\.)(\d+)\.(.*)")


def stored_name(ours: str) -> tuple[str, int | None]:
    """(key, row of its first dim if layers are stacked there), as conversions and most runs have it."""
    return possible_names(ours)[0]


def possible_names(ours: str) -> list[tuple[str, int | None]]:
    """What `stored_name` says, then what other layouts and versions of megatron-core write instead."""
    if not (match := _LAYER.fullmatch(ours)):
        return [(ours, None)]
    block, layer, rest = match.groups()
    names = [*(theirs for theirs, name in FUSED_NORMS.items() if name == rest), rest]
    return [(block + name, int(layer)) for name in names] + [(f"{block}{layer}.{name}", None) for name in names]
