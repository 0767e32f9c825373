"""Waits for a run's checkpoints and scores each, as a job of its own, until the run is over.

    SAVE/iter_*  ─new, whole→ export ─→ scores ─→ best export? ─→ TensorBoard ─→ OUT/scores.jsonl ─→ the export goes

A kill anywhere loses nothing that was answered: the line in scores.jsonl comes last, and all before it is found again.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.run.folder import read_run_config
from hacl_megatron.checkpoint.run.retain import saved_iterations
from hacl_megatron.config.console import say
from hacl_megatron.evaluation.answers.benchmarks import BENCHMARKS
from hacl_megatron.evaluation.answers.run import BenchmarkRequest, check_numbers
from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.evaluation.model_files import choose_device, default_dtype
from hacl_megatron.evaluation.scores import file_digest
from hacl_megatron.evaluation.watch.best import KeepBest
from hacl_megatron.evaluation.watch.curves import Curves
from hacl_megatron.evaluation.watch.one_checkpoint import (
    FOLDER,
    FoundCheckpoint,
    Skipped,
    export,
    gone_is_skipped,
    scores_of,
)

SCORES_FILE = "scores.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """A run that trains no more."""

    words: str
    """What became of it."""
    for_good: bool
    """It is finished; otherwise it may be started again."""


@dataclass(frozen=True, kw_only=True)
class WatchRequest:
    """Which run to follow and what to ask its checkpoints: the flags of tools/evaluate.py by the same names."""

    save: Path
    """Folder of the run."""
    tasks: dict[str, BenchmarkRequest]
    """What to ask, by the names of `BENCHMARKS`; without model, and `output` is nothing here."""
    output: Path
    """Folder of results."""
    scratch: Path
    """Folder of exports while they are asked."""
    keep_best: KeepBest | None = None
    forever: bool = False
    """Go on when the run is over, and wait for one that has not begun."""
    poll_seconds: float = 30.0
    """Between two looks at SAVE."""
    wait_for_restart: float = 600.0
    """Seconds in which a run that is not finished may start again."""


def watch(request: WatchRequest, run_end: Callable[[], RunEnd | None]) -> None:
    """Score every checkpoint once, oldest first, until the run is over and none is left.

    Args:
        run_end: what became of the run; None while it trains.

    Raises:
        ValueError: a user's mistake, before any model is loaded; what cannot be written.
    """
    settings = check(request)
    request.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(
        request.output / SCORES_FILE,
        settings,
        lambda record: (record["iteration"], record["checkpoint"]),
        what="scores",
        flag="--output",
    )
    with journal:
        _Watch(request, journal).run(run_end)


def check(request: WatchRequest) -> dict[str, Any]:
    """What decides the scores, as JSON values. Raises ValueError for what can be seen to be wrong before the start."""
    if not request.save.is_dir() and not request.forever:
        raise ValueError(
            f"--watch {request.save}: no such folder; give the SAVE folder of a run, or add --forever to wait for it"
        )
    if request.keep_best is not None:
        request.keep_best.check(request.tasks)
    dtype = default_dtype(choose_device(next(iter(request.tasks.values())).device))
    settings: dict[str, Any] = {}
    for name, task in request.tasks.items():
        check_numbers(task)
        if task.files.images is None:
            raise ValueError("--watch needs --images, the folder of the benchmark's images")
        benchmark = BENCHMARKS[name](task.files, ask=True)
        items = benchmark.items()
        if not any((task.files.images / item.image).is_file() for item in items):
            raise ValueError(
                f"--images {task.files.images}: none of the {len(items)} images of {name} is there, such as "
                f"{items[0].image}; give the folder that holds them, or --images {name}=DIR"
            )
        settings[name] = {
            "inputs": {flag: file_digest(path) for flag, path in benchmark.used_files().items() if path.is_file()},
            "prompt_suffix": benchmark.suffix_used,
            "dtype": task.dtype or dtype,
            "num_beams": task.num_beams,
            "max_new_tokens": task.max_new_tokens or benchmark.max_new_tokens,
        }
    return settings


class _Watch:
    """One process's watch over one run."""

    def __init__(self, request: WatchRequest, journal: Journal) -> None:
        self._request, self._journal = request, journal
        self._skipped: set[tuple[int, str]] = set()
        self._curves: Curves | None = None

    def run(self, run_end: Callable[[], RunEnd | None]) -> None:
        request, silent_since, told = self._request, None, False
        self._remove_leftovers()
        try:
            while True:
                end = run_end()  # before the look: a run saves, and then says that it is finished
                if self._curves is None:
                    self._begin()
                if self._curves is not None and (found := self._next()) is not None:
                    self._do(found)
                    continue
                silent_since = None if end is None else silent_since or time.monotonic()
                if end is not None and not request.forever:
                    waited = time.monotonic() - silent_since
                    if end.for_good or waited >= request.wait_for_restart:
                        say(f"{request.save}: {end.words}; {self._told()}")
                        return
                    if not told:
                        say(f"{request.save}: {end.words}; waiting {request.wait_for_restart:g} s for its next start")
                told = end is not None
                time.sleep(request.poll_seconds)
        finally:
            if self._curves is not None:
                self._curves.__exit__()

    def _begin(self) -> None:
        """As soon as there is a checkpoint: it says where the run's curves are."""
        for iteration in saved_iterations(self._request.save):
            found = FoundCheckpoint.of(self._request.save, iteration)
            try:
                folder = None if found is None else tensorboard_folder(found, self._request)
            except Skipped:
                continue
            if folder is not None:
                self._curves = Curves(folder, self._records())
                self._recover_best()
                return

    def _next(self) -> FoundCheckpoint | None:
        """The oldest checkpoint that is neither done nor skipped."""
        for iteration in saved_iterations(self._request.save):
            found = FoundCheckpoint.of(self._request.save, iteration)
            if found is not None and not {(iteration, found.digest)} & (self._skipped | self._journal.done.keys()):
                return found
        return None

    def _do(self, found: FoundCheckpoint) -> None:
        assert self._curves is not None
        request, started = self._request, time.monotonic()
        results = request.output / found.name
        results.mkdir(exist_ok=True)
        try:
            written = found.written()
            exported = export(found, request.scratch)
            scores = scores_of(exported, request.tasks, results)
        except Skipped as reason:
            self._skipped.add((found.iteration, found.digest))
            say(f"iteration {found.iteration} is skipped: {reason}")
            _remove(request.scratch, found.name)
            return
        record = {
            "iteration": found.iteration,
            "checkpoint": found.digest,
            "scores": scores,
            "written": written,
            "seconds": round(time.monotonic() - started, 1),
        }
        best = request.keep_best
        is_best = best is not None and best.is_better(scores, [other["scores"] for other in self._records()])
        if best is not None and is_best:
            best.keep(exported, record)
        self._curves.add(record)
        self._journal.append(record)
        _remove(request.scratch, found.name)
        shown = ", ".join(f"{tag} {value:.4g}" for tag, value in scores.items()) or "no score"
        kept = f"; the best {best.score} so far, kept in {best.folder}" if best is not None and is_best else ""
        say(f"iteration {found.iteration}: {shown} ({record['seconds']:g} s){kept}")

    def _records(self) -> list[dict[str, Any]]:
        """Of the checkpoints that are done: of an iteration that was come to twice, the later."""
        return list({record["iteration"]: record for record in self._journal.done.values()}.values())

    def _recover_best(self) -> None:
        """See that the best of what is done is kept, where it was scored without --keep-best, or its folder is gone."""
        best = self._request.keep_best
        record = None if best is None else best.best(self._records())
        if best is None or record is None or best.kept() == record["checkpoint"]:
            return
        found = FoundCheckpoint.of(self._request.save, record["iteration"])
        if found is None or found.digest != record["checkpoint"]:
            say(
                f"the best {best.score} so far is that of iteration {record['iteration']}, whose checkpoint is gone: "
                f"{best.folder} does not hold it"
            )
            return
        try:
            exported = export(found, self._request.scratch)
        except Skipped as reason:
            say(f"{best.folder} does not hold the best so far, iteration {record['iteration']}: {reason}")
            return
        best.keep(exported, record)
        _remove(self._request.scratch, found.name)

    def _remove_leftovers(self) -> None:
        """Exports of a killed process whose checkpoints the run has deleted since: nobody comes back to them."""
        begun = [path for path in self._request.output.glob("iter_*") if FOLDER.fullmatch(path.name)]
        save = self._request.save
        whole = {FoundCheckpoint.of(save, iteration) for iteration in saved_iterations(save)}
        for name in {path.name for path in begun} - {found.name for found in whole if found is not None}:
            _remove(self._request.scratch, name)

    def _told(self) -> str:
        skipped = f", {len(self._skipped)} skipped" if self._skipped else ""
        return f"{len(self._journal.done)} checkpoints are scored{skipped}: {self._journal.path}"


def _remove(scratch: Path, name: str) -> None:
    """An export, and what a kill has left of it."""
    for path in (scratch / name, *scratch.glob(f"{name}.partial-*")):
        shutil.rmtree(path, ignore_errors=True)


def tensorboard_folder(found: FoundCheckpoint, request: WatchRequest) -> Path:
    """Below the run's own folder of events, by the name of the folder of results. Raises Skipped."""
    with gone_is_skipped(found):
        given = read_run_config(found.folder).logging.tensorboard_dir
    return Path(given or request.save / "tensorboard") / request.output.absolute().name
