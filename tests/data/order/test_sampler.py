"""The sampler's promises, as properties over sizes, seeds and batch sizes."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.order.sampler import Sampler

SIZES = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(any)
BATCH = st.integers(1, 50)
SEEDS = st.integers(0, 2**31)


def stream(sampler: Sampler, count: int) -> list[tuple[int, int]]:
    """The first `count` draws, and the rest of the batch that the last one came with."""
    drawn: list[tuple[int, int]] = []
    while len(drawn) < count:
        drawn += sampler.next_batch()
    return drawn


@given(sizes=SIZES, batch=BATCH, seed=SEEDS, shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_sample_is_drawn_once_an_epoch(sizes, batch, seed, shuffle):
    total = sum(sizes)
    sampler = Sampler(*sizes, seed=seed, global_batch_size=batch, shuffle=shuffle)
    drawn = stream(sampler, 3 * total)
    for epoch in range(3):
        part = drawn[epoch * total : (epoch + 1) * total]
        assert {e for e, _ in part} == {epoch}
        assert sorted(sample_id for _, sample_id in part) == list(range(total))
    assert sampler.consumed_samples == len(drawn) and len(drawn) % batch == 0


@given(sizes=SIZES, seed=SEEDS, batch=BATCH)
@settings(max_examples=60, deadline=None)
def test_contrastive_samples_are_spread_evenly(sizes, seed, batch):
    """Any stretch of an epoch holds the contrastive share of it, to within one sample."""
    num_samples, num_contrastive = sizes
    total = sum(sizes)
    drawn = stream(Sampler(*sizes, seed=seed, global_batch_size=batch), total)[:total]
    running = np.concatenate([[0], np.cumsum([sample_id >= num_samples for _, sample_id in drawn])])
    for length in range(1, total + 1):
        held = running[length:] - running[:-length]
        assert np.abs(held - length * num_contrastive / total).max() < 1 + 1e-9


@given(sizes=SIZES, seed=SEEDS, batch=BATCH, other_batch=BATCH, steps=st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_resume_goes_on_where_the_stream_stood(sizes, seed, batch, other_batch, steps):
    """Also at another global batch size, and through JSON, as a checkpoint may store the state."""
    sampler = Sampler(*sizes, seed=seed, global_batch_size=batch)
    for _ in range(steps):
        sampler.next_batch()
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = Sampler(*sizes, seed=seed, global_batch_size=other_batch)
    resumed.load_state_dict(state)
    count = 3 * max(batch, other_batch, sum(sizes))
    assert stream(resumed, count)[:count] == stream(sampler, count)[:count]


def test_epochs_and_seeds_differ():
    draws = [sample_id for _, sample_id in stream(Sampler(8, 0, seed=1, global_batch_size=16), 16)]
    others = [sample_id for _, sample_id in stream(Sampler(8, 0, seed=2, global_batch_size=16), 16)]
    assert draws[:8] != draws[8:]
    assert draws[:8] != others[:8]


def test_the_order_is_pinned():
    """A run resumed with another numpy or on another machine must meet this very order."""
    drawn = stream(Sampler(5, 2, seed=1234, global_batch_size=14), 14)
    assert [epoch for epoch, _ in drawn] == [0] * 7 + [1] * 7
    assert [sample_id for _, sample_id in drawn] == [1, 6, 2, 0, 3, 5, 4, 3, 5, 0, 4, 1, 6, 2]


def test_unshuffled_order_is_the_files():
    sampler = Sampler(4, 2, seed=0, global_batch_size=6, shuffle=False)
    assert [sample_id for _, sample_id in sampler.next_batch()] == [0, 4, 1, 2, 5, 3]
    assert sampler.next_batch()[0] == (1, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_samples": 9}, "num_samples 10, this run has 9: .*--data-path"),
        ({"num_contrastive": 1}, "num_contrastive 3, this run has 1: .*--contrastive-data-path"),
        ({"seed": 2}, "seed 1, this run has 2: .*--seed"),
        ({"shuffle": False}, "shuffle True, this run has False"),
    ],
)
def test_another_streams_state_is_refused(change, named):
    arguments = {"num_samples": 10, "num_contrastive": 3, "seed": 1, "shuffle": True}
    state = Sampler(**arguments, global_batch_size=4).state_dict()
    with pytest.raises(ValueError, match=named):
        Sampler(**(arguments | change), global_batch_size=4).load_state_dict(state)


def test_state_of_an_earlier_version_is_refused_as_such():
    sampler = Sampler(10, 3, seed=1, global_batch_size=4)
    state = {key: value for key, value in sampler.state_dict().items() if key != "digest"}
    with pytest.raises(ValueError, match=r"no digest: an earlier version wrote it.*--pretrained-checkpoint"):
        sampler.load_state_dict(state)


def test_nothing_to_draw_from_is_a_users_mistake():
    with pytest.raises(ValueError, match="--data-path"):
        Sampler(0, 0, seed=1, global_batch_size=4)
    with pytest.raises(ValueError, match="--global-batch-size is 0"):
        Sampler(3, 0, seed=1, global_batch_size=0)


def test_resume_far_into_a_run_is_immediate():
    """O(one epoch): an epoch number in the millions must not be walked up to."""
    sampler = Sampler(100, 10, seed=3, global_batch_size=7)
    sampler.load_state_dict({**sampler.state_dict(), "consumed_samples": 110 * 10**12 + 109})
    assert [epoch for epoch, _ in sampler.next_batch()] == [10**12] + [10**12 + 1] * 6


def test_an_order_takes_four_bytes_a_sample_and_goes_when_it_is_drawn() -> None:
    """Of 20 million samples a rank may hold 150 MB in all: catches eight bytes, and the last epoch's order beside."""
    tracemalloc.start()
    try:
        sampler = Sampler(200_000, 0, seed=1, global_batch_size=1000)
        for _ in range(250):
            sampler.next_batch()
            sampler.peek(1000)
        assert tracemalloc.get_traced_memory()[0] < 1.2 * 4 * 200_000
    finally:
        tracemalloc.stop()
