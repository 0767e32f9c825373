"""`--eval-tasks`: caption preference and retrieval on the validation data while a model trains."""

import math
from collections.abc import Callable, Mapping

import torch.distributed as dist

from hacl_megatron.evaluation.likelihood.item_packs import ItemReader
from hacl_megatron.evaluation.likelihood.task import Task
from hacl_megatron.evaluation.likelihood.task_run import NOT_FINITE, TaskRunner


class ValidationTasks:
    """Called by every rank at each validation.

    Args:
        tasks: by name, in the same order on every rank; None on the ranks that do not read data.
        make_runner: gives a runner around a reader, or around None.
        make_reader: on the ranks that read data.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task | None],
        make_runner: Callable[[ItemReader | None], TaskRunner],
        make_reader: Callable[[], ItemReader] | None,
    ) -> None:
        self.tasks = tasks
        self.make_runner = make_runner
        self.make_reader = make_reader

    def __call__(self) -> dict[str, float]:
        """Scalars by tag, such as "preference accuracy sum", on rank 0; nothing elsewhere."""
        runner = self.make_runner(None if self.make_reader is None else self.make_reader())
        try:
            scalars: dict[str, float] = {}
            for name, task in self.tasks.items():
                records = runner.run(task)
                # What a comparison of NaN says, such as an accuracy of 0, says nothing.
                if dist.get_rank() == 0 and not any(record.get(NOT_FINITE) for record in records):
                    metrics = task.score(records).metrics
                    scalars |= {
                        f"{name} {metric}": value
                        for metric, value in metrics.items()
                        if value is not None and math.isfinite(value)
                    }
            return scalars
        finally:
            runner.close()
