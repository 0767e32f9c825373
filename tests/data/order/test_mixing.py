"""Properties of mixtures, groups and blocks: what is drawn how often, and that order is a function of (seed, epoch)."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.order.assignment import in_order
from hacl_megatron.data.order.mixing import BLOCKS_AT_ONCE, Words, draws_of
from hacl_megatron.data.order.sampler import Sampler

SEEDS = st.integers(0, 2**31)
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.3])


@st.composite
def settings_of_a_sampler(draw) -> dict:
    """Any data and any way of ordering it."""
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    lengths = np.array([draw(st.sampled_from([-9, -3, 1, 4, 8])) for _ in range(sum(sizes))])
    weighted = draw(st.booleans())
    return {
        "num_samples": sum(sizes),
        "num_contrastive": draw(st.integers(0, 12)),
        "seed": draw(SEEDS),
        "source_sizes": sizes,
        "weights": [draw(WEIGHTS) for _ in sizes] if weighted else [],
        "modality_lengths": lengths if draw(st.booleans()) else None,
        "shuffle_block": draw(st.sampled_from([0, 1, 3])),
        "digests": ("a", "b"),
    }


def drawn(sampler: Sampler, count: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while len(found) < count:
        found += sampler.next_batch()
    return found[:count]


@given(arguments=settings_of_a_sampler(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_epochs_are_whole_whatever_the_ranks_and_restarts(arguments, data):
    """Every sample exactly once an epoch (with weights: as often as they say), at data-parallel sizes 1 to 4 that
    change at random steps, epochs one behind the other without gap or dropped tail."""
    reference = Sampler(**arguments, global_batch_size=12)
    size = reference.epoch_size
    num_epochs = 4
    seen: list[tuple[int, int]] = []
    state = None
    while len(seen) < num_epochs * size:
        ranks = data.draw(st.integers(1, 4))
        micro = data.draw(st.integers(1, 3))
        batch_size = 12 if state is None else ranks * micro * data.draw(st.integers(1, 3))
        layout = {"micro_batch_size": 12 // ranks if state is None else micro, "data_parallel_size": ranks}
        samplers = [Sampler(**arguments, global_batch_size=batch_size) for _ in range(ranks)]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(data.draw(st.integers(1, 6))):
            parts = []
            for rank, sampler in enumerate(samplers):
                batch = sampler.next_batch()
                shares = in_order(len(batch), **layout)[rank]
                parts.append([[batch[at] for at in micro_batch] for micro_batch in shares])
            seen += [item for same in zip(*parts, strict=True) for micro_batch in same for item in micro_batch]
        assert len({json.dumps(sampler.state_dict()) for sampler in samplers}) == 1
        state = samplers[-1].state_dict()
    assert seen == drawn(reference, len(seen))  # the very stream of one process that never stopped

    ordinary = Counter()
    for epoch in range(num_epochs):
        part = seen[epoch * size : (epoch + 1) * size]
        assert {number for number, _ in part} == {epoch}
        counts = Counter(sample_id for _, sample_id in part)
        contrastive = range(arguments["num_samples"], arguments["num_samples"] + arguments["num_contrastive"])
        assert all(counts.pop(sample_id) == 1 for sample_id in contrastive)
        ordinary += counts
        if not arguments["weights"]:
            assert counts == Counter(range(arguments["num_samples"]))
        first = 0
        for source, weight in zip(arguments["source_sizes"], arguments["weights"], strict=False):
            ids = range(first, first + source)
            share = max(1, int(weight * source + 0.5))
            assert sum(counts[sample_id] for sample_id in ids) == share
            # Up to here no sample of a source was drawn more than once more than another.
            so_far = [ordinary[sample_id] for sample_id in ids]
            assert max(so_far) - min(so_far) <= 1 and sum(so_far) == share * (epoch + 1)
            first += source


@given(arguments=settings_of_a_sampler(), batch=st.integers(1, 30), steps=st.integers(0, 9), far=st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_looking_ahead_changes_nothing(arguments, batch, steps, far):
    plain, looking = (Sampler(**arguments, global_batch_size=batch) for _ in range(2))
    for _ in range(steps):
        ahead = looking.peek(far)
        state = looking.state_dict()
        batch_drawn = looking.next_batch()
        assert batch_drawn == plain.next_batch()
        assert ahead[:batch] == batch_drawn[:far]
        assert state["consumed_samples"] + batch == looking.state_dict()["consumed_samples"]


@given(
    num_image=st.integers(0, 60), num_text=st.integers(0, 60), num_contrastive=st.integers(0, 20),
    batch=st.integers(1, 16), seed=SEEDS,
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_global_batches_hold_one_modality_longest_first(num_image, num_text, num_contrastive, batch, seed):
    if num_image + num_text == 0:
        return
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.concatenate([rng.integers(1, 50, num_image), -rng.integers(1, 50, num_text)]))
    total = len(lengths)
    sampler = Sampler(total, num_contrastive, seed=seed, global_batch_size=batch, modality_lengths=lengths)
    size = sampler.epoch_size
    stream = drawn(sampler, 3 * size)
    for epoch in range(3):
        mixed = 0
        for begin in range(-(-epoch * size // batch) * batch if epoch == 0 else (epoch * size) // batch * batch,
                           (epoch + 1) * size, batch):  # fmt: skip
            window = [i for e, i in stream[begin : begin + batch] if e == epoch and i < total]
            found = lengths[window]
            mixed += bool((found > 0).any() and (found < 0).any())
            if len(window):
                assert (np.diff(np.abs(found)) <= 0).all()
        assert mixed <= 1


def test_groups_are_not_always_the_same():
    lengths = np.where(np.arange(64) % 2, 5, -5)
    sampler = Sampler(64, 0, seed=1, global_batch_size=8, modality_lengths=lengths)
    epochs = [[frozenset(i for _, i in sampler.next_batch()) for _ in range(8)] for _ in range(2)]
    assert not set(epochs[0]) & set(epochs[1])
    kinds = [lengths[next(iter(group))] > 0 for group in epochs[0]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_another_global_batch_size_keeps_the_groups_of_the_run():
    lengths = np.where(np.arange(96) % 3, 5, -5)
    arguments = {"num_samples": 96, "num_contrastive": 0, "seed": 1, "modality_lengths": lengths}
    sampler = Sampler(**arguments, global_batch_size=16)
    sampler.next_batch()
    resumed = Sampler(**arguments, global_batch_size=4)
    resumed.load_state_dict(sampler.state_dict())
    assert drawn(resumed, 160) == drawn(sampler, 160)


@given(size=st.integers(1, 300), block=st.integers(1, 40), seed=SEEDS)
@settings(max_examples=80, deadline=None)
def test_blocks_keep_what_is_read_at_a_time_together(size, block, seed):
    order = Words(seed).block_permutation(0, 4, size, block)
    assert sorted(order.tolist()) == list(range(size))
    blocks = order // block
    # Each block is read within the stretch of eight blocks that it is mixed with, and never again.
    for number in set(blocks.tolist()):
        (places,) = np.nonzero(blocks == number)
        assert places[-1] - places[0] < BLOCKS_AT_ONCE * block


def test_blocks_are_shuffled_and_mixed():
    order = Words(3).block_permutation(0, 4, 6400, 100)
    assert len(set((order[:800] // 100).tolist())) == 8
    assert (np.diff(order[:800]) == 1).mean() < 0.05
    assert not np.array_equal(order, Words(3).block_permutation(1, 4, 6400, 100))


def test_order_of_a_mixture_is_pinned():
    """A run resumed with another numpy or on another machine must meet this very order."""
    sampler = Sampler(7, 2, seed=7, global_batch_size=6, source_sizes=[4, 3], weights=[1.5, 0.5])
    assert [i for _, i in drawn(sampler, 20)] == [3, 1, 7, 6, 2, 5, 0, 8, 2, 1, 3, 0, 8, 4, 4, 1, 2, 7, 0, 3]
    blocks = Sampler(8, 0, seed=7, global_batch_size=4, shuffle_block=2, modality_lengths=np.array([3, -1] * 4))
    assert [i for _, i in drawn(blocks, 16)] == [3, 1, 5, 7, 2, 4, 6, 0, 0, 2, 6, 4, 3, 1, 5, 7]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"digests": ("other", "b")}, "digest a, this run has other: .*content of --data-path"),
        ({"digests": ("a", "other")}, "contrastive_digest b, .*content of --contrastive-data-path"),
        ({"weights": [1.0, 2.0]}, "weights .*--data-weights"),
        ({"source_sizes": [5, 5]}, "source_sizes .*in their order"),
        ({"shuffle_block": 4}, "--shuffle-block"),
        ({"modality_lengths": np.ones(10)}, "--group-by-modality-length"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, named):
    arguments = {
        "num_samples": 10, "num_contrastive": 2, "seed": 1, "source_sizes": [4, 6], "weights": [1.0, 0.5],
        "digests": ("a", "b"), "global_batch_size": 4,
    }  # fmt: skip
    state = Sampler(**arguments).state_dict()
    Sampler(**arguments).load_state_dict(state)
    with pytest.raises(ValueError, match=named):
        Sampler(**(arguments | change)).load_state_dict(state)


def test_a_source_gives_its_weight_rounded_and_at_least_one() -> None:
    """But nothing where it has nothing."""
    assert [draws_of(*given) for given in ((0, 1.0), (10, 0.25), (10, 0.24), (10, 0.01), (3, 2.5))] == [0, 3, 2, 1, 8]
