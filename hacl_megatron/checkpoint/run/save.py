"""Saves a run's checkpoints while it goes on: a copy in host memory is all that training waits for.

    main thread:  state ─ this rank's parts ─ copy ┐                     (or, without `asynchronous`, all of it)
    background:          frozen part, once ─ files of all ranks ─ index, rename, latest (`publish`) ─ old ones deleted

The ranks' background threads talk over a gloo group of their own, so that nothing of the training's traffic is touched.
Each phase ends with every rank knowing whether it went well everywhere: a save is whole or is not there, and a full
disk ends the save, not the run.
"""

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hacl_megatron.checkpoint.run.frozen import digest_of, finish_frozen, folder_name, references, value_sums
from hacl_megatron.checkpoint.run.host_copies import empty_copies
from hacl_megatron.checkpoint.run.integrity import FROZEN_FOLDER
from hacl_megatron.checkpoint.run.local_parts import local_parts
from hacl_megatron.checkpoint.run.part_files import (
    Part,
    StoredPart,
    error_of_system,
    not_finite,
    serialized,
    write_parts,
)
from hacl_megatron.checkpoint.run.publish import begin, partial_folder, publish
from hacl_megatron.checkpoint.run.retain import last_finite, prune

_TIMEOUT = timedelta(hours=2)
"""How long the fastest rank waits for the slowest one's disk."""

_Result = TypeVar("_Result")


