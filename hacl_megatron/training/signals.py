"""Why a run stops before its last iteration, and how all ranks learn of it at once."""

import signal
import time

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Collects reasons to save and stop: SIGTERM or SIGUSR1 on any rank, or the run's own time limit.

    A handler only takes a note; the loop asks between steps and passes the answer through a reduction that every rank
    enters anyway, so all stop after the same step.
    """

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self._deadline = None if exit_duration_in_mins is None else time.monotonic() + 60 * exit_duration_in_mins
        self._signal: int | None = None
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def close(self) -> None:
        """Nothing is left to stop: further signals are ignored.

        Whoever asks may ask again until the process is gone, and Python restores the default, death, before it ends.
        """
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """What this rank wants to stop for, if anything."""
        if self._signal is not None:
            return f"received {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "--exit-duration-in-mins has passed"
        return None
