"""The rules through the command line: files in, files out, errors, memory, the manifest at the end."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.hallucinate.files import caption_of, read_records, writing
from tests.tool_runs import TOOLS, run_tool

CAPTION_FILE = Path(__file__).parent / "mplug_owl_captions.jsonl"


def llava(caption: str, number: int, **keys: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": turns, **keys}


def some(count: int) -> list[dict]:
    lines = CAPTION_FILE.read_text().splitlines()[:count]
    return [llava(json.loads(line)["caption"], i) for i, line in enumerate(lines)]


def save(path: Path, records: list[dict], **how: object) -> Path:
    text = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records, **how)
    path.write_text(text, encoding="utf-8")
    return path


def run(source: Path, target: Path, *flags: object) -> int:
    return run_tool("generate_hallucinations", "--method", "rules", "--input", source, "--output", target, *flags)


def test_the_manifest_finds_what_was_written(tmp_path, capfd):
    records = some(40)
    records[3]["text"] = "A red car.\n"
    records[4] = {**records[4], "extra": {"größe": [1, None]}}
    records[5] = {"id": 5, "conversations": [{"from": "human", "value": "Hi."}]}
    records[6]["Hallucination caption"] = "kept"
    source, target, page = save(tmp_path / "in.json", records), tmp_path / "out.json", tmp_path / "report.html"
    assert run(source, target, "--per-caption", 2, "--report", page) == 0
    manifest = Manifest.read([str(target)], version="v1")
    written = json.loads(target.read_text())
    assert len(manifest) == 40
    for index, (sample, before, after) in enumerate(zip(manifest, records, written, strict=True)):
        rest = {key: value for key, value in after.items() if not key.startswith("Hallucination")}
        assert rest == {key: value for key, value in before.items() if not key.startswith("Hallucination")}
        if index == 5:
            assert after == before
        elif index == 6:
            assert sample.hallucinated_captions == ("kept",) and "Hallucination edits" not in after
        else:
            assert len(sample.hallucinated_captions) == 2 and sample.caption not in sample.hallucinated_captions
            assert [len(edits) for edits in after["Hallucination edits"]] and len(after["Hallucination edits"]) == 2
    assert "38 of 38 captions (100.0 %)" in capfd.readouterr().out
    assert page.read_text().count("<tr>") == 77 and "<ins>" in page.read_text()


def test_captions_are_the_manifests(tmp_path):
    records = [
        llava("An <image> answer.", 0),
        llava("An answer.", 1, text=" The <image>\ntext. "),
        llava("An answer.", 2, text=""),
        {"id": 3, "conversations": [{"from": "gpt", "value": 7}]},
    ]
    manifest = Manifest.read([str(save(tmp_path / "in.jsonl", records))], version="plain")
    assert [sample.caption for sample in manifest] == [caption_of(record) for record in records]


def test_messages_of_openais_users_are_read(tmp_path, capfd):
    """Catches a tool that refuses, or finds no caption in, what training reads: turns under `messages`, with `role` and
    `content`, the content in parts or not."""
    caption = "A man in a red shirt rides a brown horse."
    parts = [{"type": "image"}, {"type": "text", "text": "Describe it."}]
    spoken = [
        [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": caption}]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nDescribe it."},
         {"role": "assistant", "content": caption}],
    ]  # fmt: skip
    records = [{"id": str(n), "image": f"{n}.jpg", "messages": turns} for n, turns in enumerate(spoken)]
    records.append({"id": "2", "image": "2.jpg", "conversations": spoken[1]})
    source, target = save(tmp_path / "in.json", records), tmp_path / "out.json"
    assert run(source, target) == 0, capfd.readouterr().err
    written = json.loads(target.read_text())
    assert [{key: record[key] for key in before} for record, before in zip(written, records, strict=True)] == records
    manifest = Manifest.read([str(target)], version="chatml")
    assert [sample.caption for sample in manifest] == [caption] * 3
    assert all(len(sample.hallucinated_captions) == 1 for sample in manifest)


def test_workers_order_and_format_change_nothing(tmp_path):
    records = some(280)
    source = save(tmp_path / "in.json", records, indent=1)
    assert run(source, tmp_path / "one.json") == 0
    assert run(source, tmp_path / "two.json", "--num-workers", 2) == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert run(save(tmp_path / "in.jsonl", records[::-1]), tmp_path / "lines.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines[::-1] == json.loads((tmp_path / "one.json").read_text())


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = save(tmp_path / "in.json", [llava("A red cat sits on a mat. " * 40, i) for i in range(20000)])
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 20000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("in.json", "", ("an empty file", "list of records")),
        ("in.json", "{}", ("one JSON object", ".jsonl")),
        ("in.json", "hello", ("'hello'", "list of records")),
        ("in.json", "[]", ("holds no records",)),
        ("in.json", '[{"id": 1, "conversations": []}', ("expected ',' or ']'", "cut off")),
        ("in.json", '[{"id": 1, "conversations": []},\n{"id": ', ("line 2", "cut off")),
        ("in.json", '[{"id": 1, "conversations": []}] x', ("text behind the list",)),
        ("in.json", "[3]", ("record 0 is no object",)),
        ("in.jsonl", '{"id": 1, "conversations": []}\n\n3', ("record 1 is no object", "line 3")),
        ("in.jsonl", '{"id": 1, "conversations": []}\n{"id"', ("line 2", "broken JSON")),
        ("in.jsonl", '{"id": 1}', ("record 0", "conversations")),
        ("in.jsonl", '{"conversations": [], "text": 3}', ("'text'", "int")),
        ("in.json", b"\xff\xfe", ("not UTF-8",)),
    ],
)
def test_faults_of_the_file_are_one_line_and_leave_nothing(tmp_path, capfd, name, text, words):
    source = tmp_path / name
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(source, tmp_path / "out.json") == 2
    error = [line for line in capfd.readouterr().err.split("\n") if "error" in line]
    assert len(error) == 1 and all(word in error[0] for word in (*words, name)), error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_overwritten_unasked(tmp_path, capfd):
    source, target = save(tmp_path / "in.json", some(3)), tmp_path / "out.json"
    target.write_text("precious")
    assert run(source, target) == 2 and "--force" in capfd.readouterr().err
    assert target.read_text() == "precious"
    assert run(source, source, "--force") == 2 and "is --input" in capfd.readouterr().err
    assert run(source, tmp_path / "out.txt") == 2 and ".jsonl" in capfd.readouterr().err
    assert run(tmp_path / "none.json", target, "--force") == 2 and "no such file" in capfd.readouterr().err
    assert run(source, target, "--force") == 0
    assert run(target, tmp_path / "again.jsonl", "--replace", "--seed", 9) == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [r["Hallucination caption"] for r in again] != [
        r["Hallucination caption"] for r in json.loads(target.read_text())
    ]


def test_markdown_report_and_the_real_process(tmp_path):
    source = save(tmp_path / "in.json", [llava("A cat | on a *mat*.", 1), llava("", 2)])
    command = [sys.executable, TOOLS / "generate_hallucinations.py", "--method", "rules", "--input", source]
    done = subprocess.run(
        [*command, "--output", tmp_path / "o.json", "--report", tmp_path / "r.md"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 of 1 captions" in done.stdout and "1 without a caption" in done.stdout
    row = (tmp_path / "r.md").read_text().splitlines()[-1]
    assert row.startswith("|") and "\\|" in row and "**" in row
    done = subprocess.run([*command, "--output", tmp_path / "o.json"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_what_a_killed_run_left_is_removed_but_not_what_another_is_writing(tmp_path):
    """Each kill left a hidden `.part` as large as the output."""
    source, target = save(tmp_path / "a.json", some(2)), tmp_path / "b.json"
    (tmp_path / ".b.json.dead1234.part").write_text("half")
    (tmp_path / ".c.json.dead1234.part").write_text("another output's")
    with writing(target) as file:
        file.write("under way")
        file.flush()
        (held,) = set(tmp_path.glob(".b.json.*.part"))
        assert run(source, target) == 0
        assert set(tmp_path.glob(".b.json.*.part")) == {held} and held.read_text() == "under way"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", ".c.json.dead1234.part"}
