"""What became of a run, for whoever started it: `SAVE/run_status.json`, and the error that ends a run on purpose.

torchrun turns every exit code of a trainer into 0 or 1, so a batch script decides by this file whether the run is to
be started again:

    running     or killed without a word: then `updated` grows no more
    stopped     on request, not finished; saved, or the reference's scores so far are kept    finished
    failed      by a user's mistake or because training is hopeless; the same start would fail again
    crashed     by an error that nobody expected             hung       ended by --hang-timeout
    killed      by a second Ctrl-C, without a save
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hacl_megatron.platform.folder_lock import DEAD_SECONDS, holder_of, is_held_by_another

STATUS_FILE = "run_status.json"
SAMPLE_KEYS = ("drawn_samples", "bad_samples", "untrained_samples", "untrained_kinds")
"""Of `Progress`, in the file: samples drawn, unusable ones, those that train nothing, and these by kind."""
State = Literal["running", "stopped", "finished", "failed", "crashed", "hung", "killed"]


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do. With --save a checkpoint was saved before,
    unless the message says that this is what failed."""


class RunStatus:
    """The file of a run that is under way; rank 0 has one, and may use it from any thread.

    Args:
        progress: gives the iteration that was reached, and what else is to be told.
    """

    def __init__(self, save: str | None, progress: Callable[[], dict[str, Any]]) -> None:
        self._save, self._progress = save, progress
        self._lock = threading.Lock()
        self._state: State | None = None

    def write(self, state: State, reason: str | None = None) -> None:
        with self._lock:
            self._state = state
            write_status(self._save, state, reason=reason, **self._progress())

    def refresh(self) -> None:
        """The run goes on: say up to where, and that it was alive just now."""
        with self._lock:
            if self._state == "running":
                write_status(self._save, "running", **self._progress())


def write_status(save: str | None, state: State, *, reason: str | None = None, **facts: Any) -> None:
    """Replace the file in `save`, if there is such a folder and no other run has it; one rank calls it.

    Args:
        facts: `iteration`, `train_iters` and whatever else there is to tell; None is left out. How far the run came and
            what became of samples stays as the file says where samples are not given: whoever failed does not know.
    """
    if save is None or not Path(save).is_dir() or is_held_by_another(Path(save), _hold.token):
        return
    if state == "crashed" and _hold.hung:  # by the end of a rank whose watchdog was a little faster
        return
    if not facts.keys() & {*SAMPLE_KEYS}:
        kept = (*SAMPLE_KEYS, "iteration", "train_iters", "changes")
        facts |= {key: value for key, value in read_status(save).items() if key in kept}
    content = {
        "state": state,
        **facts,
        "reason": reason,
        "launch": _launch(),
        "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    path = Path(save) / STATUS_FILE
    temporary = path.with_name(f"{STATUS_FILE}.{os.environ.get('RANK', '0')}.tmp")
    with contextlib.suppress(OSError):  # a full disk has been reported where it mattered
        temporary.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=1) + "\n")
        temporary.replace(path)


def hold(token: str | None) -> None:
    """Remember the lock of SAVE, under which this run's ranks write its status, to the end of the process."""
    _hold.token = token


def tell_hang(status: RunStatus | None, reason: str) -> None:
    """This process hangs and is about to be ended: whatever fails in it until then is no crash of its own."""
    _hold.hung = True
    if status is not None:
        status.write("hung", reason)


class _Hold:
    token: str | None = None
    hung: bool = False


_hold = _Hold()


def read_status(save: str | None) -> dict[str, Any]:
    """What the file in `save` says, {} where there is none that can be read."""
    try:
        facts = json.loads((Path(save or "") / STATUS_FILE).read_text(encoding="utf-8")) if save else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run is doing now, as an onlooker can tell, and what its file says."""

    state: State | Literal["starting", "cut off"] | None
    """starting: a process has the folder and has not written its status yet; cut off: "running" says the file, and
    nobody is alive; None: nothing is said."""
    facts: dict[str, Any]
    holder: str | None = None
    """The process that has the folder, in words, where it lives."""
    heard: float | None = None
    """Seconds since its last pulse."""

    @property
    def is_alive(self) -> bool:
        return self.holder is not None


def run_state(save: Path) -> RunState:
    """Looks at the file and at the pulse of the folder's lock, and writes nothing."""
    facts = read_status(str(save))
    said, found = facts.get("state"), holder_of(save)
    state = said if said is None else f"{said}"  # of a damaged file it may be anything
    if found is not None and found[1] < DEAD_SECONDS and not (found[0] is not None and found[0].is_gone):
        holder, heard = found
        its_own = holder is None or (facts.get("pid"), facts.get("host")) == (holder.pid, holder.host)
        now = state if its_own and state is not None else "starting"
        return RunState(state=now, facts=facts, holder=f"{holder or 'an unknown process'}", heard=heard)
    return RunState(state="cut off" if state == "running" else state, facts=facts)


def before_this_run(save: str | None) -> str | None:
    """A line on how the run before this one ended in `save`; None where it finished, or there was none."""
    facts = read_status(save)
    state, done, wanted = (facts.get(key) for key in ("state", "iteration", "train_iters"))
    if state in (None, "finished"):
        return None
    where = f" after iteration {done} of {wanted}" if done is not None else ""
    seen = f", last heard of at {facts['updated']} on {facts.get('host')}" if "updated" in facts else ""
    if state == "running":
        return f"the previous run was cut off without a word (killed, or its node was lost){where}{seen}"
    reason = f": {facts['reason']}" if facts.get("reason") else ""
    return f"the previous run {_WAS.get(state, state)}{where}{seen}{reason}"


_WAS = {"stopped": "was stopped", "killed": "was killed", "hung": "hung"}


def reason_not_to_restart(save: str | None) -> str | None:
    """Why torchrun's restart of this process is in vain; None at a first start, or if it is worth a try."""
    if save is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    facts = read_status(save)
    failed_before = facts.get("state") == "failed" and facts.get("launch") == _launch()
    return facts.get("reason") if failed_before else None


def _launch() -> str | None:
    return os.environ.get("TORCHELASTIC_RUN_ID")
