"""Who runs which rows of a pack, against a mask over the whole pack that knows nothing of pieces."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hacl_megatron.assemble.row_shares import Piece, cut_into_pieces, share_of_rows
from hacl_megatron.batch import PackedBatch, RowShare, rows_to_read

# Dialogues of uneven lengths, a caption shorter than four ranks' eight pieces, single rows, two branches, padding.
SEGMENTS, TARGETS = (53, 1, 30, 3, 7, 2), (range(40, 53), [53], [60, 70], [84, 86], [87, 93], [])
BRANCHES = {3: 31, 4: 10}
"""Segment -> how many of the first segment's rows come before it."""


def pack() -> PackedBatch:
    """96 rows; what the model makes of them does not matter here."""
    borders = torch.tensor([0, *SEGMENTS]).cumsum(0).int()
    targets = torch.tensor([row for rows in TARGETS for row in rows])
    read_rows, read_lengths = rows_to_read(borders, targets)
    own = {segment: torch.arange(int(borders[segment]), int(borders[segment + 1])) for segment in BRANCHES}
    contexts = [torch.cat([torch.arange(shared), own[segment]]) for segment, shared in BRANCHES.items()]
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        sample_ids=none, token_ids=torch.arange(96) + 1000, position_ids=torch.arange(96) * 2, cu_seqlens=borders,
        max_seqlen=53, pixel_values=torch.empty(0, 3, 1, 1), image_rows=torch.arange(5, 30),
        feature_rows=torch.arange(25).flip(0), target_rows=targets[:-4], target_ids=none, image_eos_rows=targets[-2:],
        caption_eos_rows=targets[:1], hallucinated_eos_rows=none, hallucinated_owner=none, image_keys=none,
        caption_keys=none, hallucinated_keys=none, read_rows=read_rows, read_lengths=read_lengths,
        branch_rows=torch.cat([*own.values()]), branch_sizes=torch.tensor([len(rows) for rows in own.values()]).int(),
        branch_lengths=torch.tensor([len(rows) for rows in contexts]).int(), branch_context_rows=torch.cat(contexts),
        rejected_rows=targets[-4:], num_padding_rows=2, num_text_rows=0,
    )  # fmt: skip


def seen(batch: PackedBatch) -> Tensor:
    """bool [T, T]: which rows each row sees."""
    segment = torch.arange(len(SEGMENTS)).repeat_interleave(torch.tensor(SEGMENTS))
    mask = (segment[:, None] == segment) & torch.ones(96, 96).tril().bool()
    for branch, shared in BRANCHES.items():
        mask[segment == branch, :shared] = True
    return mask


def shares(batch: PackedBatch, ranks: int) -> list[RowShare]:
    return [share_of_rows(batch, SimpleNamespace(rank=lambda r=rank: r, size=lambda: ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_row_has_one_rank_and_sees_there_what_it_sees_in_the_whole_pack(ranks: int) -> None:
    batch = pack()
    found = shares(batch, ranks)
    together = torch.cat([share.token_ids for share in found]) - 1000  # rows, as gathered keys and values are
    assert {len(share.token_ids) for share in found} == {96 // ranks}
    assert torch.equal(together.sort().values, torch.arange(96))
    expected = seen(batch)
    for share in found:
        queries, keys = (
            (share.token_ids - 1000).split(share.on_host.sizes),
            share.context_rows.split(share.on_host.lengths),
        )
        assert torch.equal(share.position_ids, (share.token_ids - 1000) * 2)
        for rows, context in zip(queries, keys, strict=True):
            for back, row in enumerate(rows.flip(0).tolist()):  # the last query sees all, each before it a row less
                sees = torch.zeros(96, dtype=torch.bool)
                sees[together[context[: len(context) - back]]] = True
                assert torch.equal(sees, expected[row]), row


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_what_is_read_of_a_pack_is_read_once_and_on_every_rank_something(ranks: int) -> None:
    batch = pack()
    found = shares(batch, ranks)
    places: dict[str, list[Tensor]] = {"wanted": [], "image": []}
    read = torch.zeros(96, dtype=torch.int64)
    for share in found:
        rows = share.token_ids - 1000
        read[rows[share.read_rows]] += 1
        ends = torch.tensor(share.on_host.sizes).cumsum(0).tolist()
        by_piece = [torch.arange(e - n, e) for e, n in zip(ends, share.on_host.reads, strict=True)]
        assert torch.equal(torch.cat(by_piece), share.read_rows) and len(share.read_rows)
        places["wanted"].append(torch.stack([share.wanted_places, rows[share.wanted_rows]]))
        places["image"].append(torch.stack([share.feature_rows, rows[share.image_rows]]))
        assert torch.isin(share.wanted_rows, share.read_rows).all()
    assert read[batch.read_rows].eq(1).all() and read.sum() - len(batch.read_rows) < ranks
    whole = {
        "wanted": batch.wanted_rows,
        "image": batch.image_rows.flip(0),  # by the features that they take
    }
    for name, rows in whole.items():
        place, row = torch.cat(places[name], dim=1)
        assert torch.equal(place.sort().values, torch.arange(len(rows))), name
        assert torch.equal(row[place.argsort()], rows), name
    heads = [share.token_places for share in found]
    assert torch.equal(torch.cat(heads), torch.arange(batch.num_targets + batch.rejected_rows.numel()))
    assert max(map(len, heads)) - min(map(len, heads)) <= 1


def work(pieces: list[Piece], borders: list[int], ranks: int) -> list[int]:
    """Keys that each rank's queries see."""
    found = [0] * ranks
    for piece in pieces:
        last = piece.end - borders[piece.segment]
        found[piece.rank] += sum(range(last - piece.rows + 1, last + 1))
    return found


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_attentions_work_and_the_rows_are_even_over_segments_of_any_length(ranks: int) -> None:
    """Catches one piece a rank, and pieces of the whole pack: both leave a rank with half as much again, or more."""
    segments = [16_000, 5_003, 1, 1_200, *range(3, 40), 1]
    segments.append(-sum(segments) % ranks)
    pieces = cut_into_pieces(segments, [min(9, length) for length in segments], ranks)
    assert [piece.begin for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    borders = [sum(segments[:at]) for at in range(len(segments))]
    done, rows, reads = work(pieces, borders, ranks), [0] * ranks, [0] * ranks
    for piece in pieces:
        rows[piece.rank] += piece.rows
        reads[piece.rank] += piece.read
    assert len(set(rows)) == 1
    assert max(done) <= 1.01 * min(done), done
    assert max(reads) <= 1.2 * min(reads), reads
