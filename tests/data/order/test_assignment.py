"""Which rank and micro-batch runs which sample: each exactly once, and evenly."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.order.assignment import balanced, evened, evened_within_tokens, in_order, within_tokens

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


@st.composite
def views_and_rows(draw) -> tuple[list[int], list[int]]:
    size = draw(LAYOUTS)
    samples = [(draw(st.integers(0, 10)), draw(st.integers(0, 900))) for _ in range(size[0] * size[1] * size[2])]
    return size, [one for one, _ in samples], [other for _, other in samples]


@given(drawn=views_and_rows(), stages=st.sampled_from([1, 2]), tokens=st.integers(200, 3000))
@settings(max_examples=100, deadline=None)
def test_evened_takes_every_sample_once_in_equally_many_micro_batches(drawn, stages, tokens):
    """Catches a rank with a micro-batch more, for which collectives would wait, and one that is too full."""
    (micro_batch_size, data_parallel_size, num_micro_batches), views, rows = drawn
    costs = np.array([[700.0 * v + r, float(r)][:stages] for v, r in zip(views, rows, strict=True)])
    ranks = evened(costs, rows, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    assert sorted(items(ranks)) == [*range(len(rows))]
    assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {micro_batch_size}
    assert [len(rank) for rank in ranks] == [num_micro_batches] * data_parallel_size

    ranks = evened_within_tokens(costs, rows, micro_batch_tokens=tokens, data_parallel_size=data_parallel_size)
    assert sorted(items(ranks)) == [*range(len(rows))]
    assert len(ranks) == data_parallel_size and len({len(rank) for rank in ranks}) == 1
    assert max(sum(rows[at] for at in own) for rank in ranks for own in rank) <= max(tokens, *rows)


def most_over_mean(ranks: list[list[list[int]]], costs: list[float]) -> float:
    of_ranks = [sum(costs[at] for micro_batch in rank for at in micro_batch) for rank in ranks]
    return max(of_ranks) * len(ranks) / sum(of_ranks)


@pytest.mark.parametrize("view", [300.0, 1500.0])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_work_of_ranks_is_even_where_that_of_rows_alone_is_not(view: float, micro_batch_size: int) -> None:
    """Samples as of LLaVA-OneVision: a view is 196 rows, and as much work as `view` rows, dialogues may have none.

    The mean over ten steps of what the slowest rank has over the mean rank.
    """
    drawn, found = random.Random(0), {"rows": [], "both": [], "rows in tokens": [], "both in tokens": []}
    by_number = {"micro_batch_size": micro_batch_size, "data_parallel_size": 8}
    in_tokens = {"micro_batch_tokens": 8192, "data_parallel_size": 8}
    for _ in range(10):
        views = [drawn.choice([0, 1, 2, 3, 5, 5, 8, 10, 14]) for _ in range(128)]
        rows = [196 * number + drawn.randrange(50, 1500) for number in views]
        costs = [row + view * number for row, number in zip(rows, views, strict=True)]
        of_stage = np.array(costs)[:, None]
        for name, ranks in (
            ("rows", balanced(rows, **by_number)),
            ("both", evened(of_stage, rows, **by_number)),
            ("rows in tokens", within_tokens(rows, **in_tokens)),
            ("both in tokens", evened_within_tokens(of_stage, rows, **in_tokens)),
        ):
            found[name].append(most_over_mean(ranks, costs))
    means = {name: sum(each) / len(each) for name, each in found.items()}
    assert means["rows"] > 1.03 and means["rows in tokens"] > 1.03, means
    assert means["both"] < 1.005 and means["both in tokens"] < 1.005, means


def test_of_a_pipeline_the_slowest_stage_is_evened_out() -> None:
    """Two pictures and two dialogues on two ranks. By the sum of the stages a rank might get both pictures: as much in
    all, but twice the first stage's work. The micro-batches of a rank are even by the slowest stage, too."""
    costs = np.array([[9.0, 1.0], [9.0, 1.0], [1.0, 9.0], [1.0, 9.0]])
    ranks = evened(costs, [1, 1, 1, 1], micro_batch_size=2, data_parallel_size=2)
    assert sorted(sorted(at // 2 for at in items([rank])) for rank in ranks) == [[0, 1], [0, 1]]


def test_evened_worked_out_by_hand() -> None:
    """Costs 9 | 5 4, then 3 where it is a tie, 2 to the lighter rank, which is full of three; by tokens 1 follows."""
    costs, rows = np.array([[3.0], [9.0], [4.0], [5.0], [1.0], [2.0]]), [10, 40, 20, 30, 50, 60]
    ranks = evened(costs, rows, micro_batch_size=1, data_parallel_size=2)
    assert ranks == [[[4], [1], [0]], [[5], [3], [2]]], "the fullest micro-batch first"
    ranks = evened_within_tokens(costs, rows, micro_batch_tokens=100, data_parallel_size=2)
    assert ranks == [[[1], [0]], [[2, 5], [3, 4]]], "two micro-batches, since one rank's 160 rows need them"
