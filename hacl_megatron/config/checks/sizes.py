"""How large a model may say it is: beyond lies a damaged or hostile file, which would take forever to list."""

from typing import Any

LARGEST = {
    1_000: ("num_layers", "num_hidden_layers", "mlp_ratio"),
    16_384: (
        "num_attention_heads", "num_key_value_heads", "num_query_groups", "num_query_tokens", "image_size",
        "patch_size", "num_channels", "cross_attention_frequency", "num_labels", "shortest_edge",
        "num_register_tokens",
    ),
    1 << 20: ("hidden_size", "mm_hidden_size", "encoder_hidden_size", "projection_dim", "head_dim", "kv_channels"),
    1 << 24: ("intermediate_size", "ffn_hidden_size", "vocab_size", "image_seq_length"),
    1 << 30: ("max_position_embeddings",),
}  # fmt: skip
"""Limit -> sizes it holds for, by transformers' names and ours: some eight times what is published, at least."""
LIMITS = {name: limit for limit, names in LARGEST.items() for name in names}
ANY = (1 << 53) - 1
"""Of every other whole number: what floating point, and so any reader of JSON, has exactly."""


def check_sizes(values: Any, where: object) -> None:
    """ValueError for the first size beyond all bounds in a configuration, at any depth of its lists and objects.

    Args:
        where: what is named in the message, the file.
    """
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        for key, size in value.items():
            if isinstance(size, dict | list):
                waiting.append(size)
            elif isinstance(size, bool) or not isinstance(size, int | float):  # transformers says what it expects there
                continue
            elif key in LIMITS:
                if not 1 <= size <= LIMITS[key]:
                    raise ValueError(
                        f"{where}: {key} is {_short(size)}; expected a whole number of 1 to {LIMITS[key]:,}: correct it"
                    )
            elif isinstance(size, int) and abs(size) > ANY:
                raise ValueError(f"{where}: {str(key)[:80]} is {_short(size)}; expected at most {ANY:,}: correct it")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
