"""Hallucinated captions from an endpoint: over real HTTP, with everything that goes wrong there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.hallucinate.checks import cleaned, fault_of
from tests.hallucinate.chat_server import ChatServer
from tests.tool_runs import TOOLS, run_tool

KEY = "sk-secret-0123456789"
pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def source(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "in.json"
    records = [
        {"id": str(i), "image": f"{i}.jpg", "conversations": [], "text": f"A red dog number {i} on a wooden table."}
        for i in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


def falsify(caption: str, _: int = 1) -> str:
    return caption.replace("red dog", "yellow cat")


def ask(tmp_path: Path, server: ChatServer, *flags: object) -> int:
    arguments = ["--method", "llm", "--model", "m", "--base-url", server.url, "--timeout", 4, "--max-retries", 3]
    return run_tool(
        "generate_hallucinations",
        *arguments,
        "--input",
        tmp_path / "in.json",
        "--output",
        tmp_path / "out.json",
        *flags,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_reach_the_manifest_and_the_key_reaches_only_the_server(tmp_path, capfd):
    source(tmp_path, 12)
    with ChatServer(falsify, delay=0.05) as server:
        assert ask(tmp_path, server, "--concurrency", 4) == 0
    manifest = Manifest.read([str(tmp_path / "out.json")], version="plain")
    assert [sample.hallucinated_captions for sample in manifest] == [
        (f"A yellow cat number {i} on a wooden table.",) for i in range(12)
    ]
    assert set(server.seen.values()) == {1} and 2 <= server.most_under_way <= 4
    assert set(server.headers) == {f"Bearer {KEY}"}
    assert not (tmp_path / "out.json.rejected.jsonl").exists()
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_errors_are_retried_and_what_stays_bad_is_listed_and_filled(tmp_path):
    source(tmp_path, 8)

    def answer(caption: str, times: int):
        number = int(caption.split()[4])
        once = {0: 429, 1: 500, 2: None}  # None: a time-out
        if number in once and times == 1:
            return once[number]
        always = {
            3: "I'm sorry, but I can't help with that.",
            4: caption,
            5: "<html>",
            6: "Yes." + "\n" + falsify(caption),
            7: (falsify(caption)[:-5], "length"),
        }
        return always.get(number, f'Caption: "{falsify(caption)}"')

    with ChatServer(answer) as server:
        assert ask(tmp_path, server, "--attempts", 2, "--fill-with-rules") == 0
    rejected = {
        reject["id"]: [a["reason"] for a in reject["rejected"]]
        for reject in lines(tmp_path / "out.json.rejected.jsonl")
    }
    assert set(rejected) == {"3", "4", "5", "6", "7"}
    assert rejected["3"] == ["a refusal"] * 2 and rejected["4"] == ["equal to the caption"] * 2
    assert rejected["6"] == ["more than one line"] * 2 and rejected["5"][0].startswith("no answer: ")
    assert rejected["7"] == ["cut off at --max-tokens"] * 2
    manifest = Manifest.read([str(tmp_path / "out.json")], version="plain")
    for sample in manifest:
        if sample.name in rejected:  # by rules
            assert len(sample.hallucinated_captions) == 1 and sample.hallucinated_captions[0] != sample.caption
        else:
            assert sample.hallucinated_captions == (falsify(sample.caption),)


def test_a_killed_run_goes_on_without_asking_twice(tmp_path):
    source(tmp_path, 60)
    output = tmp_path / "out.json"
    answers = tmp_path / "out.json.answers.jsonl"
    with ChatServer(falsify, delay=0.05) as server:
        command = [sys.executable, str(TOOLS / "generate_hallucinations.py"), "--method", "llm", "--model", "m"]
        command += ["--base-url", server.url, "--concurrency", "2"]
        command += ["--input", str(tmp_path / "in.json"), "--output", str(output)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        deadline = time.monotonic() + 300
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= 10):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = answers.read_bytes().count(b"\n")
        assert 10 <= kept < 60 and not output.exists()
        with open(answers, "ab") as file:
            file.write(b'{"key": "00')  # the line that was being written
        assert ask(tmp_path, server, "--concurrency", 2) == 0
        # asked again: at most what was under way when the process died, and has no answer on disk
        assert sum(server.seen.values()) <= 60 + 2
        before = server.seen.copy()
        assert ask(tmp_path, server, "--force") == 0
        assert server.seen == before
    assert len(lines(answers)) == 60
    assert all(sample.hallucinated_captions for sample in Manifest.read([str(output)], version="plain"))


def test_requests_keep_the_pace_retries_included(tmp_path):
    source(tmp_path, 6)
    with ChatServer(lambda caption, times: 500 if times == 1 and " 0 " in caption else falsify(caption)) as server:
        assert ask(tmp_path, server, "--requests-per-minute", 600, "--concurrency", 6) == 0
    assert len(server.times) == 7
    assert server.times[-1] - server.times[0] >= 0.5  # 7 requests at 0.1 s: 0.6 s, less the first one's way
    assert max(b - a for a, b in zip(server.times, server.times[1:], strict=False)) > 0.05


@pytest.mark.parametrize(("status", "words"), [(401, "OPENAI_API_KEY"), (404, "--model")])
def test_what_no_retry_mends_stops_at_once_in_one_line(tmp_path, capfd, status, words):
    source(tmp_path, 30)
    with ChatServer(lambda *_: status) as server:
        assert ask(tmp_path, server) == 2
    error = capfd.readouterr().err
    assert words in error and str(status) in error and KEY not in error and "Traceback" not in error
    assert sum(server.seen.values()) <= 16 and not (tmp_path / "out.json").exists()


def test_an_endpoint_that_keeps_failing_stops_the_run(tmp_path, capfd):
    source(tmp_path, 200)
    with ChatServer(lambda *_: 500) as server:
        assert ask(tmp_path, server, "--max-retries", 0) == 2
    error = capfd.readouterr().err
    assert re.search(r"failed on 2\d captions in a row", error) and KEY not in error
    assert sum(server.seen.values()) < 40


def test_several_captions_differ_and_cost_one_request_each(tmp_path):
    source(tmp_path, 3)
    words = {1: "yellow cat", 2: "yellow cat", 3: "green cow", 4: "blue pig"}
    with ChatServer(lambda caption, times: caption.replace("red dog", words[times])) as server:
        assert ask(tmp_path, server, "--per-caption", 3) == 0
    for sample in Manifest.read([str(tmp_path / "out.json")], version="plain"):
        assert len(set(sample.hallucinated_captions)) == 3
    assert set(server.seen.values()) == {4}  # the repetition was asked for again


def test_a_key_is_asked_for_before_any_work(tmp_path, monkeypatch, capfd):
    source(tmp_path, 1)
    monkeypatch.delenv("OPENAI_API_KEY")
    flags = ["--input", tmp_path / "in.json", "--output", tmp_path / "out.json"]
    assert run_tool("generate_hallucinations", "--method", "llm", "--model", "m", *flags) == 2
    assert "OPENAI_API_KEY is not set" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("A cat sits on a red mat.", None),
        ("A dog sits under a red mat.", None),
        ("a dog sits on a RED mat", "equal to the caption"),
        ("A puppy sits on a red mat.", "only synonyms differ"),
        ("A cat.", "length"),
        ("A dog sits.", "length"),
        ("A mat sits on a red dog.", "the same words in another order"),
        ("A dog sits on the red mat.", "no content word differs"),
        ("A dog sits on a mat.", "only leaves words out"),
        ("", "empty"),
        ("...!", "no words"),
        ("I cannot help with that request.", "a refusal"),
    ],
)
def test_checks_of_one_answer(answer, fault):
    found = fault_of(cleaned(answer), "A dog sits on a red mat.", [])
    assert found is None if fault is None else found is not None and found.startswith(fault), found
