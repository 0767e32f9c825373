"""Validation between two steps: losses on held-out batches, always the same ones, and `--eval-tasks`."""

from collections.abc import Callable

from hacl_megatron.data.loader import StepLoader
from hacl_megatron.training.reporting.scalars import mean_losses
from hacl_megatron.training.step import GlobalCounts, Step, StepMetrics


class Validation:
    """Every rank has one and calls it at the same iterations.

    Args:
        make_loader: gives a loader that starts at the first validation sample, None on the ranks that read no data.
        num_batches: `--eval-iters`.
        evaluate_tasks: `--eval-tasks`: further scalars, on the rank with the log.
    """

    def __init__(
        self,
        make_loader: Callable[[], StepLoader | None],
        *,
        num_batches: int,
        evaluate_tasks: Callable[[], dict[str, float]] | None,
    ) -> None:
        self._make_loader, self._num_batches, self._evaluate_tasks = make_loader, num_batches, evaluate_tasks

    def __call__(self, step: Step, beat: Callable[[], None]) -> dict[str, float]:
        """Means over the batches by tag; `beat` is called behind each batch."""
        totals: list[tuple[StepMetrics, GlobalCounts]] = []
        loader = self._make_loader()
        try:
            for _ in range(self._num_batches):
                micro_batches, counts = step.receive(next(loader) if loader is not None else None)
                totals.append((step.evaluate(micro_batches, counts), counts))
                beat()
        finally:
            if loader is not None:
                loader.close()
        means = mean_losses(totals)
        if self._evaluate_tasks is not None:
            means |= self._evaluate_tasks()
        return means
