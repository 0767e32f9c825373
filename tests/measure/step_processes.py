"""The processes of `measure_step.py`: each holds one variant; they take turns, and are timed and watched."""

import ctypes
import gc
import multiprocessing
import os
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.measure.step_sides import TakeStep, Work, package_side, plain_side
from tests.measure.step_twins import passes_side

PLAIN = "plain"
START = "spawn"
"""How processes start; `fork` where torch has been imported with the threads that are asked for."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way for this package to take the step."""

    flags: tuple[str, ...] = ()
    """Flags of the trainer."""
    without: tuple[str, ...] = ()
    """`tests.measure.step_flops.FEATURES` that it does without."""


def serve(pipe: Connection, work: Work, name: str, variant: Variant) -> None:
    """Build one side, then answer requests: `step` (seconds, CPU seconds, losses), `trim`, `profile`, None (leave)."""
    try:
        import torch

        torch.set_num_threads(work.threads)
        if name == PLAIN:
            take_step = plain_side(work)
        elif variant.flags[:1] == ("passes",):
            take_step = passes_side(work, with_reference="reference" in variant.flags)
        else:
            take_step = package_side(work, variant.flags, variant.without)
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            if request == "step":
                wall, cpu = time.perf_counter(), time.process_time()
                losses = take_step()
                pipe.send((time.perf_counter() - wall, time.process_time() - cpu, losses))
            elif request == "trim":
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                pipe.send(None)
            else:
                pipe.send(profile(take_step))
    except BaseException as error:
        pipe.send(RuntimeError(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Process:
    """A variant in a process of its own, idle between requests."""

    def __init__(self, work: Work, name: str, variant: Variant) -> None:
        before = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = str(work.threads)  # read when torch starts
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context(START).Process(
            target=serve, args=(theirs, work, name, variant), daemon=True
        )
        self.process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        self._receive()

    def ask(self, request: str, meanwhile: Callable[[], None] | None = None) -> Any:
        """The answer to `request`; `meanwhile` is called again and again until it comes."""
        self.pipe.send(request)
        while meanwhile is not None and not self.pipe.poll(0.001):
            meanwhile()
        return self._receive()

    def anonymous_bytes(self) -> int:
        """Resident anonymous memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"a variant's process ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


# What an operator counts as, by the first pattern its name matches.
GROUPS: dict[str, str] = {
    "matrix products": r"^aten::(mm|addmm|bmm|matmul|linear|mkldnn\w*|_?convolution|dot)$",
    "attention": r"scaled_dot_product",
    "cross entropy": r"log_?softmax|nll_loss|logsumexp|CrossEntropy|^aten::(exp|log|max|scatter\w*)$",
    "norms": r"norm|^aten::(rsqrt|pow|mean)$",
    "elementwise": r"^aten::(add|sub|mul|div|addcmul|addcdiv|lerp)_?$"
    r"|^aten::(neg|silu|gelu|sigmoid|cos|sin|sqrt|sum)(_backward)?$|_foreach|fused_adam",
    "copies and zeros": r"^aten::(copy_|clone|cat|stack|index\w*|gather|masked_\w+|fill_|zero_|zeros\w*|where)$",
}


def profile(take_step: TakeStep) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Seconds of one step by group of operators, and the operators that take most: name, seconds, calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        take_step()
        wall = time.perf_counter() - started
    groups: dict[str, float] = defaultdict(float)
    operators = []
    for event in recorded.key_averages():
        seconds = event.self_cpu_time_total / 1e6
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, event.key)), "other")
        groups[group] += seconds
        operators.append((event.key, seconds, event.count))
    groups["other"] += max(wall - sum(groups.values()), 0.0)  # Python between the operators
    return dict(groups), sorted(operators, key=lambda entry: -entry[1])[:25]


# -------------------------------------------------------------------------------------------------------- measurements


def measure_times(work: Work, variants: dict[str, Variant], repetitions: int, profiled: bool):
    """(Seconds, CPU seconds) of every repetition by variant, interleaved, and (if asked) each variant's profile."""
    processes: dict[str, Process] = {}
    try:
        for name, variant in {PLAIN: Variant(), **variants}.items():
            processes[name] = Process(work, name, variant)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
        first = {name: process.ask("step")[2] for name, process in processes.items()}  # also warms up
        _check_agreement(first)
        for repetition in range(repetitions):
            order = list(processes) if repetition % 2 == 0 else list(reversed(processes))
            for name in order:
                times[name].append(processes[name].ask("step")[:2])
        profiles = {name: process.ask("profile") for name, process in processes.items()} if profiled else {}
        return times, profiles
    finally:
        for process in processes.values():
            process.process.kill()


def _check_agreement(losses: dict[str, dict[str, float]]) -> None:
    for name, found in losses.items():
        for tag, value in found.items():
            expected = losses[PLAIN][tag]
            if tag in losses[PLAIN] and abs(value - expected) > 1e-4 * max(1.0, abs(expected)):
                raise RuntimeError(f"{name} computes another {tag} than {PLAIN}: {value} and {expected}")


def measure_memory(work: Work, name: str, variant: Variant) -> int:
    """Bytes by which a step's high-water exceeds the level before it: the second step's, optimiser state in place."""
    process = Process(work, name, variant)
    process.ask("step")
    process.ask("trim")
    before = process.anonymous_bytes()
    highest = before

    def watch() -> None:
        nonlocal highest
        highest = max(highest, process.anonymous_bytes())

    process.ask("step", watch)
    process.close()
    return highest - before
