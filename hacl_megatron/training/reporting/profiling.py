"""`--profile-step-start/-end`: a torch.profiler trace of some iterations, a file for each rank that was asked for.

The files are Chrome traces (`.pt.trace.json.gz`): ui.perfetto.dev opens them as they are, TensorBoard with the plugin
torch-tb-profiler, in whose log folder they lie.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from hacl_megatron.config.console import rank_and_node
from hacl_megatron.config.flags import LoggingFlags


class ProfileWindow:
    """Profiles iterations [start, end) of the run, of which one before them warms the profiler up where there is one.

    Without `folder` nothing is profiled, and nothing costs.

    Args:
        folder: where the trace goes; None on ranks that write none.
        rank: of this process, for the file's name.
    """

    def __init__(self, folder: Path | None, *, start: int, end: int, rank: int, device: torch.device) -> None:
        self.folder, self.start, self.end, self.rank = folder, start, end, rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._iteration: AbstractContextManager | None = None
        self._first = self._last = 0

    @classmethod
    def of(cls, flags: LoggingFlags, tensorboard_dir: Path | None, rank: int, device: torch.device) -> "ProfileWindow":
        """The window that the flags ask for on this rank."""
        asked = flags.profile_step_start is not None and rank in flags.profile_ranks
        folder = tensorboard_dir / "profile" if asked and tensorboard_dir is not None else None
        start, end = flags.profile_step_start or 0, flags.profile_step_end or 0
        return cls(folder, start=start, end=end, rank=rank, device=device)

    def begin(self, iteration: int) -> None:
        """This iteration is about to run."""
        if self.folder is None or not self.start - 1 <= iteration < self.end:
            return
        if self._profiler is None:  # a run that resumes inside the window begins where it is
            self._first = max(iteration, self.start)
            self._profiler = profile(
                activities=self._activities,
                schedule=schedule(
                    wait=0, warmup=self._first - iteration, active=self.end - self._first, repeat=1, skip_first=0
                ),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()
        self._last = iteration
        self._iteration = record_function(f"iteration {iteration}")
        self._iteration.__enter__()

    def finish(self) -> None:
        """The iteration that `begin` announced has run."""
        if self._profiler is None:
            return
        self._iteration.__exit__(None, None, None)
        self._iteration = None
        self._profiler.step()
        if self._last == self.end - 1:
            self.close()

    def phase(self, name: str) -> AbstractContextManager:
        """A name in the trace for what runs inside."""
        return nullcontext() if self._profiler is None else record_function(name)

    def close(self) -> None:
        """Write what a run that ends inside the window has recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._iteration is not None:  # a run that fails
            self._iteration.__exit__(None, None, None)
        profiler.stop()

    def _write(self, profiler: profile) -> None:
        iterations = f"{self._first}" if self._first == self._last else f"{self._first}-{self._last}"
        path = self.folder / f"rank{self.rank}_iterations_{iterations}.pt.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a full disk is no reason to end a run
            print(f"hacl_megatron: {rank_and_node()}: no trace in {path}: {error}", file=sys.stderr, flush=True)
