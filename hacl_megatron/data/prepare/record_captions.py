"""The image-caption pairs of a record."""

from typing import NamedTuple


class Pair(NamedTuple):
    """An image of a record and its caption."""

    image: int
    """Which of the record's images, from 0."""
    caption: str
    """Without surrounding blanks or image tags; not empty."""
    hallucinated: tuple[str, ...]
    """The caption with hallucinations written in, cleaned like it; empty ones are left out."""
