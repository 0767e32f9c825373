"""Why a run stops before its last iteration, and how all ranks learn of it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_ECHO_SECONDS = 2.0
"""Under torchrun one Ctrl-C comes twice: from the terminal, which tells every process, and handed on by torchrun."""


_closed: set[int] = set()
"""Ignored by an earlier run of this process, not by whoever started it."""


class StoppedEarly(Exception):
    """All ranks stop before the first step, for the reason that is the message; what was done is kept."""


class StopRequests:
    """Collects reasons to save and stop: SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP on any rank, or the time limit.

    A handler only takes a note; the loop asks between steps and passes the answer through a reduction that every rank
    enters anyway, so all stop after the same step. A second Ctrl-C ends the process at once, also one that hangs in a
    collective, where Python runs no handler: a thread hears it.

    SIGINT and SIGHUP stay ignored where they are (`nohup`, a shell's background jobs).
    """

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self._deadline = None if exit_duration_in_mins is None else time.monotonic() + 60 * exit_duration_in_mins
        self._signal: int | None = None
        self.on_leaving: Callable[[str], None] = lambda reason: None
        """Called with the reason before a second Ctrl-C ends the process."""
        self._heard = [
            number
            for number in _SIGNALS
            if number in (signal.SIGTERM, signal.SIGUSR1, *_closed) or signal.getsignal(number) is not signal.SIG_IGN
        ]
        for number in self._heard:
            signal.signal(number, self._note)
        # The C part of Python's handlers writes each signal's number here, whatever the main thread is at.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is left to stop: further signals are ignored.

        Whoever asks may ask again until the process is gone, and Python restores the default, death, before it ends.
        """
        for number in self._heard:
            signal.signal(number, signal.SIG_IGN)
            _closed.add(number)
        self.end()

    def end(self) -> None:
        """Stop listening for a second Ctrl-C. May be called again."""
        if self._writer is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._writer)
            self._writer = None

    def _listen(self) -> None:
        first: float | None = None
        echo = _ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        while numbers := os.read(self._reader, 64):
            for _ in range(numbers.count(int(signal.SIGINT))):
                now = time.monotonic()
                if first is None:
                    first = now
                elif now - first >= echo:
                    self._leave()
        os.close(self._reader)

    def _leave(self) -> None:
        reason = "a second Ctrl-C: left at once, without a save"
        with suppress(OSError):
            os.write(2, f"hacl_megatron: {reason}\n".encode())
        # Where the disk hangs, that is no reason to stay.
        telling = threading.Thread(target=self.on_leaving, args=(reason,), daemon=True)
        telling.start()
        telling.join(5.0)
        os._exit(128 + signal.SIGINT)

    def _note(self, number: int, frame) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """What this rank wants to stop for, if anything."""
        if self._signal is not None:
            return f"received {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "--exit-duration-in-mins has passed"
        return None