class _NotSaved(Exception):
    """A save failed, on some rank; all ranks raise it, with the same words."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    iteration: int
    parts: list[Part]
    """What changes in training: copies, if training goes on."""
    frozen: list[Part]
    common: bytes
    run_config: str
    write_assets: Callable[[Path], None]


class CheckpointSaver:
    """Writes the checkpoints of one run. Every rank has one and calls it at the same iterations.

    Args:
        save: the SAVE folder.
        asynchronous: write in the background. Each rank then keeps a copy of what it writes in host memory.
        newest: how many checkpoints are kept; None keeps all.
        every: iterations divisible by this are kept for ever.
        check: called on rank 0 before it changes anything in `save`; raises ValueError where that is no longer its own.
        replica, num_replicas: this rank's data-parallel rank, and how many there are: they share the work.
    """

    def __init__(
        self,
        save: Path,
        *,
        asynchronous: bool = True,
        newest: int | None = None,
        every: int | None = None,
        check: Callable[[], None] = lambda: None,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._save = save
        self._asynchronous = asynchronous
        self._newest, self._every, self._check = newest, every, check
        self._replica, self._num_replicas = replica, num_replicas
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._notes: deque[str] = deque()
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._digest: str | None = None
        """Of the frozen part, once it was computed; on rank 0."""

    def save(
        self,
        iteration: int,
        state: Callable[[], dict[str, Any]],
        *,
        frozen: frozenset[str] = frozenset(),
        run_config: str,
        write_assets: Callable[[Path], None],
        asynchronous: bool | None = None,
    ) -> None:
        """Start a save, after the one that may be under way; without `asynchronous`, also finish it.

        Args:
            state: gives this rank's sharded state dict.
            frozen: keys of the tensors in it that never change (`local_parts.frozen_keys`).
            run_config: text of `run_config.yaml`.
            write_assets: puts tokenizer and image-processor files into the folder that it is given.
            asynchronous: default as the saver.
        """
        self.wait()
        asynchronous = self._asynchronous if asynchronous is None else asynchronous
        parts, common = local_parts(state(), replica=self._replica, num_replicas=self._num_replicas)
        changing = [part for part in parts if part.key not in frozen]
        job = _Job(
            iteration=iteration,
            parts=self._copied(changing) if asynchronous else changing,
            frozen=[part for part in parts if part.key in frozen],
            common=serialized(common) if dist.get_rank() == 0 else b"",
            run_config=run_config,
            write_assets=write_assets,
        )
        if not asynchronous:
            self._run(job)
            return
        # A daemon, for a process that must die must not wait for its disk; `wait` and `close` do.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> str | None:
        """Wait until nothing is being written; why the last save failed, the same on all ranks, or None."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return "it is still being written"
            self._thread = None
        return self._error

    def notes(self) -> list[str]:
        """What became of saves since the last call, in words for the user; on rank 0."""
        found = []
        while self._notes:
            found.append(self._notes.popleft())
        return found

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is being written (not longer than `seconds`: the other ranks may be gone), then release."""
        self.wait(seconds)
        if self._thread is None and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    # ------------------------------------------------------------------------------------------- before the background

    def _copied(self, parts: list[Part]) -> list[Part]:
        """The parts with copies of their values in host memory, which every save reuses."""
        values = {(part.key, part.offsets): part.values for part in parts if isinstance(part.values, Tensor)}
        held = {
            place: copy
            for place, copy in self._copies.items()
            if place in values and (copy.shape, copy.dtype) == (values[place].shape, values[place].dtype)
        }
        self._copies = {}  # frees what is of no more use before more is asked for
        missing = [place for place in values if place not in held]
        held |= zip(missing, empty_copies([values[place] for place in missing]), strict=True)
        for place, tensor in values.items():
            held[place].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in values.values()):
            torch.cuda.synchronize()
        self._copies = held
        return [
            replace(part, values=held[part.key, part.offsets]) if isinstance(part.values, Tensor) else part
            for part in parts
        ]

    # ---------------------------------------------------------------------------------------------------- in background

    def _run(self, job: _Job) -> None:
        started = time.perf_counter()
        try:
            # A new thread begins on the first GPU, whichever is this rank's.
            if gpu := next(
                (p.values.device for p in job.frozen if isinstance(p.values, Tensor) and p.values.is_cuda), None
            ):
                torch.cuda.set_device(gpu)
            self._write(job)
        except Exception as error:
            # An error of the group itself too: a rank is gone.
            self._error = str(error) if isinstance(error, _NotSaved) else _one_line(error)
            self._notes.append(f"iteration {job.iteration} was NOT saved, the run goes on without: {self._error}")
            if dist.get_rank() == 0:  # what is there of it takes the room that the next attempt needs
                with suppress(ValueError):  # another run's by now
                    self._check()
                    shutil.rmtree(partial_folder(self._save, job.iteration), ignore_errors=True)
        else:
            self._error = None
            seconds = time.perf_counter() - started
            self._notes.append(f"saved iteration {job.iteration} to {self._save} ({seconds:.1f} s)")

    def _write(self, job: _Job) -> None:
        self._together(lambda: self._on_rank_0(self._check))
        self._together(lambda: self._on_rank_0(begin, self._save, job.iteration))
        frozen, mixed = self._write_frozen(job)
        parts = job.parts + [part for part in job.frozen if part.key in mixed]
        partial = partial_folder(self._save, job.iteration)
        stored = self._together(lambda: (write_parts(partial, parts, dist.get_rank()), not_finite(parts)))
        index = frozen + [part for own, _ in stored for part in own]
        self._together(lambda: self._on_rank_0(self._finish, job, index, [key for _, key in stored if key]))

    def _write_frozen(self, job: _Job) -> tuple[list[StoredPart], frozenset[str]]:
        """See that the frozen part is on disk. Its parts, on rank 0, and the keys that train on some other rank."""
        keys = self._together(lambda: ({p.key for p in job.parts}, {p.key for p in job.frozen}))
        mixed = frozenset(set().union(*(own for own, _ in keys)) & set().union(*(own for _, own in keys)))
        any_frozen, mixed, known = self._told((any(own - mixed for _, own in keys), mixed, self._digest is not None))
        if not any_frozen:
            return [], mixed
        parts = [part for part in job.frozen if part.key not in mixed]
        if not known:
            sums = self._together(lambda: value_sums(parts))
            self._digest = digest_of(sums) if dist.get_rank() == 0 else None
        named = self._together(lambda: self._on_rank_0(folder_name, self._save, self._digest))
        name = self._told(named[0] if named else "")
        found = self._together(lambda: self._on_rank_0(references, self._save, name))
        if self._told(bool(found) and found[0] is None):
            partial = self._save / FROZEN_FOLDER / f"{name}.partial"
            self._together(lambda: self._on_rank_0(_make_fresh, partial))
            stored = self._together(lambda: write_parts(partial, parts, dist.get_rank()))
            self._together(lambda: self._on_rank_0(finish_frozen, partial, name, [p for own in stored for p in own]))
            found = self._together(lambda: self._on_rank_0(references, self._save, name))
        return (found[0] or []) if found else [], mixed

    def _finish(self, job: _Job, stored: list[StoredPart], broken: list[str]) -> None:
        """Rank 0: make it the latest checkpoint, then delete old ones.

        Args:
            broken: keys of tensors with values that are not finite.
        """
        self._check()
        publish(
            self._save,
            job.iteration,
            stored,
            common=job.common,
            run_config=job.run_config,
            write_assets=job.write_assets,
            not_finite=broken[0] if broken else None,
        )
        if broken:
            last = last_finite(self._save, up_to=job.iteration)
            kept = "there is no finite one" if last is None else f"the last finite one, iteration {last}, is kept"
            self._notes.append(
                f"iteration {job.iteration} holds values that are not finite, the first in {broken[0]}: {kept}"
            )
        if self._newest is not None:
            try:
                prune(self._save, latest=job.iteration, newest=self._newest, every=self._every)
            except OSError as error:  # what was saved is saved
                self._notes.append(f"an old checkpoint could not be deleted: {_one_line(error)}")

    # ------------------------------------------------------------------------------------------------ between the ranks

    def _on_rank_0(self, work: Callable[..., _Result], *arguments: Any) -> _Result | None:
        return work(*arguments) if dist.get_rank() == 0 else None

    def _together(self, work: Callable[[], _Result]) -> list[_Result]:
        """Do `work` on every rank. All ranks' results on rank 0, [] elsewhere; _NotSaved everywhere if any failed."""
        rank = dist.get_rank()
        try:
            mine = (None, work())
        except Exception as error:
            mine = (f"rank {rank}: {_one_line(error)}", None)
        everywhere: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(mine, everywhere, dst=0, group=self._group)
        errors = [error for error, _ in everywhere or [] if error is not None]
        more = f", and {len(errors) - 1} more ranks" if len(errors) > 1 else ""
        error = self._told(errors[0] + more if errors else None)
        if error is not None:
            raise _NotSaved(error)
        return [result for _, result in everywhere or []]

    def _told(self, value: _Result) -> _Result:
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _make_fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _one_line(error: BaseException) -> str:
    error = error_of_system(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({os.fspath(error.filename)})' if error.filename else ''}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
