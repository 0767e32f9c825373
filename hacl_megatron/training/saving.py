"""When a run's checkpoints are written, and what becomes of the run where one cannot be.

What a checkpoint holds is in `state`; how files become a checkpoint, while training goes on, in `checkpoint.run.save`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hacl_megatron.assemble.run import Run
from hacl_megatron.checkpoint.run.load import state_metadata
from hacl_megatron.checkpoint.run.local_parts import frozen_keys
from hacl_megatron.checkpoint.run.save import CheckpointSaver
from hacl_megatron.config.run import to_yaml
from hacl_megatron.platform.folder_lock import FolderLock
from hacl_megatron.training.reporting.status import TrainingStopped
from hacl_megatron.training.state import Progress, run_state
from hacl_megatron.training.trainee import Trainee

_LAST_SAVE_SECONDS = 60
"""How long a run that fails waits for a checkpoint that is being written."""


class Saving:
    """Saves one run to `--save`; without the flag it does nothing. Every rank has one and calls it at the same times.

    Args:
        saved_at: iteration that is on disk already, the one that was resumed.
        write_assets: puts tokenizer and processor files into a folder of each checkpoint.
        say: writes a line into the run's log, on rank 0; the notes are there.
        lock: of --save, on rank 0.
    """

    def __init__(
        self,
        run: Run,
        trainee: Trainee,
        *,
        saved_at: int,
        write_assets: Callable[[Path], None],
        say: Callable[[str], None] | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        checkpoint, groups = run.config.checkpoint, run.groups
        self._config, self._trainee, self._write_assets = run.config, trainee, write_assets
        self._saved_at, self._say, self._lock = saved_at, say, lock
        self._stall = 0.0
        self._frozen = frozen_keys(trainee.module.sharded_state_dict(metadata=state_metadata()))
        self._saver = None
        if checkpoint.save is not None:
            self._saver = CheckpointSaver(
                Path(checkpoint.save),
                asynchronous=checkpoint.async_save,
                newest=checkpoint.save_retain,
                every=checkpoint.save_keep_interval,
                check=(lambda: None) if lock is None else lock.check,
                replica=groups.dp_cp.rank(),
                num_replicas=groups.dp_cp.size(),
            )

    def save(
        self, progress: Progress, data_state: dict[str, Any], *, finish: bool = False, again: bool = False
    ) -> None:
        """Save this iteration unless that was done. With `finish` it is on disk afterwards, or the run ends saying why.

        A save that fails otherwise is a note, and the next one is tried when it is due.

        Args:
            data_state: counts on rank 0; ranks that read no data have not seen it move on.
            again: also where this iteration was saved: something else has changed.

        Raises:
            TrainingStopped: with `finish`, twice in a row it could not be written.
        """
        if self._saver is None:
            return
        if again or self._saved_at != progress.iteration:
            self._start(progress, data_state, asynchronous=None if not finish else False)
        if not finish:
            return
        if self._saver.wait() is not None:
            self.say_notes()
            self._start(progress, data_state, asynchronous=False)  # once more: it may have been a moment's
        if (error := self._saver.wait()) is not None:
            raise TrainingStopped(
                f"iteration {progress.iteration} could not be saved to {self._config.checkpoint.save} ({error}): "
                "make room and resume with --load from the last checkpoint that is there"
            )

    def _start(self, progress: Progress, data_state: dict[str, Any], *, asynchronous: bool | None) -> None:
        started = time.perf_counter()
        self._trainee.gather_parameters()
        self._saver.save(
            progress.iteration,
            lambda: run_state(self._trainee, progress, _of_rank_0(data_state)),
            frozen=self._frozen,
            run_config=to_yaml(self._config),
            write_assets=self._write_assets,
            asynchronous=asynchronous,
        )
        self._saved_at = progress.iteration
        self._stall += time.perf_counter() - started

    def say_notes(self) -> None:
        """Tell the user what became of saves since the last call."""
        for note in [] if self._saver is None or self._say is None else self._saver.notes():
            self._say(note)

    def why_no_more(self) -> str | None:
        """Why this run can save no more, on rank 0: another process has taken --save, which held this one for dead."""
        return "--save was taken over by another run" if self._lock is not None and self._lock.is_lost else None

    def take_stall(self) -> float:
        """Seconds that saves have kept this rank from training since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def close(self) -> None:
        """Let what is being saved reach the disk, for a while: after a failure the other ranks may be gone."""
        if self._saver is not None:
            self._saver.close(_LAST_SAVE_SECONDS)


def _of_rank_0(value: dict[str, Any]) -> dict[str, Any]:
    """megatron-core wants the same on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
