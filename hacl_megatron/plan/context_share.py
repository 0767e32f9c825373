"""What of a pack one context-parallel rank runs: an equal part of the rows, of read ones as many as the cut gives."""

import math
from dataclasses import replace

from hacl_megatron.assemble.row_shares import cut_into_pieces
from hacl_megatron.plan.workload import PackShape, Segments


def fullest_share(pack: PackShape, ranks: int) -> PackShape:
    """The share of the rank that reads most rows: few long segments end, where they are read, on few ranks.

    Views of images and targets are shared out evenly.
    """
    if ranks == 1:
        return pack
    read = _share_of_read_rows(pack, ranks)
    return replace(
        pack,
        segments=tuple(replace(p, count=p.count / ranks, read=p.read * read * ranks) for p in pack.segments),
        images=math.ceil(pack.images / ranks),
        image_rows=pack.image_rows / ranks,
        target_rows=pack.target_rows / ranks,
    )


def _share_of_read_rows(pack: PackShape, ranks: int) -> float:
    """Of the rank that has most, in a pack of whole segments that is like this one."""
    like = [part for part in pack.segments for _ in range(_whole(part))]
    lengths, reads = ([round(getattr(part, name)) for part in like] for name in ("length", "read"))
    padding = -sum(lengths) % ranks
    held = [0] * ranks
    for piece in cut_into_pieces([*lengths, padding], [*reads, 0], ranks):
        held[piece.rank] += piece.read
    return max(held) / sum(held) if any(held) else 1 / ranks


def _whole(part: Segments) -> int:
    return max(1, round(part.count))


def gathered_bytes(pack: PackShape, ranks: int, row: float) -> tuple[float, float]:
    """(bytes of all ranks' keys and values, of those that one rank's pieces see); `row`: of one row's.

    Of two pieces of a segment the earlier one sees what the later one sees too, and has a copy.
    """
    rows = pack.rows * row
    return rows, (rows + sum((part.context - part.length) * part.count for part in pack.branches) * row) * (
        1 + 1 / (2 * ranks)
    )
