"""The gather of pairs over data-parallel ranks: what arrives, what comes back, and that no rank ever waits alone.

Faults of the released code that these tests would catch: hallucinated negatives dropped when gathering; an all-gather
whose backward leaves out the other ranks' gradients; mixed batches that change the number of collectives per rank.
"""

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.objective.negatives import PairEmbeddings, gather_pairs
from tests.distributed import run_distributed
from tests.objective.pair_cases import EMPTY_CASES, EQUATION_CASES, WORLD_SIZES, Case, global_batch, results_of_ranks

CASES = {f"equation {name}": case for name, case in EQUATION_CASES.items()}
CASES |= {f"empty {name}": case for name, case in EMPTY_CASES.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_pool_is_the_global_batch_on_every_rank(world_size: int) -> None:
    for name, case in CASES.items():
        batch, first_pair = global_batch(case), 0
        for size, results in zip(case.sizes[world_size], results_of_ranks(world_size), strict=True):
            assert results[name]["first_pair"] == first_pair
            first_pair += size
            for item in fields(PairEmbeddings):  # bit for bit, owners in global numbers, no padding left
                torch.testing.assert_close(results[name]["pool"][item.name], getattr(batch, item.name), rtol=0, atol=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_enters_the_same_collectives(world_size: int) -> None:
    for name in CASES:
        ranks = [results[name] for results in results_of_ranks(world_size)]
        # Same calls with the same shapes in the same order, whether a rank has pairs, none, or frozen embeddings.
        assert all(rank["collectives"] == ranks[0]["collectives"] for rank in ranks)
        num_forward, num_backward = (3, 1) if world_size > 1 else (0, 0)
        assert ranks[0]["num_forward_collectives"] == num_forward
        assert len(ranks[0]["collectives"]) == num_forward + num_backward


def _backward_of_pool_rows() -> dict[str, torch.Tensor]:
    """Rank r weighs the pool's row k by 10^r * (k + 1): every rank's part is legible in the sum."""
    rank = dist.get_rank()
    num_pairs, num_hallucinated = ((2, 1), (0, 0), (1, 3))[rank]
    local = PairEmbeddings(
        image=torch.zeros(num_pairs, 4, requires_grad=True),
        caption=torch.zeros(num_pairs, 4, requires_grad=True),
        hallucinated=torch.zeros(num_hallucinated, 4, requires_grad=True),
        hallucinated_owner=torch.zeros(num_hallucinated, dtype=torch.int64),
        image_keys=torch.arange(num_pairs),
        caption_keys=torch.arange(num_pairs),
        hallucinated_keys=torch.arange(num_hallucinated),
    )
    pool = gather_pairs(local, dist.group.WORLD).pool
    total = 0.0
    for kind, scale in (("image", 1), ("caption", 2), ("hallucinated", 3)):
        rows = getattr(pool, kind)
        weights = torch.arange(1.0, rows.shape[0] + 1) * 10**rank * scale
        total = total + (rows * weights[:, None]).sum()
    total.backward()
    with torch.no_grad():
        evaluated = gather_pairs(local, dist.group.WORLD).pool
    assert not evaluated.image.requires_grad and evaluated.num_pairs == pool.num_pairs
    return {kind: getattr(local, kind).grad for kind in ("image", "caption", "hallucinated")}


def test_backward_sums_the_gradients_of_all_ranks() -> None:
    """By hand: 3 pairs and 4 hallucinated captions; every row's gradient is its weight times 1 + 10 + 100."""
    ranks = run_distributed(_backward_of_pool_rows, 3)
    for kind, scale, counts in (("image", 1, (2, 0, 1)), ("caption", 2, (2, 0, 1)), ("hallucinated", 3, (1, 0, 3))):
        expected = (torch.arange(1.0, sum(counts) + 1) * 111 * scale)[:, None].expand(-1, 4).split(counts)
        for gradients, rows in zip(ranks, expected, strict=True):
            torch.testing.assert_close(gradients[kind], rows, rtol=0, atol=0)


def test_without_a_group_the_pool_is_the_batch_itself() -> None:
    case = Case(sizes={1: (7,)}, hallucinated=(1,) * 7)
    batch = global_batch(case)
    gathered = gather_pairs(batch, None)
    assert gathered.pool is batch and gathered.first_pair == 0
