"""`run_status.json` as those write it that do not know the run."""

from pathlib import Path

import pytest

from hacl_megatron.training.reporting import status
from hacl_megatron.training.reporting.status import RunStatus, before_this_run, read_status, tell_hang, write_status


def test_whoever_reports_a_failure_leaves_how_far_the_run_came(tmp_path: Path) -> None:
    """The loop writes it, and then the entry, which knows the error alone, lost the iteration again."""
    told = {"iteration": 7, "train_iters": 9, "drawn_samples": 56}
    RunStatus(str(tmp_path), lambda: told).write("failed", "hopeless")
    write_status(str(tmp_path), "failed", reason="hopeless")
    assert told.items() <= read_status(str(tmp_path)).items()
    assert "after iteration 7 of 9" in str(before_this_run(str(tmp_path)))


def test_a_hang_stays_one_when_the_first_rank_that_leaves_breaks_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchdogs fire within a second of each other: the later rank's collective fails, which was written as a crash."""
    monkeypatch.setattr(status._hold, "hung", False)
    tell_hang(RunStatus(str(tmp_path), lambda: {"iteration": 7}), "rank 0 was silent")
    write_status(str(tmp_path), "crashed", reason="Connection closed by peer")
    told = read_status(str(tmp_path))
    assert (told["state"], told["reason"], told["iteration"]) == ("hung", "rank 0 was silent", 7)
