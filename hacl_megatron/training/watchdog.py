"""Ends a process that is silent for too long, with the stack of its every thread in the log.

When one rank hangs, all others soon wait for it in a collective, and nobody says where the one is. Every rank has a
watchdog, and all fall silent at the same step, so all stacks are in the log before the first rank leaves. They come at
the same moment into one log, so every line says whose it is and is written whole.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from hacl_megatron.config.console import rank_and_node


class Watchdog:
    """Wants to hear `beat()` at least every `timeout` seconds between entering and leaving its `with` block.

    Args:
        timeout: seconds of silence after which the process prints its stacks and ends with status 1; 0 never.
        grace: seconds from there to the end, in which other ranks print theirs.
        on_hang: called with the reason, in a thread of its own, once the stacks are printed.
    """

    def __init__(
        self, timeout: float, grace: float = 15.0, on_hang: Callable[[str], object] = lambda reason: None
    ) -> None:
        self._timeout, self._grace, self._on_hang = timeout, grace, on_hang
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
        who = rank_and_node()
        _write_line(
            f"hacl_megatron: hang: {who} was silent for {silent:.0f} s, more than --hang-timeout; "
            "its threads, the latest call first:"
        )
        for line in stacks():
            _write_line(f"[{who}] {line}")
        reason = f"{who} was silent for {silent:.0f} s, more than --hang-timeout"
        threading.Thread(target=self._on_hang, args=(reason,), daemon=True).start()  # what hangs may be the disk
        if not self._closed.wait(self._grace):  # unless it woke up and came to its end
            os._exit(1)


def stacks() -> list[str]:
    """Where every thread of this process is, in the lines of a traceback without the source, the latest call first.

    Opens no file: a hang is often a file system's. faulthandler's own dump comes in pieces of lines, between which
    other ranks' pieces fall.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        at: FrameType | None = frame
        while at is not None:
            lines.append(f'  File "{at.f_code.co_filename}", line {at.f_lineno}, in {at.f_code.co_name}')
            at = at.f_back
    return lines


def _write_line(line: str) -> None:
    """One write to stderr's descriptor: whole between other processes' lines, and past any lock a hung thread holds."""
    with suppress(OSError):  # a log on a full disk
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
