"""What every rank does and spends in a step by itself, so that the one that the others wait for can be named.

A step takes the same time on all ranks, since they meet in its collectives. A rank's *own* time is what it waits for
data, and what its forward and backward passes take, without receiving from other pipeline stages and without the
collectives over data-parallel ranks. Tensor- and context-parallel ranks wait for one another inside a pass, so a slow
one shows on all of its group. Stages with more work than others show too: the run waits for them just the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

import torch

from hacl_megatron.platform.device import Stopwatch


class OwnTime:
    """Times this rank's passes while it `is_on`. It is also what megatron-core takes as `config.timers`."""

    def __init__(self, device: torch.device) -> None:
        self.is_on = False
        self._stopwatch = Stopwatch(device)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass of this stage."""
        self.start()
        yield
        self.stop()

    def take(self) -> float:
        """Seconds since the last call; times no more."""
        self.is_on = False
        return self._stopwatch.take()

    def __call__(self, name: str, log_level: int = 0) -> "OwnTime | _NoTimer":
        """megatron-core's schedules ask for a timer by name; of theirs, one is without waiting."""
        return self if name == "backward-compute" else _NO_TIMER

    def start(self, barrier: bool = False) -> None:
        if self.is_on:
            self._stopwatch.start()

    def stop(self, barrier: bool = False) -> None:
        if self.is_on:
            self._stopwatch.stop()


class _NoTimer:
    def start(self, barrier: bool = False) -> None: ...
    def stop(self, barrier: bool = False) -> None: ...


_NO_TIMER = _NoTimer()


@dataclass(frozen=True, kw_only=True)
class RankNumbers:
    """One rank's share in a logged step."""

    flops: float
    """Its share of what the step needs."""
    own_seconds: float
    """Without the wait for data."""
    data_wait: float
    """Seconds; 0 on ranks that read no data."""
    memory: float
    """Bytes."""

    def slots(self, rank: int, world_size: int) -> list[float]:
        """For a sum over all ranks that gathers: this rank's numbers at its place, zeros elsewhere."""
        own = list(vars(self).values())
        return [0.0] * (rank * len(own)) + own + [0.0] * ((world_size - rank - 1) * len(own))

    @classmethod
    def of_slots(cls, summed: Sequence[float]) -> "list[RankNumbers]":
        """Every rank's numbers out of the summed `slots`."""
        names = list(cls.__dataclass_fields__)
        rows = (summed[start : start + len(names)] for start in range(0, len(summed), len(names)))
        return [cls(**dict(zip(names, row, strict=True))) for row in rows]


def rank_scalars(
    ranks: Sequence[RankNumbers], seconds: float, *, memory_tag: str, peak_flops: float | None
) -> dict[str, float]:
    """What is logged of all ranks' numbers in a step of `seconds`.

    `rank-time-spread` is the slowest rank's own time over the median rank's (of two, the faster's), `slowest-rank` its
    number. `mfu` is there on devices with a known peak.
    """
    times = [rank.own_seconds + rank.data_wait for rank in ranks]
    slowest = max(range(len(times)), key=times.__getitem__)
    middle = median_low(times)
    flops = sum(rank.flops for rank in ranks) / seconds / len(ranks)
    scalars = {
        "throughput": flops / 1e12,
        "model-tflops-per-gpu": flops / 1e12,
        "data-wait-share": max(rank.data_wait for rank in ranks) / seconds,
        "rank-time-spread": times[slowest] / middle if middle else 1.0,
        "slowest-rank": slowest,
        memory_tag: max(rank.memory for rank in ranks),
    }
    if peak_flops is not None:
        scalars["mfu"] = flops / peak_flops
    return scalars
