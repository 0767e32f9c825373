"""Which rank and micro-batch runs which sample: each exactly once, and evenly."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.order.assignment import balanced, in_order, within_tokens

LAYOUTS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def items(ranks: list[list[list[int]]]) -> list[int]:
    return [item for rank in ranks for micro_batch in rank for item in micro_batch]


@given(layout=LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_in_order_read_over_the_ranks_is_the_global_batch(layout):
    micro_batch_size, data_parallel_size, num_micro_batches = layout
    size = micro_batch_size * data_parallel_size * num_micro_batches
    ranks = in_order(size, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    assert [len(rank) for rank in ranks] == [num_micro_batches] * data_parallel_size
    assert [item for micro_batches in zip(*ranks, strict=True) for part in micro_batches for item in part] == [
        *range(size)
    ]


def test_in_order_worked_out_by_hand():
    assert in_order(8, micro_batch_size=2, data_parallel_size=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    with pytest.raises(ValueError, match=r"make --global-batch-size a multiple of 4"):
        in_order(6, micro_batch_size=2, data_parallel_size=2)


@given(layout=LAYOUTS, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_balanced_takes_every_sample_once_in_micro_batches_of_one_size(layout, seed):
    micro_batch_size, data_parallel_size, num_micro_batches = layout
    size = micro_batch_size * data_parallel_size * num_micro_batches
    costs = [random.Random(seed + at).randrange(1, 2000) for at in range(size)]
    ranks = balanced(costs, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    assert sorted(items(ranks)) == [*range(size)]
    assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {micro_batch_size}
    assert [len(rank) for rank in ranks] == [num_micro_batches] * data_parallel_size


def test_balanced_is_more_even_than_the_order():
    """LLaVA-like lengths: text-only and image dialogues mixed."""
    drawn = random.Random(0)
    costs = [drawn.choice([40, 120, 700, 1900]) + drawn.randrange(60) for _ in range(128)]
    spread = {}
    for name, ranks in (
        ("in order", in_order(128, micro_batch_size=4, data_parallel_size=8)),
        ("balanced", balanced(costs, micro_batch_size=4, data_parallel_size=8)),
    ):
        sums = [sum(costs[item] for item in micro_batch) for rank in ranks for micro_batch in rank]
        of_ranks = [sum(costs[item] for micro_batch in rank for item in micro_batch) for rank in ranks]
        spread[name] = (max(sums) / min(sums), max(of_ranks) / min(of_ranks))
    assert spread["in order"][0] > 2
    assert spread["balanced"][0] < 1.5 and spread["balanced"][1] < 1.05, spread


@given(
    costs=st.lists(st.integers(0, 900), min_size=1, max_size=40),
    tokens=st.integers(200, 3000),
    data_parallel_size=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_within_tokens_keeps_the_budget_with_as_many_micro_batches_on_every_rank(costs, tokens, data_parallel_size):
    ranks = within_tokens(costs, micro_batch_tokens=tokens, data_parallel_size=data_parallel_size)
    assert sorted(items(ranks)) == [*range(len(costs))]
    assert len(ranks) == data_parallel_size and len({len(rank) for rank in ranks}) == 1
    budget = max(tokens, max(costs))
    for rank in ranks:
        for micro_batch in rank:
            assert sum(costs[item] for item in micro_batch) <= budget
    # One micro-batch fewer could not have held them: where longest-first packing fails, each holds more than the
    # budget less the longest sample, and more than half of the budget.
    held = max(budget - max(costs), budget / 2)
    fewer = len(ranks[0]) - 1
    assert fewer == 0 or fewer * data_parallel_size * held < sum(costs)


def test_a_sample_longer_than_the_budget_has_a_micro_batch_to_itself():
    ranks = within_tokens([5000, 10, 10], micro_batch_tokens=100, data_parallel_size=1)
    assert sorted(ranks[0]) == [[0], [1, 2]]
