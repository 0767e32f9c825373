"""Which rank and micro-batch runs which sample of a global batch.

Losses are means over the global batch, so the assignment changes nothing but the time a step takes: micro-batches of
even lengths keep pipeline stages and data-parallel ranks from waiting for one another. Every rank computes the same
assignment from the same lengths alone.

    all samples as much work for the tower    `balanced`, `within_tokens`: rows, over the micro-batches of all ranks
    some more than others                     `evened`, `evened_within_tokens`: FLOPs over ranks, then within each rank
                                              rows, which decide its memory; nobody waits for a single micro-batch but
                                              the stages of a pipeline, and with one it is FLOPs there too
"""

import heapq
from collections.abc import Sequence

import numpy as np


def in_order(num_samples: int, *, micro_batch_size: int, data_parallel_size: int) -> list[list[list[int]]]:
    """Positions in the global batch, [rank][micro-batch]: the ranks' m-th micro-batches are one contiguous part of it.

    Raises ValueError if the global batch does not divide into micro-batches.
    """
    stride = micro_batch_size * data_parallel_size
    if num_samples % stride:
        raise ValueError(
            f"A global batch of {num_samples} samples does not divide into micro-batches of {micro_batch_size} on "
            f"{data_parallel_size} data-parallel ranks: make --global-batch-size a multiple of {stride}"
        )
    return [
        [
            list(range(start, start + micro_batch_size))
            for start in range(rank * micro_batch_size, num_samples, stride)
        ]
        for rank in range(data_parallel_size)
    ]  # fmt: skip


def balanced(costs: Sequence[int], *, micro_batch_size: int, data_parallel_size: int) -> list[list[list[int]]]:
    """As `in_order`, with equally many samples in each micro-batch but even sums of `costs` (rows of each sample)."""
    num_bins = len(in_order(len(costs), micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)[0])
    num_bins *= data_parallel_size
    return _deal(_longest_first(costs, num_bins, micro_batch_size), costs, data_parallel_size)


def within_tokens(costs: Sequence[int], *, micro_batch_tokens: int, data_parallel_size: int) -> list[list[list[int]]]:
    """Positions in the global batch, [rank][micro-batch], equally many micro-batches on every rank.

    As few as keep each at `micro_batch_tokens` rows or below; a single sample of more rows gets a micro-batch to
    itself. There may be empty ones when there are fewer samples than ranks.
    """
    limit = max(micro_batch_tokens, max(costs, default=0))
    num_micro_batches = max(1, -(-sum(costs) // (limit * data_parallel_size)))
    while True:
        bins = _longest_first(costs, num_micro_batches * data_parallel_size, len(costs))
        if max(sum(costs[item] for item in bin_) for bin_ in bins) <= limit:
            return _deal(bins, costs, data_parallel_size)
        num_micro_batches += 1


def evened(
    costs: np.ndarray, weights: Sequence[float], *, micro_batch_size: int, data_parallel_size: int
) -> list[list[list[int]]]:
    """As `in_order`, with equally many samples in each micro-batch, but ranks that have as much to do.

    Args:
        costs: float64 [n, stages]: each sample's FLOPs on the stages of a pipeline whose slowest is what counts.
        weights: what is evened out among a rank's own micro-batches.
    """
    num_micro_batches = len(
        in_order(len(costs), micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)[0]
    )
    return [
        _fullest_first(_longest_first(weights, num_micro_batches, micro_batch_size, own), weights)
        for own in _to_ranks(costs, data_parallel_size, num_micro_batches * micro_batch_size)
    ]


def evened_within_tokens(
    costs: np.ndarray, rows: Sequence[int], *, micro_batch_tokens: int, data_parallel_size: int
) -> list[list[list[int]]]:
    """As `within_tokens`, with ranks that have as much to do (`evened`).

    A rank with little work for the tower gets more rows, so there may be more micro-batches than `within_tokens` makes.
    """
    limit = max(micro_batch_tokens, max(rows, default=0))
    ranks = _to_ranks(costs, data_parallel_size, len(rows))
    num_micro_batches = max(1, *(-(-sum(rows[item] for item in own) // limit) for own in ranks))
    while True:
        found = [_longest_first(rows, num_micro_batches, len(rows), own) for own in ranks]
        if all(sum(rows[item] for item in bin_) <= limit for bins in found for bin_ in bins):
            return [_fullest_first(bins, rows) for bins in found]
        num_micro_batches += 1


def _to_ranks(costs: np.ndarray, data_parallel_size: int, capacity: int) -> list[list[int]]:
    """Longest processing time first: each sample, from the costliest on, to the rank with room whose slowest stage then
    has least to do."""
    load, room = np.zeros((data_parallel_size, costs.shape[1])), np.full(data_parallel_size, capacity)
    ranks: list[list[int]] = [[] for _ in range(data_parallel_size)]
    for item in np.argsort(-costs.max(axis=1), kind="stable").tolist():
        rank = int(np.where(room > 0, (load + costs[item]).max(axis=1), np.inf).argmin())
        ranks[rank].append(item)
        load[rank] += costs[item]
        room[rank] -= 1
    return ranks


def _longest_first(
    costs: Sequence[float], num_bins: int, capacity: int, items: Sequence[int] | None = None
) -> list[list[int]]:
    """Longest processing time first: each sample, from the longest on, into the bin with least in it that has room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    open_bins: list[tuple[float, int]] = [(0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)) if items is None else items, key=lambda item: (-costs[item], item)):
        load, index = heapq.heappop(open_bins)
        bins[index].append(item)
        if len(bins[index]) < capacity:
            heapq.heappush(open_bins, (load + costs[item], index))
    return bins


def _deal(bins: list[list[int]], costs: Sequence[int], data_parallel_size: int) -> list[list[list[int]]]:
    """Bins to ranks, back and forth from the fullest to the emptiest, so that the ranks' sums are even too."""
    ordered = _fullest_first(bins, costs)
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for start in range(0, len(ordered), data_parallel_size):
        group = ordered[start : start + data_parallel_size]
        order = reversed(group) if start // data_parallel_size % 2 else group
        for rank, bin_ in enumerate(order):
            ranks[rank].append(bin_)
    return ranks


def _fullest_first(bins: list[list[int]], costs: Sequence[float]) -> list[list[int]]:
    return sorted((sorted(bin_) for bin_ in bins), key=lambda bin_: (-sum(costs[item] for item in bin_), bin_))
