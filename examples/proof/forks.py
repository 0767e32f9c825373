"""Runs pieces of work in children of this process, which have its imports already: they take longer than a short run.

Each piece has a process to itself, since megatron-core's state is global. Linux.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

Work = Callable[[], None]


def _begin(work: Work, log: Path | None) -> int:
    """Starts `work` in a child and returns the child's number; what it prints is appended to `log`, if there is one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        if log is not None:
            with open(log, "ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        work()
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the parent's exit handlers are none of the child's


def call(work: Work, log: Path) -> None:
    """One child to its end. Raises RuntimeError with the log's end if it fails."""
    _, status = os.waitpid(_begin(work, log), 0)
    if status:
        raise RuntimeError(f"status {os.waitstatus_to_exitcode(status)}; the end of {log}:\n{log.read_text()[-2000:]}")


def call_all(works: Iterable[Work], jobs: int) -> int:
    """Every piece, in order, `jobs` at a time; returns how many failed, which does not keep the others from running."""
    running: set[int] = set()
    failed = 0
    for work in works:
        if len(running) == jobs:
            failed += _one_less(running)
        running.add(_begin(work, None))
    while running:
        failed += _one_less(running)
    return failed


def _one_less(running: set[int]) -> bool:
    """Waits for whichever of the children ends first; whether it failed."""
    child, status = os.wait()
    running.remove(child)
    return status != 0
