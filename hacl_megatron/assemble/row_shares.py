"""Which rows of a pack each context-parallel rank runs, so that all have as many, and attention's work is even.

A segment of a pack is cut into two pieces a rank. With ranks 0, 1, 2 their order is 0 1 2 2 1 0:

    rows       0 1 2 3 | 4 5 6 7 | 8 9 10 11 12 13 14 15 | 16 17 18 19 | 20 21 22 23
    rank          0         1               2                  1             0

A row attends to all in front of it, so the first and the last piece are together as much work as the two in the
middle. Whole packs cut so would not do: their segments are of many lengths, and a row sees its own segment alone. Nor
would one piece a rank, of fewer rows the later it stands: everything but attention goes by the number of rows.

What does not divide goes to the ranks with the fewest rows so far; so all have as many in the end (a pack's rows are
padded to a multiple), even of segments shorter than the ranks are many. The last piece goes to the rank with the fewest
read rows so far, which stand at the ends of segments, and are all that the last layer runs for. The LM head is shared
out evenly, whatever ranks the rows that it is to see are on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hacl_megatron.batch import PackedBatch, PieceLengths, RowShare


def share_of_rows(batch: PackedBatch, group: ProcessGroup) -> RowShare:
    """This rank's share of a pack whose integers are on the host, where the share is too."""
    rank, lengths = group.rank(), batch.lengths
    pieces = cut_into_pieces(lengths.segments, lengths.read, group.size())
    owner = _int64([piece.rank for piece in pieces]).repeat_interleave(_int64([piece.rows for piece in pieces]))
    order = owner.argsort(stable=True)  # rows of the pack, as they stand where all ranks' follow one another
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    count = len(order) // group.size()
    first = rank * count
    own_rows = order[first : first + count]

    def own(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `rows` are this rank's, and their places among its own."""
        (mine,) = (owner[rows] == rank).nonzero(as_tuple=True)
        return mine, place[rows[mine]] - first

    images, image_rows = own(batch.image_rows)
    wanted, wanted_rows = own(batch.wanted_rows)
    num_tokens = batch.num_targets + batch.rejected_rows.numel()
    seen = _seen_rows(batch)
    own_pieces = [piece for piece in pieces if piece.rank == rank]
    contexts = [seen(piece) for piece in own_pieces]
    sizes, reads = [piece.rows for piece in own_pieces], [piece.read for piece in own_pieces]
    if not any(reads):
        reads[-1] = 1  # kernels do not like to be called for nothing
    on_host = PieceLengths(sizes=tuple(sizes), reads=tuple(reads), lengths=tuple(map(len, contexts)))
    return RowShare(
        group=group,
        token_ids=batch.token_ids[own_rows],
        position_ids=batch.position_ids[own_rows],
        image_rows=image_rows,
        feature_rows=batch.feature_rows[images],
        read_rows=_last_rows(sizes, reads),
        wanted_rows=wanted_rows,
        wanted_places=wanted,
        token_places=torch.arange(num_tokens).tensor_split(group.size())[rank],
        context_rows=place[torch.cat(contexts)],
        sizes=torch.tensor(sizes, dtype=torch.int32),
        reads=torch.tensor(reads, dtype=torch.int32),
        lengths=torch.tensor(on_host.lengths, dtype=torch.int32),
        on_host=on_host,
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring rows of a segment that one rank runs."""

    rank: int
    segment: int
    begin: int
    """Counted in the pack."""
    end: int
    read: int
    """How many rows at the end are read."""

    @property
    def rows(self) -> int:
        return self.end - self.begin


def cut_into_pieces(segments: Sequence[int], read: Sequence[int], ranks: int) -> list[Piece]:
    """All pieces of a pack, in its order; as many rows for each of the `ranks`, a divisor of the pack's.

    Args:
        segments: rows of each segment.
        read: how many at the end of each are read.
    """
    pieces, begin, rows, reads = [], 0, [0] * ranks, [0] * ranks
    for index, (length, read_length) in enumerate(zip(segments, read, strict=True)):
        each, rest = divmod(length, ranks)
        fewest = sorted(range(ranks), key=rows.__getitem__)[:rest]
        sizes = [each + (rank in fewest) for rank in range(ranks)]
        outermost_first = sorted(range(ranks), key=reads.__getitem__)
        cuts = [(rank, sizes[rank] // 2) for rank in outermost_first]
        cuts += [(rank, sizes[rank] - sizes[rank] // 2) for rank in reversed(outermost_first)]
        first_read = begin + length - read_length
        for rank, size in cuts:
            if not size:
                continue
            end = begin + size
            found = Piece(rank=rank, segment=index, begin=begin, end=end, read=max(0, end - max(begin, first_read)))
            if pieces and (pieces[-1].rank, pieces[-1].segment) == (rank, index):  # the two in the middle
                before = pieces.pop()
                found = Piece(rank=rank, segment=index, begin=before.begin, end=end, read=before.read + found.read)
            pieces.append(found)
            rows[rank] += size
            reads[rank] += max(0, end - max(begin, first_read))
            begin = end
    assert len(set(rows)) == 1, f"{sum(rows)} rows over {ranks} ranks: {rows}"
    return pieces


def _seen_rows(batch: PackedBatch):
    """Piece -> int64 [n]: rows of the pack that its last row sees, its own last."""
    borders = batch.cu_seqlens.long()
    sizes = batch.branch_sizes.long()
    firsts = batch.branch_rows[sizes.cumsum(0) - sizes]
    segments = (torch.searchsorted(borders, firsts, right=True) - 1).tolist()
    contexts = dict(zip(segments, batch.branch_context_rows.split(batch.lengths.branches), strict=True))
    begins, ends = borders[:-1].tolist(), borders[1:].tolist()

    def seen(piece: Piece) -> Tensor:
        if piece.segment in contexts:
            context = contexts[piece.segment]
            return context[: len(context) - (ends[piece.segment] - piece.end)]
        return torch.arange(begins[piece.segment], piece.end)

    return seen


def _last_rows(sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The last of so many rows of each piece, among the rows of all."""
    ends, total = [], 0
    for size, count in zip(sizes, counts, strict=True):
        total += size
        ends.append(torch.arange(total - count, total))
    return torch.cat(ends)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
