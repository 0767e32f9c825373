"""Ends a process that is silent for too long, with the stack of its every thread in the log.

When one rank hangs, all others soon wait for it in a collective, and nobody says where the one is. Every rank has a
watchdog, and all fall silent at the same step, so all stacks are in the log before the first rank leaves.
"""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from hacl_megatron.config.console import rank_and_node


class Watchdog:
    """Wants to hear `beat()` at least every `timeout` seconds between entering and leaving its `with` block.

    Args:
        timeout: seconds of silence after which the process prints its stacks and ends with status 1; 0 never.
        grace: seconds from there to the end, in which other ranks print theirs.
    """

    def __init__(self, timeout: float, grace: float = 15.0) -> None:
        self._timeout, self._grace = timeout, grace
        self._heard = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def beat(self) -> None:
        """The process is alive."""
        self._heard = time.monotonic()
        if self._timeout:
            # No thread of Python's runs while C code holds the interpreter's lock; this one does.
            faulthandler.dump_traceback_later(self._timeout + 2 * self._grace, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            silent = time.monotonic() - self._heard
            if silent > self._timeout:
                break
        else:
            return
        stderr = sys.__stderr__
        print(
            f"hacl_megatron: hang: {rank_and_node()} was silent for {silent:.0f} s, more than --hang-timeout; "
            "its threads, the latest call first:",
            file=stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        stderr.flush()
        if not self._closed.wait(self._grace):  # unless it woke up and came to its end
            os._exit(1)
