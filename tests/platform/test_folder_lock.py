"""One writer a folder, over processes and hosts: who is refused, who takes over, and when."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hacl_megatron.platform import folder_lock
from hacl_megatron.platform.folder_lock import FolderInUse, FolderLock, is_held_by_another

HOLD = """
import sys, time
from pathlib import Path
from hacl_megatron.platform.folder_lock import FolderLock
FolderLock(Path(sys.argv[1]), what="--save there").take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts that beat, and are given up, in seconds."""
    monkeypatch.setattr(folder_lock, "PULSE_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 2.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def lock(folder: Path, said: list[str] | None = None) -> FolderLock:
    return FolderLock(folder, what=f"--save {folder}", say=(said if said is not None else []).append)


def rewrite(folder: Path, **changes: object) -> None:
    """The lock as another holder's."""
    path = folder / "run.lock"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "token": "another", **changes}))


@pytest.fixture
def holder(tmp_path: Path):
    """A real process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_holder_of_this_machine_is_named_at_once(tmp_path: Path, holder) -> None:
    started = time.monotonic()
    with pytest.raises(FolderInUse) as refusal:
        lock(tmp_path).take()
    assert time.monotonic() - started < 2
    line = str(refusal.value)
    assert "\n" not in line and f"process {holder.pid} of " in line and "give another folder" in line, line
    assert re.search(r"alive \d+ s ago", line) and str(tmp_path) in line
    assert is_held_by_another(tmp_path, None)


def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path: Path, holder) -> None:
    """Also while it is a zombie, whose number still exists."""
    holder.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # and nobody waits for it, so that it is a zombie
    said, started = [], time.monotonic()
    mine = lock(tmp_path, said)
    mine.take()
    assert time.monotonic() - started < 2 and "ended without releasing" in said[0]
    mine.check()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_number_used_again_is_not_the_holder(tmp_path: Path, quick) -> None:
    """Catches asking for the number alone: process 1 lives on every machine, and containers count from 1."""
    first = lock(tmp_path)
    first.take()
    rewrite(tmp_path, pid=1, began="7")
    lock(tmp_path).take()
    with pytest.raises(FolderInUse, match="taken over by"):
        first.check()
    first.release()
    assert (tmp_path / "run.lock").exists()  # the other one's


def test_a_holder_elsewhere_is_alive_by_its_pulse(tmp_path: Path, quick) -> None:
    """Even where its clock is an hour behind: pulses are seen, not compared with this host's time."""
    first = lock(tmp_path)
    first.take()
    rewrite(tmp_path, host="n7", machine="another")
    path, stop = tmp_path / "run.lock", time.monotonic() + 1.0
    beating = multiprocessing.get_context("fork").Process(target=_beat, args=(path, -3600.0))
    beating.start()
    try:
        with pytest.raises(FolderInUse, match=r"process \d+ of \S+ on n7"):
            lock(tmp_path).take()
        assert time.monotonic() - stop < 3
    finally:
        beating.kill()
        beating.join()
        first.release()


def _beat(path: Path, skew: float) -> None:
    while True:
        time.sleep(0.2)
        os.utime(path, times=(time.time() + skew, time.time() + skew))


@pytest.mark.parametrize("age", [0.0, 3600.0, -3600.0])
def test_a_silent_holder_elsewhere_is_replaced_after_a_while(tmp_path: Path, quick, age: float) -> None:
    """Catches a take-over by the file's age alone, and one that waits for a clock that goes ahead."""
    said: list[str] = []
    first = lock(tmp_path)
    first.take()
    first.release()
    first._create(tmp_path / "run.lock")
    rewrite(tmp_path, host="n7", machine="another", job="Slurm job 5")
    then = time.time() - age
    os.utime(tmp_path / "run.lock", times=(then, then))
    started = time.monotonic()
    mine = lock(tmp_path, said)
    mine.take()
    waited = time.monotonic() - started
    assert (0.4 if age > 0 else 1.5) < waited < 5, waited
    assert "n7, Slurm job 5" in said[-1] and "nothing was heard" in said[-1], said
    mine.release()


def test_a_requeued_job_takes_its_own_at_once_and_no_other(tmp_path: Path, quick, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = lock(tmp_path)
    first.take()
    rewrite(tmp_path, host="n7", machine="another")
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 600.0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    started = time.monotonic()
    second = lock(tmp_path, said)
    second.take()
    assert time.monotonic() - started < 1 and "an earlier start of this job" in said[0]
    with pytest.raises(FolderInUse):
        first.check()
    first.release()
    with pytest.raises(FolderInUse):  # two steps of one job, or the same start twice
        lock(tmp_path).take()
    second.release()


def _race(folder: str, start: float, outcomes) -> None:
    time.sleep(max(0.0, start - time.time()))
    mine = lock(Path(folder))
    try:
        mine.take()
    except FolderInUse:
        outcomes.put("refused")
    else:
        outcomes.put("held")
    time.sleep(1.5)  # all are here to see each other


@pytest.mark.parametrize("before", ["nothing", "a dead one"])
def test_of_many_at_once_one_gets_it(tmp_path: Path, quick, before: str) -> None:
    """Catches a take-over by removing the file: one that came later removes the winner's."""
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if before == "a dead one":
            first = lock(folder)
            first.take()
            first.release()
            first._create(folder / "run.lock")
            rewrite(folder, pid=2**22 - 1)
        outcomes = context.Queue()
        racers = [context.Process(target=_race, args=(str(folder), time.time() + 0.3, outcomes)) for _ in range(8)]
        for racer in racers:
            racer.start()
        found = sorted(outcomes.get(timeout=30) for _ in racers)
        for racer in racers:
            racer.kill()
            racer.join()
        assert found == ["held"] + ["refused"] * 7, found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "\x00" * 10])
def test_a_damaged_lock_is_waited_for_and_replaced(tmp_path: Path, quick, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    said: list[str] = []
    mine = lock(tmp_path, said)
    mine.take()
    assert "a damaged lock" in said[-1]
    mine.release()


def test_without_hard_links_it_is_made_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    first = lock(tmp_path)
    first.take()
    with pytest.raises(FolderInUse):
        lock(tmp_path).take()
    first.release()


def test_a_lock_that_was_cleaned_up_comes_back(tmp_path: Path, quick) -> None:
    mine = lock(tmp_path)
    mine.take()
    (tmp_path / "run.lock").unlink()
    time.sleep(0.6)
    mine.check()
    mine.release()
