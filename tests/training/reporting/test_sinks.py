"""Metrics that cannot be written cost lines, which are counted, and not the run."""

import json
from pathlib import Path

import pytest

from hacl_megatron.training.reporting.metrics import MetricsLog, keep_iterations


def open_log(folder: Path) -> MetricsLog:
    return MetricsLog(
        tensorboard_dir=folder / "board", jsonl=folder / "metrics.jsonl", first_iteration=0, last_iteration=9
    )


def test_sinks_that_cannot_be_opened_are_said_once_counted_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches a run that ends at its start for want of TensorBoard's folder."""
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    log = open_log(folder)
    log.log(1, {"lm loss": 1.0})
    log.log(2, {"lm loss": 1.0})
    assert capsys.readouterr().out.count("metrics cannot be written, the run goes on without") == 1
    assert log.num_lost == 2
    folder.unlink()
    log.log(3, {"lm loss": 1.0})
    assert "metrics can be written again; 2 iterations are lost or late" in capsys.readouterr().out
    log.close()
    assert [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [3]
    assert log.num_lost == 2 and list((folder / "board").iterdir())


def test_a_full_disk_is_counted_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    for iteration in range(1, 4):
        log.log(iteration, {"lm loss": 1.0})
    assert log.num_lost == 3 and capsys.readouterr().out.count("No space left") == 1
    log.close()


def test_a_metrics_file_with_rubbish_in_it_is_resumed(tmp_path: Path) -> None:
    """Catches a run that cannot resume for bytes in its log that are no text, or lines of another kind."""
    lines = tmp_path / "metrics.jsonl"
    rubbish = [b"5", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"iteration": "x"}', b'{"iteration": 2, "a']
    lines.write_bytes(b"\n".join([b'{"iteration": 1}', *rubbish]))
    keep_iterations(lines, 1)
    assert lines.read_text() == '{"iteration": 1}\n'
