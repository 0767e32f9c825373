"""The order in which samples are drawn: an endless stream of epochs that any global batch size reads on from.

    epoch 0: a permutation of all samples | epoch 1: another one | ...       global batches are cut from the stream

The order depends on (seed, epoch) alone. A global batch may span two epochs, so no tail is ever dropped; data-parallel
ranks take their parts of a global batch (`hacl_megatron.data.assignment`), so their number changes nothing about the
order.
"""

from typing import Any

import numpy as np


class Sampler:
    """Draws global batches of (epoch, sample id), the only holder of data state.

    Samples 0 .. num_samples - 1 are the ordinary ones, the next num_contrastive the contrastive ones. Each is drawn
    exactly once an epoch; any stretch of an epoch has the contrastive ones' share of it, to within one sample.
    """

    def __init__(
        self, num_samples: int, num_contrastive: int, *, seed: int, global_batch_size: int, shuffle: bool = True
    ):
        if num_samples + num_contrastive < 1:
            raise ValueError("There are no samples to draw from: give --data-path or --contrastive-data-path")
        if global_batch_size < 1:
            raise ValueError(f"--global-batch-size is {global_batch_size}, expected at least 1")
        self.global_batch_size = global_batch_size
        self._identity = {
            "num_samples": int(num_samples),
            "num_contrastive": int(num_contrastive),
            "seed": int(seed),
            "shuffle": bool(shuffle),
        }
        self._consumed = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return self._identity["num_samples"] + self._identity["num_contrastive"]

    @property
    def consumed_samples(self) -> int:
        """Samples drawn since the start of the run."""
        return self._consumed

    def next_batch(self) -> list[tuple[int, int]]:
        """The next global batch as (epoch, sample id); the epoch seeds the random choices about the sample."""
        batch: list[tuple[int, int]] = []
        while len(batch) < self.global_batch_size:
            epoch, begin = divmod(self._consumed, self.epoch_size)
            end = min(begin + self.global_batch_size - len(batch), self.epoch_size)
            batch += [(epoch, sample_id) for sample_id in self._epoch_order(epoch)[begin:end].tolist()]
            self._consumed += end - begin
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: how many samples were drawn, and from which stream."""
        return {"consumed_samples": self._consumed, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, at this sampler's own global batch size.

        Raises ValueError if the state belongs to another stream (other sizes, seed or shuffling).
        """
        names = {
            "num_samples": "the samples of --data-path",
            "num_contrastive": "the samples of --contrastive-data-path",
            "seed": "--seed",
            "shuffle": "shuffling",
        }
        for key, ours in self._identity.items():
            if state.get(key) != ours:
                raise ValueError(
                    f"The checkpoint's data state has {key} {state.get(key)}, this run has {ours}: resume with the "
                    f"same {names[key]}, or start afresh from the weights with --pretrained-checkpoint"
                )
        self._consumed = int(state["consumed_samples"])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int64 [epoch_size]: the sample ids of one epoch in order; the last epoch asked for is kept."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw_order(epoch)
        return self._order

    def _draw_order(self, epoch: int) -> np.ndarray:
        num_samples, num_contrastive = self._identity["num_samples"], self._identity["num_contrastive"]
        order = np.empty(self.epoch_size, dtype=np.int64)
        # The middles of num_contrastive equal stretches of the epoch; distinct, since a stretch is at least 1 long.
        middles = 2 * np.arange(num_contrastive, dtype=np.int64) + 1
        is_contrastive = np.zeros(self.epoch_size, dtype=bool)
        if num_contrastive:
            is_contrastive[middles * self.epoch_size // (2 * num_contrastive)] = True
        order[~is_contrastive] = self._permutation(epoch, 0, num_samples)
        order[is_contrastive] = num_samples + self._permutation(epoch, 1, num_contrastive)
        return order

    def _permutation(self, epoch: int, stream: int, size: int) -> np.ndarray:
        if not self._identity["shuffle"]:
            return np.arange(size, dtype=np.int64)
        # Sorting raw words of a bit generator, which numpy promises never to change; Generator.permutation it may
        # change between versions (NEP 19), and a resumed run must not meet another order.
        seeds = np.random.SeedSequence([self._identity["seed"] % 2**64, epoch, stream])
        return np.argsort(np.random.Philox(seeds).random_raw(size), kind="stable")
