"""`run_status.json` as those write it that do not know the run."""

from pathlib import Path

from hacl_megatron.training.reporting.status import RunStatus, before_this_run, read_status, write_status


def test_whoever_reports_a_failure_leaves_how_far_the_run_came(tmp_path: Path) -> None:
    """The loop writes it, and then the entry, which knows the error alone, lost the iteration again."""
    told = {"iteration": 7, "train_iters": 9, "drawn_samples": 56}
    RunStatus(str(tmp_path), lambda: told).write("failed", "hopeless")
    write_status(str(tmp_path), "failed", reason="hopeless")
    assert told.items() <= read_status(str(tmp_path)).items()
    assert "after iteration 7 of 9" in str(before_this_run(str(tmp_path)))
