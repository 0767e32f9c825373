"""A user's or a stranger's words never reach a terminal raw: they could clear it, or write over what is said."""

import json
import unicodedata

import pytest

from hacl_megatron.config.console import printable
from tests.tool_runs import run_tool

CLEAR = "\x1b[2J\x1b]0;you are root\x07"


@pytest.mark.parametrize("lines", [False, True])
def test_what_no_terminal_should_have_is_an_escape_and_the_rest_is_as_it_was(lines):
    """The oracle is Unicode's own table: controls, surrogates, separators of lines, formats but joiners and hyphens."""
    kept_formats = set("\u00ad\u200c\u200d")
    for number in range(0x110000):
        character = chr(number)
        kind = unicodedata.category(character)
        bad = kind in ("Cc", "Cs", "Zl", "Zp")
        if lines and character in "\t\n":
            bad = False
        shown = printable(character, lines=lines)
        if bad:
            assert shown.isascii() and shown.startswith("\\") and shown.isprintable(), hex(number)
        elif kind not in ("Cf", "Cn"):
            assert shown == character, hex(number)
        elif character in kept_formats:
            assert shown == character
    assert printable("\u202e\u2066\ufeff\U000e0041") == "\\u202e\\u2066\\ufeff\\U000e0041"
    assert printable("größer 猫 👩\u200d🦰") == "größer 猫 👩\u200d🦰"


def test_the_tools_print_records_names_and_captions_so(tmp_path, capfd):
    turns = [{"from": "human", "value": "<image>Q"}]
    records = [
        {"id": f"r{CLEAR}", "image": "1.jpg", "conversations": turns},
        {
            "id": "s",
            "image": "1.jpg",
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        },
        {"id": "t", "image": "2.jpg", "conversations": turns, "text": f"A red dog {CLEAR} on a wooden table."},
    ]
    path = tmp_path / "in.json"
    path.write_text(json.dumps(records))
    assert run_tool("prepare_data", "--input", path, "--output", tmp_path / "prepared") == 0
    out, errors = capfd.readouterr()
    assert "r\\x1b[2J" in out and "\x1b[2J" not in out + errors and "\x07" not in out + errors
    assert (
        run_tool("generate_hallucinations", "--method", "rules", "--input", path, "--output", tmp_path / "o.json") == 0
    )
    out, errors = capfd.readouterr()
    assert "dog" in out and "\x1b[2J" not in out and "\x07" not in out
    path.write_text(json.dumps([{"id": [CLEAR], f"key{CLEAR}": 1}]))
    assert run_tool("prepare_data", "--input", path, "--output", tmp_path / "prepared") == 2
    path.write_text(json.dumps([{f"key{CLEAR}": 1}]))
    assert run_tool("prepare_data", "--input", path, "--output", tmp_path / "prepared") == 2
    path.write_text(CLEAR)
    assert run_tool("prepare_data", "--input", path, "--output", tmp_path / "prepared") == 2
    assert run_tool("prepare_data", "--input", f"{path}{CLEAR}", "--output", tmp_path / "prepared") == 2
    out, errors = capfd.readouterr()
    assert errors.count("hacl_megatron: error: ") == 4 and "\x1b[2J" not in out + errors and "\x07" not in out + errors
