"""Parts of tools/inspect_data.py that need no page: what a run's own flags are, and how large a page will be."""

import runpy

from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, locate_checkpoint, read_run_config
from hacl_megatron.config.run import to_yaml
from tests.tiny import write_tiny_llava
from tests.tool_runs import TOOLS, to_megatron


def test_a_runs_own_preference_loss_is_shown(tmp_path, monkeypatch):
    """Catches a run of DPO whose twins are shown as if nothing compared them, as the flag's default has it."""
    save = to_megatron(write_tiny_llava(tmp_path / "base", layers=1, vision_layers=2), tmp_path / "save")
    config = read_run_config(locate_checkpoint(save))
    config.preference.preference_loss = "dpo"
    (locate_checkpoint(save) / RUN_CONFIG_FILE).write_text(to_yaml(config))
    monkeypatch.syspath_prepend(TOOLS)
    tool = runpy.run_path(str(TOOLS / "inspect_data.py"))
    for flags, expected in (([], "dpo"), (["--preference-loss", "none"], "none")):
        monkeypatch.setattr("sys.argv", ["x", "--data-path", "x", "--output", "x", "--load", str(save), *flags])
        _, shown = tool["way_of_run"](tool["parse"]())
        assert shown.preference.preference_loss == expected


def test_a_page_that_will_be_too_large_is_told_of_early(monkeypatch):
    """Catches hours spent on a page that no browser opens, and an estimate that is not that of the page."""
    monkeypatch.syspath_prepend(TOOLS)
    note = runpy.run_path(str(TOOLS / "inspect_data.py"))["note_of_size"]
    assert note(300_000_000, 20_000) is None
    assert "100,000 samples will have about 1,500 MB" in note(1_500_000_000, 100_000)
    assert "--random 20000 makes one of 300 MB" in note(1_500_000_000, 100_000)
    page = runpy.run_path(str(TOOLS / "sample_page.py"))["SamplePage"]()
    page._chunks, page._rows = ["a" * 30, "b" * 50], [{"text": "c" * 10}, {"text": ""}]
    assert page.expected_bytes(10) == 450
