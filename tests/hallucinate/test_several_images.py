"""Hallucinated captions of records with several images: one list an image, beside the list of captions."""

import json
import re
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from tests.hallucinate.chat_server import ChatServer
from tests.tool_runs import run_tool

HALLUCINATED, EDITS = "Hallucination caption", "Hallucination edits"
CAT, DOG = "A red cat sits on a wooden table.", "Two dogs run on the beach."
TURNS = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "A red cat."}]
TWO = {"id": "two", "image": ["1.jpg", "2.jpg"], "conversations": TURNS}
RECORDS = [
    TWO | {"text": [CAT, DOG]},
    TWO | {"id": "gap", "images": ["1.jpg", "2.jpg"], "image": None, "text": [None, CAT], "extra": 1},
    TWO | {"id": "plain", "text": CAT},
    TWO | {"id": "none"},
    TWO | {"id": "kept", "text": [CAT, DOG], HALLUCINATED: [[], ["Two cats run on the beach."]]},
    {"id": "empty", "image": ["1.jpg", "2.jpg"], "question": "Which?", "chosen": CAT, "rejected": DOG},
    TWO | {"id": "nothing yet", "text": [CAT, None], HALLUCINATED: [[], None]},
    {"id": "one", "image": ["1.jpg"], "conversations": TURNS, "text": [CAT]},
]


def written(tmp_path: Path, *flags: object) -> dict[str, dict]:
    (tmp_path / "in.json").write_text(json.dumps(RECORDS))
    paths = ("--input", tmp_path / "in.json", "--output", tmp_path / "out.json")
    assert run_tool("generate_hallucinations", *paths, *flags) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["id"] for record in records] == [record["id"] for record in RECORDS], "each once, in order"
    ours = (HALLUCINATED, EDITS)
    for record, before in zip(records, RECORDS, strict=True):
        assert {k: v for k, v in record.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}
    return {record["id"]: record for record in records}


@pytest.mark.parametrize("count", [1, 2])
def test_each_images_caption_gets_its_own_and_what_cannot_be_treated_is_named(tmp_path, count, capfd):
    """The tool refused a list of captions, and falsified an answer about several images that makes no pair."""
    found = written(tmp_path, "--method", "rules", "--per-caption", count)
    assert [len(texts) for texts in found["two"][HALLUCINATED]] == [count, count]
    assert all(len(edits) == count for edits in found["two"][EDITS])
    assert [len(texts) for texts in found["gap"][HALLUCINATED]] == [0, count] == [*map(len, found["gap"][EDITS])]
    assert [len(texts) for texts in found["nothing yet"][HALLUCINATED]] == [count, 0]
    for name in ("plain", "none", "kept", "empty"):
        assert found[name] == next(record for record in RECORDS if record["id"] == name)
    said = capfd.readouterr().out
    assert "8 records: 1 without a caption, 1 kept as they were" in said
    assert "2 records (plain, none) have several images and no list of their captions under 'text': kept" in said
    samples = {sample.name: sample for sample in Manifest.read([str(tmp_path / "out.json")], version="v1")}
    assert [len(pair.hallucinated) for pair in samples["two"].pairs] == [count, count]
    assert [(pair.image, len(pair.hallucinated)) for pair in samples["gap"].pairs] == [(1, count)]
    assert samples["one"].caption == CAT and len(samples["one"].hallucinated_captions) == count
    assert not any(CAT in pair.hallucinated or DOG in pair.hallucinated for pair in samples["two"].pairs)


def test_replacing_writes_all_of_them_anew(tmp_path):
    found = written(tmp_path, "--method", "rules", "--replace")
    assert [len(texts) for texts in found["kept"][HALLUCINATED]] == [1, 1] == [*map(len, found["kept"][EDITS])]


def test_an_endpoint_is_asked_about_each_caption(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ChatServer(lambda caption, _: caption.replace("red cat", "blue dog").replace("dogs", "cats")) as server:
        found = written(tmp_path, "--method", "llm", "--model", "m", "--base-url", server.url)
    assert found["two"][HALLUCINATED] == [
        ["A blue dog sits on a wooden table."], ["Two cats run on the beach."]
    ] and EDITS not in found["two"]  # fmt: skip
    assert found["gap"][HALLUCINATED] == [[], ["A blue dog sits on a wooden table."]]
    assert found["one"][HALLUCINATED] == "A blue dog sits on a wooden table."


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"text": [CAT]}, "key 'text' is list .*; expected 2 captions, one an image"),
        ({"text": [CAT, 3]}, r"key 'text\[1\]' is int 3"),
        ({"text": [CAT, DOG], HALLUCINATED: [[1], []]}, rf"key '{HALLUCINATED}\[0\]' is list"),
        ({"image": "1.jpg", "text": [CAT, DOG]}, "key 'text' is list .*; expected a string"),
    ],
)
def test_lists_that_do_not_fit_are_refused_in_one_line(tmp_path, capfd, keys, said):
    (tmp_path / "in.json").write_text(json.dumps([TWO, TWO | keys]))
    paths = ("--input", tmp_path / "in.json", "--output", tmp_path / "out.json")
    assert run_tool("generate_hallucinations", "--method", "rules", *paths) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search(rf"in\.json, record 1 \(line 1\): {said}", line)
