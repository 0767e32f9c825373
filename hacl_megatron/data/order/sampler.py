"""The order in which samples are drawn: an endless stream of epochs that any global batch size reads on from.

    epoch 0: a permutation of all samples | epoch 1: another one | ...       global batches are cut from the stream

The order depends on (seed, epoch) alone. A global batch may span two epochs, so no tail is ever dropped; data-parallel
ranks take their parts of a global batch (`assignment`), so their number changes nothing about the order. `mixing` has
the permutations, weighted mixtures and groups that an epoch is made of.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hacl_megatron.data.order.mixing import Words, draws_of, group_by_modality, interleave, stretch_of_passes

# Streams of random words within an epoch; a source of a mixture has two from _SOURCES + 2 * its number on.
_ORDINARY, _CONTRASTIVE, _TURNS, _WINDOWS, _ORDINARY_BLOCKS, _CONTRASTIVE_BLOCKS, _SOURCES = 0, 1, 2, 3, 4, 6, 8

_WHAT_TO_KEEP = {
    "num_samples": "samples of --data-path",
    "num_contrastive": "samples of --contrastive-data-path",
    "digest": "content of --data-path",
    "contrastive_digest": "content of --contrastive-data-path",
    "source_sizes": "files of --data-path in their order",
    "weights": "--data-weights",
    "shuffle_block": "--shuffle-block",
    "group_by_modality_length": "--group-by-modality-length",
    "seed": "--seed",
    "shuffle": "shuffling",
}
"""What makes a stream the stream it is, and what the user must give again to go on with it.

