"""The loader's thread: how far it reads ahead, what it hands over when something fails, and that it always ends."""

import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from hacl_megatron.batch import StepBatches
from hacl_megatron.data.loader import StepLoader
from tests.data.loader_runs import loader_of


def numbered_step(number: int) -> StepBatches:
    return StepBatches(micro_batches=[], data_state={"step": number})


class Maker:
    """Counts the steps that were made; each takes `seconds`."""

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None):
        self.made, self.seconds, self.fail_at = 0, seconds, fail_at
        self.closed = 0

    def make(self) -> StepBatches:
        if self.made == self.fail_at:
            raise KeyError("the disk is on fire")
        time.sleep(self.seconds)
        self.made += 1
        return numbered_step(self.made - 1)

    def close(self) -> None:
        self.closed += 1

    def loader(self, prefetch_steps: int = 2) -> StepLoader:
        return StepLoader(self.make, prefetch_steps=prefetch_steps, num_samples=1, close=self.close)


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_thread_reads_ahead_while_the_consumer_is_busy_and_no_further():
    maker = Maker()
    with maker.loader(prefetch_steps=3) as loader:
        assert wait_until(lambda: maker.made == 3)
        time.sleep(0.05)
        assert maker.made == 3
        assert next(loader).data_state == {"step": 0}
        assert wait_until(lambda: maker.made == 4)
        assert [next(loader).data_state["step"] for _ in range(3)] == [1, 2, 3]


def test_waiting_is_measured_and_vanishes_when_the_consumer_is_slower():
    with Maker(seconds=0.1).loader() as loader:
        next(loader)
        assert loader.wait_seconds > 0.05
        first = loader.wait_seconds
        next(loader)
        assert loader.wait_seconds > first
    with Maker(seconds=0.15).loader() as loader:
        next(loader)
        before = loader.wait_seconds
        for _ in range(2):
            time.sleep(0.5)
            next(loader)
        assert loader.wait_seconds - before < 0.15  # 0.3 if the thread began when asked


def test_an_exception_of_the_thread_comes_after_the_steps_before_it_with_its_traceback():
    maker = Maker(fail_at=2)
    with maker.loader(prefetch_steps=5) as loader:
        assert [next(loader).data_state["step"] for _ in range(2)] == [0, 1]
        for _ in range(2):  # and again, instead of waiting for ever
            with pytest.raises(KeyError, match="on fire") as error:
                next(loader)
            assert any(frame.name == "make" for frame in traceback.extract_tb(error.value.__traceback__))
    assert maker.closed == 1


def test_a_fault_in_the_real_thread_reaches_the_consumer(dataset, monkeypatch):
    """A full disk or a bug is no bad sample."""
    monkeypatch.setattr("hacl_megatron.data.step_maker.encode", lambda *args: 1 / 0)
    with loader_of(dataset) as loader, pytest.raises(ZeroDivisionError):
        next(loader)


def test_close_is_prompt_wherever_the_thread_is(dataset):
    for taken in (0, 1):
        loader = loader_of(dataset)
        for _ in range(taken):
            next(loader)
        thread = loader._thread
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 5
        assert not thread.is_alive()
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)


def test_close_wakes_a_consumer_in_another_thread():
    cancelled = threading.Event()

    def make() -> StepBatches:
        cancelled.wait(10)
        raise InterruptedError("what cancelling a read raises")

    loader = StepLoader(make, prefetch_steps=1, num_samples=1, cancel=cancelled.set)
    seen = []
    consumer = threading.Thread(target=lambda: seen.extend(loader), daemon=True)
    consumer.start()
    time.sleep(0.05)
    loader.close()
    consumer.join(5)
    assert not consumer.is_alive()


def test_a_forgotten_loader_ends_its_thread():
    maker = Maker()
    loader = maker.loader()
    thread = loader._thread
    assert wait_until(lambda: maker.made == 2)
    del loader
    assert wait_until(lambda: not thread.is_alive())
    assert maker.closed == 1


EXITS = {
    "end of the program, thread at work": "pass",
    "end of the program, thread waiting": "import time; time.sleep(1)",
    "interrupt while waiting": (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit SIGINT ignored
        "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "for step in loader: pass"
    ),
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_with_a_loader_open(dataset, how):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.data.loader_runs import loader_of
loader = loader_of(Path({str(dataset)!r}))
next(loader)
print("drawn", flush=True)
{EXITS[how]}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "drawn" in done.stdout, done.stderr
    expected = (0,) if how.startswith("end") else (-2, 1, 130)
    assert done.returncode in expected, (done.returncode, done.stderr)
    unexpected = [line for line in done.stderr.splitlines() if "Fatal" in line or "step-loader" in line]
    assert not unexpected, done.stderr
