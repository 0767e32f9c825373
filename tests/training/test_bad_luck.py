"""Real processes that bad luck befalls: a second run in one folder, kills, Ctrl-C, an output that cannot be written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.training.runs import layout_flags, make_inputs, metrics
from tests.warm import Warm

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hacl_megatron.train"]
PROGRAM = """
import sys, time
from hacl_megatron import train
from hacl_megatron.training.loop import Trainer
report = Trainer._report
def _report(self, scalars):
    report(self, scalars)
    if self.progress.iteration == 2:
        print("now", flush=True)
        time.sleep(600)
Trainer._report = _report
train.main(sys.argv[1:])
"""
"""A run that hangs behind its second iteration."""


class Started:
    """A process of the trainer, its output in files; a `cold` one is a new interpreter."""

    def __init__(
        self, folder: Path, name: str, *program: str, extra: list[str], save: str, cold: bool = False, **options
    ) -> None:
        self.save, self.log = folder / save, folder / f"{name}.log"
        flags = ["--config", str(folder / "pretrain.yaml"), "--save", str(self.save), "--load", str(self.save)]
        layout = "dp2" if program == tuple(TORCHRUN) else "tp1"
        command = [*program, *flags, *layout_flags(layout)[1], "--device", "cpu", *extra]
        with self.log.open("a") as log:
            options = {"stdout": log, "stderr": log} | options
            if cold:
                command = [sys.executable, *command]
                self.process = subprocess.Popen(command, env=ENV, start_new_session=True, **options)
            else:
                self.process = Warm(command, env=ENV, **{key: file.fileno() for key, file in options.items()})

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def status(self) -> dict:
        return json.loads((self.save / "run_status.json").read_text())

    def wait_for(self, seen: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not seen():
            assert self.process.poll() is None and time.monotonic() < end, self.text[-3000:]
            time.sleep(0.05)

    def has_done(self, iterations: int) -> bool:
        return (self.save / "metrics.jsonl").exists() and len(metrics(self.save)) >= iterations

    def end(self) -> int:
        return self.process.wait(120)

    def kill(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()


PLAIN = ("-m", "hacl_megatron.train")
ENDLESS = ["--train-iters", "100000", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    folder = make_inputs(tmp_path_factory.mktemp("luck"))
    (folder / "hangs.py").write_text(PROGRAM)
    all_runs: dict[str, Started] = {}

    def start(name: str, *program: str, extra: list[str], save: str | None = None, **options) -> Started:
        all_runs[name] = Started(folder, name, *program, extra=extra, save=save or name, **options)
        return all_runs[name]

    try:
        # Two ranks whose reader leaves after a line (`| head -1`), beside a run whose output is a full disk.
        first = start("first", *TORCHRUN, extra=ENDLESS, cold=True, stdout=subprocess.PIPE)
        with open("/dev/full", "w") as full:
            start("full", *PLAIN, extra=["--train-iters", "3"], cold=True, stdout=full, stderr=full)
        first.process.stdout.readline()
        first.process.stdout.close()
        all_runs["full"].end()
        first.wait_for(lambda: first.has_done(3))
        # The same folder twice, and a mistaken start in it.
        second = start("second", *PLAIN, extra=ENDLESS, save="first")
        start("mistaken", *PLAIN, extra=[*ENDLESS, "--lr", "-1"], save="first").end()
        second.end()
        first.status_meanwhile = first.status
        before = len(metrics(first.save))
        first.wait_for(lambda: first.has_done(before + 2))
        # Ctrl-C in a terminal: torchrun gets it and hands it on, and, in older ones, every rank gets it from there too.
        for process in [*psutil.Process(first.process.pid).children(recursive=True), first.process]:
            process.send_signal(signal.SIGINT)
        first.end()
        # Killed, and started again; beside it one that is interrupted twice while it hangs.
        killed = start("killed", *PLAIN, extra=[*ENDLESS, "--save-interval", "2"])
        twice = start("twice", str(folder / "hangs.py"), extra=ENDLESS)
        killed.wait_for(lambda: (killed.save / "iter_0000002").exists())
        killed.process.send_signal(signal.SIGKILL)
        killed.status_meanwhile = killed.status
        (killed.save / "iter_0000099.partial").mkdir()
        twice.wait_for(lambda: "now" in twice.text)
        twice.process.send_signal(signal.SIGINT)
        time.sleep(1.0)  # two that arrive as one are one
        twice.process.send_signal(signal.SIGINT)
        twice.ended = time.monotonic()
        twice.end()
        twice.ended = time.monotonic() - twice.ended
        start("again", *PLAIN, extra=["--train-iters", "4"], save="killed").end()
        yield all_runs
    finally:
        for run in all_runs.values():
            run.kill()


def test_a_second_run_in_the_same_folder_is_refused_in_one_line(runs) -> None:
    """Catches two runs that delete one another's checkpoints, both with status 0."""
    first, second = runs["first"], runs["second"]
    lines = second.text.splitlines()
    assert second.process.returncode == 2 and len([line for line in lines if "error" in line]) == 1, lines
    line = next(line for line in lines if line.startswith("hacl_megatron: error: "))
    pid = first.status_meanwhile["pid"]
    assert re.search(rf"--save \S+ is in use by process {pid} of \S+ on \S+.*, since .*give another", line), line
    assert "Traceback" not in second.text


