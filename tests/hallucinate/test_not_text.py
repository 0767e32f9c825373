"""Half of a surrogate pair ("\\ud83d"), in a caption or a model's answer: the file that is written stays whole.

Before, `generate_hallucinations` wrote bytes that are no UTF-8, and `prepare_data` refused the file whole.
"""

import json
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from tests.hallucinate.chat_server import ChatServer
from tests.tool_runs import run_tool

HALF = "\ud83d"


def records(*captions: str) -> list[dict]:
    return [
        {"id": f"r{n}", "image": f"{n}.jpg", "conversations": [{"from": "human", "value": "<image>"}], "text": caption}
        for n, caption in enumerate(captions)
    ]


def generate(folder: Path, written: list[dict], *flags: object, name: str = "out.json") -> list[dict]:
    """The records that the tool writes of `written`; they are read by the strict decoder, as UTF-8."""
    (folder / "in.json").write_text(json.dumps(written))
    files = ["--input", folder / "in.json", "--output", folder / name]
    assert run_tool("generate_hallucinations", *files, *flags) == 0
    text = (folder / name).read_bytes().decode("utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_rules_keep_the_record_and_the_rest_gets_its_captions(tmp_path, capfd, name):
    given = records("A red dog on a table.", f"A red dog {HALF} here.", "Two cats under a chair.")
    given[2]["note"] = HALF  # a key that nothing reads
    found = generate(tmp_path, given, "--method", "rules", name=name)
    assert [bool(record.get("Hallucination caption")) for record in found] == [True, False, True]
    assert found[1] == given[1] and found[2]["note"] == HALF
    assert "2 records (r1, r2) hold half of a surrogate pair" in capfd.readouterr().out
    (tmp_path / "images").mkdir()
    assert run_tool("prepare_data", "--input", tmp_path / name, "--output", tmp_path / "prepared") == 0
    samples = list(Manifest.read([str(tmp_path / "prepared")], version="v1"))
    assert [sample.name for sample in samples] == ["r0", "r1", "r2"]
    assert samples[1].caption == given[1]["text"]  # the very text, which the loader then refuses, by name


def test_an_answer_that_is_no_text_is_asked_for_again_and_a_caption_is_not_sent(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    given = records("A red dog on a table.", f"A red dog {HALF} here.", *[f"{n} red dogs {HALF}." for n in range(20)])

    def answer(caption: str, times: int) -> str:
        return caption.replace("dog", f"cat{HALF if times == 1 else ''}")

    with ChatServer(answer) as server:
        flags = ["--method", "llm", "--model", "m", "--base-url", server.url, "--fill-with-rules"]
        found = generate(tmp_path, given, *flags)
    assert dict(server.seen) == {"A red dog on a table.": 2}  # the others cost nothing, and stop nothing
    assert found[0]["Hallucination caption"] == "A red cat on a table." and found[1:] == given[1:]
    rejected = [json.loads(line) for line in (tmp_path / "out.json.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in rejected] == [record["id"] for record in given[1:]]
    assert "no Unicode text" in rejected[0]["rejected"][0]["reason"]
