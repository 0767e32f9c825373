"""Rows of the name table: our parameter, how tensor parallelism cuts it, and the Hugging Face tensors in it.

Language families and vision towers state theirs (`config.families`, `config.towers`); `checkpoint.hf.names` puts them
together. Shapes are written in letters, which stand for sizes:

    h  hidden size            q   rows of all query heads       v  vocabulary       p  side of a patch
    f  feed-forward width     kv  rows of all key-value heads   c  colours          n  positions of an image
    d  width of a head
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Partition = Literal["replicated", "class_token", "column", "row", "qkv", "gate_up", "vocab"]
"""How tensor parallelism cuts a parameter: not at all, on dim 0, on dim 1, or in one of the fused ways of
`checkpoint.hf.names`."""


class Source(NamedTuple):
    """One Hugging Face tensor."""

    name: str
    letters: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape, where each letter has that size."""
        return tuple(sizes[letter] for letter in self.letters.split())


class Row(NamedTuple):
    """One of our parameters; of a layer's, names begin behind the layer's number."""

    ours: str
    partition: Partition
    sources: tuple[Source, ...]
    """In the order in which a fused tensor takes them."""


def row(ours: str, partition: Partition, *sources: tuple[str, str]) -> Row:
    """A row from (name, letters) of each source."""
    return Row(ours, partition, tuple(Source(*source) for source in sources))