def test_a_refused_or_mistaken_start_leaves_the_living_run_s_status_alone(runs) -> None:
    """Catches `failed` in the status of a run that trains on, which a batch script then does not start again."""
    assert runs["mistaken"].process.returncode == 2
    assert runs["first"].status_meanwhile["state"] == "running"


def test_a_reader_that_leaves_costs_lines(runs) -> None:
    """Catches a run that ends with the first line that nobody reads."""
    first = runs["first"]
    assert first.status["lost_lines"] > 3
    assert "standard output cannot be written (Broken pipe)" in first.text
    assert "BrokenPipeError" not in first.text and "Exception ignored" not in first.text


def test_one_ctrl_c_of_many_processes_saves_once(runs) -> None:
    """Catches dying of it, and taking torchrun's copy of the signal for a second Ctrl-C."""
    first = runs["first"]
    status = first.status
    assert (status["state"], status["reason"]) == ("stopped", "received SIGINT"), first.text[-3000:]
    assert [path.name for path in first.save.glob("iter_*")] == [f"iter_{status['iteration']:07d}"]
    assert len(metrics(first.save)) == status["iteration"]
    assert not (first.save / "run.lock").exists()


def test_a_full_disk_under_the_log_costs_lines(runs) -> None:
    """Catches a run that ends with the first line that it cannot print, and Python's status 120 at the end."""
    full = runs["full"]
    assert full.process.returncode == 0
    assert full.status["state"] == "finished" and full.status["iteration"] == 3 and full.status["lost_lines"] > 3
    assert len(metrics(full.save)) == 3


def test_a_killed_run_is_taken_over_at_once_and_told_of(runs) -> None:
    killed, again = runs["killed"], runs["again"]
    assert killed.status_meanwhile["state"] == "running"  # a kill leaves no time to say so
    assert again.process.returncode == 0, again.text
    assert re.search(
        r"the previous run was cut off without a word .* after iteration \d+ of 100000, last heard of", again.text
    )
    assert f"held by process {killed.process.pid} " in again.text and "taken over" in again.text
    assert not list(again.save.glob("*.partial"))
    assert again.status["state"] == "finished"


def test_a_second_ctrl_c_leaves_at_once(runs) -> None:
    """Catches a run that waits for the end of a step that never ends."""
    twice = runs["twice"]
    assert twice.process.returncode == 130 and twice.ended < 20
    assert twice.status["state"] == "killed" and "second Ctrl-C" in twice.status["reason"]
    assert "a second Ctrl-C" in twice.text and not list(twice.save.glob("iter_*"))
