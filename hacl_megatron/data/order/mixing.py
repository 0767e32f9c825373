"""Pure functions that order one epoch: permutations, weighted mixtures, blocks, groups of one modality.

Every one depends on (seed, epoch) and on the data alone, never on ranks or on what was drawn before.

    source A, weight 1.5   pass 0 | pass 1 | pass 2 |     an epoch takes the next 1.5 passes of A's endless row
    source B, weight 0.5   pass 0       | pass 1          and the next half pass of B's, mixed at random
"""

from collections.abc import Callable, Sequence

import numpy as np

BLOCKS_AT_ONCE = 8
"""Blocks of `--shuffle-block` whose samples are mixed with one another."""


class Words:
    """Random 64-bit words of a seed. `stream` tells uses apart, `epoch` epochs or passes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**64

    def draw(self, epoch: int, stream: int, count: int) -> np.ndarray:
        """uint64 [count]. Raw words of a bit generator, which numpy promises never to change (NEP 19); what a
        `Generator` makes of them it may change, and a resumed run must not meet another order."""
        return np.random.Philox(np.random.SeedSequence([self._seed, epoch, stream])).random_raw(count)

    def permutation(self, epoch: int, stream: int, count: int) -> np.ndarray:
        """int64 [count]: 0 .. count - 1 in random order."""
        return np.argsort(self.draw(epoch, stream, count), kind="stable")

    def block_permutation(self, epoch: int, stream: int, count: int, block: int) -> np.ndarray:
        """int64 [count]: blocks of `block` consecutive numbers in random order, 8 at a time mixed with one another.

        What is read at a time then lies in 8 places, which a node's cache can hold when it cannot hold everything.
        """
        numbers = np.arange(count, dtype=np.int64)
        place = np.argsort(self.permutation(epoch, stream, -(-count // block)), kind="stable")
        return np.lexsort((self.draw(epoch, stream + 1, count), place[numbers // block] // BLOCKS_AT_ONCE))


def draws_of(size: int, weight: float) -> int:
    """Samples that a source of `size` gives an epoch: weight x size, rounded (a half up), at least 1."""
    return max(1, int(size * weight + 0.5)) if size else 0


def stretch_of_passes(begin: int, count: int, size: int, one_pass: Callable[[int], np.ndarray]) -> np.ndarray:
    """int64 [count]: places `begin` to `begin + count` of the endless row of passes, each a permutation of `size`."""
    pieces = []
    while count:
        number, start = divmod(begin, size)
        piece = one_pass(number)[start : start + count]
        pieces.append(piece)
        begin, count = begin + len(piece), count - len(piece)
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def interleave(parts: Sequence[np.ndarray], words: np.ndarray) -> np.ndarray:
    """The parts as one row in which their members keep their order; one random word a member says whose turn it is."""
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[np.argsort(words, kind="stable")]
    row = np.empty(len(labels), dtype=np.int64)
    for label, part in enumerate(parts):
        row[labels == label] = part
    return row


def group_by_modality(
    order: np.ndarray, lengths: np.ndarray, window_sizes: np.ndarray, words: np.ndarray
) -> np.ndarray:
    """An order whose windows each hold one modality, longest dialogue first; at most one window is mixed.

    LLaVA's `get_modality_length_grouped_indices` (llava/train/llava_trainer.py) for windows of any sizes, so that none
    is left over: in random order the windows take what they need of the samples with image, then of those without.

    Args:
        order: int64 [n], shuffled sample ids.
        lengths: int64 [num_samples], negative for samples without image.
        window_sizes: int64 [w] with sum n: what each global batch takes of these samples.
        words: uint64 [w], random.
    """
    without_image = lengths[order] < 0
    pool = np.concatenate([order[~without_image], order[without_image]])
    turn = np.argsort(words, kind="stable")
    begins = np.empty(len(window_sizes), dtype=np.int64)
    begins[turn] = np.cumsum(window_sizes[turn]) - window_sizes[turn]
    rows = np.repeat(begins - (np.cumsum(window_sizes) - window_sizes), window_sizes) + np.arange(len(order))
    grouped, window = pool[rows], np.repeat(np.arange(len(window_sizes)), window_sizes)
    return grouped[np.lexsort((-np.abs(lengths[grouped]), window))]