A new option is one more here and in `_identity`; `load_state_dict` then refuses states that lack it, unless it is given
the value that they stand for. `loader.build_loader` hands the flags on.
"""


class Sampler:
    """Draws global batches of (epoch, sample id), the only holder of data state.

    Samples 0 .. num_samples - 1 are the ordinary ones, the next num_contrastive the contrastive ones. Each is drawn
    exactly once an epoch; any stretch of an epoch has the contrastive ones' share of it, to within one sample.

    With `weights`, source i gives `round(weights[i] * source_sizes[i])` draws an epoch: the next ones of its own
    endless row of passes, each pass a permutation of the source. So at the end of any epoch no sample of a source was
    drawn more than once more than another, and weight 0.5 takes two epochs for each sample once. The sources' draws
    are mixed at random; the contrastive samples stay at once an epoch.

    Args:
        source_sizes: samples of each source; their sum is num_samples. Needed with `weights` alone.
        modality_lengths: int64 [num_samples], negative for a sample without image: groups the ordinary samples of a
            global batch by modality, longest first (LLaVA's `--group_by_modality_length`).
        shuffle_block: samples are shuffled in blocks of so many consecutive ones, eight blocks at a time; 0: all.
        digests: content of the ordinary and the contrastive samples; a state of other content is refused.

    The groups are as large as the global batch was when the run began; a run that goes on at another one keeps them.
    """

    def __init__(
        self,
        num_samples: int,
        num_contrastive: int,
        *,
        seed: int,
        global_batch_size: int,
        shuffle: bool = True,
        source_sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
        modality_lengths: np.ndarray | None = None,
        shuffle_block: int = 0,
        digests: tuple[str, str] = ("", ""),
    ):
        if num_samples + num_contrastive < 1:
            raise ValueError("There are no samples to draw from: give --data-path or --contrastive-data-path")
        if global_batch_size < 1:
            raise ValueError(f"--global-batch-size is {global_batch_size}, expected at least 1")
        assert shuffle or not (weights or shuffle_block or modality_lengths is not None)
        assert not weights or (len(weights) == len(source_sizes) and sum(source_sizes) == num_samples)
        self.global_batch_size = global_batch_size
        self._identity = {
            "num_samples": int(num_samples),
            "num_contrastive": int(num_contrastive),
            "digest": digests[0],
            "contrastive_digest": digests[1],
            "source_sizes": [int(size) for size in source_sizes] if weights else [],
            "weights": [float(weight) for weight in weights],
            "shuffle_block": int(shuffle_block),
            "group_by_modality_length": modality_lengths is not None,
            "seed": int(seed),
            "shuffle": bool(shuffle),
        }
        self._words = Words(int(seed))
        self._draws = [draws_of(*source) for source in zip(source_sizes, weights, strict=True)] if weights else []
        self._lengths = modality_lengths
        self._group_size = global_batch_size
        self._consumed = 0
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return self._num_ordinary + self._identity["num_contrastive"]

    @property
    def consumed_samples(self) -> int:
        """Samples drawn since the start of the run."""
        return self._consumed

    def next_batch(self) -> list[tuple[int, int]]:
        """The next global batch as (epoch, sample id); the epoch seeds the random choices about the sample."""
        batch = self.peek(self.global_batch_size)
        self._consumed += len(batch)
        return batch

    def peek(self, count: int) -> list[tuple[int, int]]:
        """The next `count` draws as (epoch, sample id), without drawing them."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            epoch, begin = divmod(self._consumed + len(found), self.epoch_size)
            end = min(begin + count - len(found), self.epoch_size)
            found += [(epoch, sample_id) for sample_id in self._epoch_order(epoch)[begin:end].tolist()]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: how many samples were drawn, and from which stream."""
        return {"consumed_samples": self._consumed, "group_size": self._group_size, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, at this sampler's own global batch size.

        Raises ValueError if the state belongs to another stream (other samples, weights, seed or shuffling).
        """
        for key, ours in self._identity.items():
            if key not in state:
                raise ValueError(
                    f"The checkpoint's data state has no {key}: an earlier version wrote it, and its run cannot go on; "
                    "start afresh from the weights with --pretrained-checkpoint"
                )
            if state[key] != ours:
                raise ValueError(
                    f"The checkpoint's data state has {key} {state.get(key)}, this run has {ours}: resume with the "
                    f"same {_WHAT_TO_KEEP[key]}, or start afresh from the weights with --pretrained-checkpoint"
                )
        self._consumed, self._group_size = int(state["consumed_samples"]), int(state["group_size"])
        self._orders.clear()

    @property
    def _num_ordinary(self) -> int:
        return sum(self._draws) if self._draws else self._identity["num_samples"]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int32 or int64 [epoch_size]: the sample ids of one epoch in order; the last two asked for are kept, until all
        of them are drawn: of 20 million samples each takes 80 MB."""
        if epoch not in self._orders:
            order = self._draw_order(epoch)
            self._orders[epoch] = order.astype(np.int32) if len(order) < 2**31 else order
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        for drawn in [other for other in self._orders if other < min(epoch, self._consumed // self.epoch_size)]:
            del self._orders[drawn]
        return self._orders[epoch]

    def _draw_order(self, epoch: int) -> np.ndarray:
        num_samples, num_contrastive = self._identity["num_samples"], self._identity["num_contrastive"]
        order = np.empty(self.epoch_size, dtype=np.int64)
        # The middles of num_contrastive equal stretches of the epoch; distinct, since a stretch is at least 1 long.
        middles = 2 * np.arange(num_contrastive, dtype=np.int64) + 1
        is_contrastive = np.zeros(self.epoch_size, dtype=bool)
        if num_contrastive:
            is_contrastive[middles * self.epoch_size // (2 * num_contrastive)] = True
        ordinary = self._mixture(epoch) if self._draws else self._permutation(epoch, _ORDINARY, num_samples)
        if self._lengths is not None:
            sizes = self._window_sizes(epoch, ~is_contrastive)
            words = self._words.draw(epoch, _WINDOWS, len(sizes))
            ordinary = group_by_modality(ordinary, self._lengths, sizes, words)
        order[~is_contrastive] = ordinary
        order[is_contrastive] = num_samples + self._permutation(epoch, _CONTRASTIVE, num_contrastive)
        return order

    def _mixture(self, epoch: int) -> np.ndarray:
        """int64 [sum of draws]: one epoch of the weighted sources."""
        parts, first = [], 0
        for number, (size, count) in enumerate(zip(self._identity["source_sizes"], self._draws, strict=True)):
            stream = _SOURCES + 2 * number
            parts.append(
                first
                + stretch_of_passes(epoch * count, count, size, lambda n, s=stream, c=size: self._permutation(n, s, c))
            )
            first += size
        return interleave(parts, self._words.draw(epoch, _TURNS, sum(self._draws)))

    def _window_sizes(self, epoch: int, is_ordinary: np.ndarray) -> np.ndarray:
        """How many ordinary samples of the epoch fall into each group of the stream, its first and last cut off."""
        begin, size = epoch * self.epoch_size, self._group_size
        inner = np.arange(-begin % size, self.epoch_size, size)
        borders = np.unique(np.concatenate([[0], inner, [self.epoch_size]]))
        return np.diff(np.concatenate([[0], np.cumsum(is_ordinary)])[borders])

    def _permutation(self, epoch: int, stream: int, size: int) -> np.ndarray:
        if not self._identity["shuffle"]:
            return np.arange(size, dtype=np.int64)
        if self._identity["shuffle_block"]:
            stream = {_ORDINARY: _ORDINARY_BLOCKS, _CONTRASTIVE: _CONTRASTIVE_BLOCKS}.get(stream, stream)
            return self._words.block_permutation(epoch, stream, size, self._identity["shuffle_block"])
        return self._words.permutation(epoch, stream, size)


class OnceThrough:
    """Draws some samples once, in their order; what comes behind the last one counts as a later epoch.

    Args:
        sample_ids: of any manifest, at least one.
    """

    def __init__(self, sample_ids: Sequence[int], global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self._ids, self._at = list(sample_ids), 0

    @property
    def epoch_size(self) -> int:
        """Samples in all."""
        return len(self._ids)

    def next_batch(self) -> list[tuple[int, int]]:
        """The next `global_batch_size` (epoch, sample id)."""
        batch = self.peek(self.global_batch_size)
        self._at += self.global_batch_size
        return batch

    def peek(self, count: int) -> list[tuple[int, int]]:
        """The next `count` draws, not drawn yet."""
        size = len(self._ids)
        return [(at // size, self._ids[at % size]) for at in range(self._at, self._at + count)]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: whoever goes on asks for the rest."""
        return {}
