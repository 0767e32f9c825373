"""What became of a run, for whoever started it: `SAVE/run_status.json`, and the error that ends a run on purpose.

torchrun turns every exit code of a trainer into 0 or 1, so a batch script decides by this file whether the run is to
be started again: `running` (or killed), `stopped` (on request, saved, not finished), `finished`, or `failed` (by a
user's mistake or because training is hopeless; the same start would fail again).
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

STATUS_FILE = "run_status.json"
SAMPLE_KEYS = ("drawn_samples", "bad_samples", "untrained_samples", "untrained_kinds")
"""Of `Progress`, in the file: samples drawn, unusable ones, those that train nothing, and these by kind."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do. With --save a checkpoint was saved before,
    unless the message says that this is what failed."""


def write_status(
    save: str | None,
    state: Literal["running", "stopped", "finished", "failed"],
    *,
    iteration: int | None = None,
    train_iters: int | None = None,
    reason: str | None = None,
    samples: Mapping[str, Any] | None = None,
) -> None:
    """Replace the file in `save`, if there is such a folder; one rank calls it.

    Args:
        samples: what became of those drawn so far, by the file's keys; None: as the file says, of whoever failed does
            not know.
    """
    if save is None or not Path(save).is_dir():
        return
    path = Path(save) / STATUS_FILE
    if samples is None:
        samples = {key: value for key, value in _facts(path).items() if key in SAMPLE_KEYS}
    facts = {"state": state, "iteration": iteration, "train_iters": train_iters, "reason": reason, "launch": _launch()}
    facts |= samples
    temporary = path.with_name(f"{STATUS_FILE}.{os.environ.get('RANK', '0')}.tmp")
    with contextlib.suppress(OSError):  # a full disk has been reported where it mattered
        temporary.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}, indent=1) + "\n")
        temporary.replace(path)


def reason_not_to_restart(save: str | None) -> str | None:
    """Why torchrun's restart of this process is in vain; None at a first start, or if it is worth a try."""
    if save is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    facts = _facts(Path(save) / STATUS_FILE)
    failed_before = facts.get("state") == "failed" and facts.get("launch") == _launch()
    return facts.get("reason") if failed_before else None


def _facts(path: Path) -> dict[str, Any]:
    """What the file says; {} where there is none, or none that says anything."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _launch() -> str | None:
    return os.environ.get("TORCHELASTIC_RUN_ID")
