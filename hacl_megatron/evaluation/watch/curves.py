"""Scores as curves of TensorBoard, in a folder of their own below the run's.

TensorBoard reads the event files of a folder one after another and does not come back to one that it has left: a
second writer in the trainer's folder would hide what the trainer writes from then on. So these are a run of their own,
shown beside it at the same iterations.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
"""`iteration`, `written` (seconds since 1970, when the checkpoint was) and `scores` by tag."""


def wait_for_the_next_second() -> None:
    """TensorBoard reads event files in the order of their names, which hold the second of their making."""
    time.sleep(1.0 - time.time() % 1.0)


class Curves:
    """Writes them; a context manager.

    Args:
        folder: is made.
        records: of earlier processes, which are written anew: what a kill left out is there, and nothing twice, since
            TensorBoard drops what a folder holds from an iteration on where a writer starts with it.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        self._folder = folder
        self._records = {record["iteration"]: record for record in records}
        self._writer: Any = None
        self._rewrite(0)

    def add(self, record: Record) -> None:
        """A checkpoint's scores, to be seen at once. An iteration that a run has come to again replaces its past."""
        iteration = record["iteration"]
        goes_back = any(iteration <= other for other in self._records)
        self._records[iteration] = record
        if goes_back:
            self._rewrite(iteration)
        else:
            self._write(record)

    def _rewrite(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
            wait_for_the_next_second()
        self._writer = SummaryWriter(str(self._folder), purge_step=first)
        for iteration in sorted(self._records):
            if iteration >= first:
                self._write(self._records[iteration])

    def _write(self, record: Record) -> None:
        for tag, value in record["scores"].items():
            self._writer.add_scalar(tag, value, record["iteration"], walltime=record["written"])
        self._writer.flush()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
