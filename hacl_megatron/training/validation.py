"""Validation between two steps: losses on held-out batches, always the same ones, and `--eval-tasks`."""

from collections.abc import Callable
from math import ceil

import torch.distributed as dist

from hacl_megatron.batch import BadSample
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.training.losses import GlobalCounts, StepMetrics
from hacl_megatron.training.reporting.bad_samples import of_all_ranks
from hacl_megatron.training.reporting.scalars import mean_losses
from hacl_megatron.training.step import Step

_NAMED = 3
"""So many unusable samples are named."""


class Validation:
    """Every rank has one and calls it at the same iterations.

    Args:
        make_loader: gives a loader that starts at the first validation sample, None on the ranks that read no data.
        num_batches: `--eval-iters`; fewer are made where the samples end before.
        batch_size: samples of each, over all ranks.
        evaluate_tasks: `--eval-tasks`: further scalars, on the rank with the log.
    """

    def __init__(
        self,
        make_loader: Callable[[], StepLoader | None],
        *,
        num_batches: int,
        batch_size: int,
        evaluate_tasks: Callable[[], dict[str, float]] | None,
    ) -> None:
        self._make_loader, self._num_batches, self._evaluate_tasks = make_loader, num_batches, evaluate_tasks
        self._batch_size = batch_size
        self._until_end: int | None = None
        self._has_told_bad = False

    def __call__(self, step: Step, beat: Callable[[], None], say: Callable[[str], None]) -> dict[str, float]:
        """Means over the batches by tag; `beat` is called behind each batch, `say` shows the user a line."""
        totals: list[tuple[StepMetrics, GlobalCounts]] = []
        bad: list[BadSample] = []
        loader = self._make_loader()
        try:
            for _ in range(self._batches_until_end(loader, say)):
                batches = next(loader) if loader is not None else None
                bad += [] if batches is None else batches.bad_samples
                micro_batches, counts = step.receive(batches)
                totals.append((step.evaluate(micro_batches, counts), counts))
                beat()
        finally:
            if loader is not None:
                loader.close()
        if not self._has_told_bad:  # the same samples each time
            self._tell_bad(of_all_ranks(bad), say)
        means = mean_losses(totals)
        if self._evaluate_tasks is not None:
            means |= self._evaluate_tasks()
        return means

    def _tell_bad(self, bad: list[BadSample], say: Callable[[str], None]) -> None:
        self._has_told_bad = True
        if bad:
            named = sorted(bad, key=lambda sample: sample.sample_id)
            first = "; ".join(f"{sample.name}: {sample.reason}" for sample in named[:_NAMED])
            say(f"validation goes without {len(bad)} unusable samples of --valid-data-path ({first})")

    def _batches_until_end(self, loader: StepLoader | None, say: Callable[[str], None]) -> int:
        """At most `--eval-iters`, no further than each sample once; the first time, a line where they end before."""
        if self._until_end is None:
            box = [None if loader is None else loader.num_samples]
            dist.broadcast_object_list(box, src=0)
            self._until_end = min(self._num_batches, ceil(box[0] / self._batch_size))
            asked = self._num_batches * self._batch_size
            if asked > box[0]:
                say(
                    f"validation ends with the {box[0]} samples of --valid-data-path, after {self._until_end} global "
                    f"batches; --eval-iters {self._num_batches} asks for {asked} samples"
                )
        return self._until_end
