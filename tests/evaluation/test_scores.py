"""The file of results."""

from hacl_megatron.evaluation.scores import write_whole


def test_what_a_killed_run_left_beside_its_results_is_removed(tmp_path):
    """Each kill left another `.scores.json.PID.part` for ever."""
    (tmp_path / ".scores.json.4711.part").write_text("half")
    (tmp_path / ".other.json.4711.part").write_text("another file's")
    write_whole(tmp_path / "scores.json", "{}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", ".other.json.4711.part"}
