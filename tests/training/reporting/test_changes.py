"""What a run that goes on is told: about a run that is over, about weights that it does not read."""

from pathlib import Path

from hacl_megatron.config.flags import TrainingFlags
from hacl_megatron.training.reporting.changes import _is_elsewhere, nothing_left
from hacl_megatron.training.state import Progress


def test_a_finished_run_names_the_flag_that_it_was_given() -> None:
    """Catches a line on `--num-train-epochs None`, or `--train-iters None`, which nobody gave."""
    progress = Progress(iteration=7, drawn_samples=56)
    assert nothing_left(TrainingFlags(train_iters=7), progress, 48) == (
        "nothing is left to train or to save: 7 iterations have drawn 56 samples, and --train-iters 7 asks for no "
        "more; raise it to go on"
    )
    by_epochs = nothing_left(TrainingFlags(train_iters=None, num_train_epochs=1.5), progress, 48)
    assert "and --num-train-epochs 1.5 of 48 samples asks for no more" in by_epochs


def test_a_start_is_elsewhere_by_where_it_leads(tmp_path: Path) -> None:
    """Catches a warning about weights not read for another spelling of the same folder, and none for another."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "llava")
    here = str(tmp_path / "llava")
    assert not _is_elsewhere(None, here) and not _is_elsewhere(None, None) and not _is_elsewhere(here, here)
    assert not _is_elsewhere(str(tmp_path / "link"), here)
    assert _is_elsewhere(here, None) and _is_elsewhere(str(tmp_path / "other"), here)
