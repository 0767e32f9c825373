"""Which rank and micro-batch runs which sample of a global batch.

Losses are means over the global batch, so the assignment changes nothing but the time a step takes: micro-batches of
even lengths keep pipeline stages and data-parallel ranks from waiting for one another. Every rank computes the same
assignment from the lengths alone.
"""

import heapq
from collections.abc import Sequence


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


def _longest_first(costs: Sequence[int], num_bins: int, capacity: int) -> list[list[int]]:
    """Longest processing time first: each sample, from the longest on, into the bin with least in it that has room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    open_bins = [(0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, index = heapq.heappop(open_bins)
        bins[index].append(item)
        if len(bins[index]) < capacity:
            heapq.heappush(open_bins, (load + costs[item], index))
    return bins


def _deal(bins: list[list[int]], costs: Sequence[int], data_parallel_size: int) -> list[list[list[int]]]:
    """Bins to ranks, back and forth from the fullest to the emptiest, so that the ranks' sums are even too."""
    ordered = sorted((sorted(bin_) for bin_ in bins), key=lambda bin_: (-sum(costs[item] for item in bin_), bin_))
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for start in range(0, len(ordered), data_parallel_size):
        group = ordered[start : start + data_parallel_size]
        order = reversed(group) if start // data_parallel_size % 2 else group
        for rank, bin_ in enumerate(order):
            ranks[rank].append(bin_)
    return ranks
