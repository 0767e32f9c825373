"""A file that several processes write in shares is, once joined, byte for byte what one process writes."""

import json
import os
from pathlib import Path

import pytest

from hacl_megatron.hallucinate.files import answers_of
from tests.hallucinate.test_files import llava, run, save, some
from tests.hallucinate.test_llm import KEY, ChatServer
from tests.tool_runs import run_tool


def records() -> list[dict]:
    """Some without a name, whose number in the file then decides what the rules write."""
    found = [*some(30), llava("A red car.", 99, text="A dog \ud83d.")]
    for record in found[1::3]:
        del record["id"], record["image"]
    return found


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_rules(tmp_path: Path, ending: str) -> None:
    """Catches records at a border that are written twice or not at all, and choices that depend on the share."""
    source = save(tmp_path / "in.jsonl", records())
    whole, shared = tmp_path / f"whole.{ending}", tmp_path / f"shared.{ending}"
    assert run(source, whole, "--per-caption", 2) == 0
    flags = ["--per-caption", 2, "--num-shards", 3]
    for index in (2, 0):
        assert run(source, shared, *flags, "--shard-index", index) == 0
    assert run(source, shared, *flags, "--merge") == 2, "share 1 is missing"
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shared.share-*")}
    for index in (0, 1, 2):
        assert run(source, shared, *flags, "--shard-index", index) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in done.items()), "what was done stays done"
    assert run(source, shared, "--per-caption", 1, "--num-shards", 3, "--merge") == 2, "made with other settings"
    assert not shared.exists()
    assert run(source, shared, *flags, "--merge") == 0
    assert shared.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", whole.name, shared.name}


def test_more_shares_than_lists(tmp_path: Path, capfd) -> None:
    """A list is one share's; the others have nothing, and the file is whole all the same."""
    source = save(tmp_path / "in.json", records())
    assert run(source, tmp_path / "whole.json") == 0
    for index in range(2):
        assert run(source, tmp_path / "shared.json", "--num-shards", 2, "--shard-index", index) == 0
    assert "is one JSON list, which one share reads alone" in capfd.readouterr().out
    assert run(source, tmp_path / "shared.json", "--num-shards", 2, "--merge") == 0
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_an_llm_is_asked_once_by_whichever_share_and_what_it_refused_is_joined(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    captions = [f"A red dog number {number} on a table." for number in range(9)]
    save(tmp_path / "in.jsonl", [{"id": str(i), "conversations": [], "text": text} for i, text in enumerate(captions)])

    def falsify(caption: str, _: int = 1) -> str:
        return "No." if "number 4" in caption else caption.replace("red dog", "yellow cat")

    with ChatServer(falsify) as server:
        common = ["--method", "llm", "--model", "m", "--base-url", server.url, "--input", tmp_path / "in.jsonl"]
        assert run_tool("generate_hallucinations", *common, "--output", tmp_path / "whole.jsonl") == 0
        shared = [*common, "--output", tmp_path / "shared.jsonl", "--num-shards", 4]
        for index in range(4):
            assert run_tool("generate_hallucinations", *shared, "--shard-index", index) == 0
        assert run_tool("generate_hallucinations", *shared, "--merge") == 0
    for ending in ("", ".rejected.jsonl"):
        one, other = (tmp_path / f"{name}.jsonl{ending}" for name in ("whole", "shared"))
        assert one.read_bytes() == other.read_bytes()
        asked = sum(server.seen.values())
        assert run_tool("generate_hallucinations", *common, "--output", tmp_path / "shared.jsonl", "--force") == 0
        assert sum(server.seen.values()) == asked, "the joined answers are used again"
    assert json.loads((tmp_path / "shared.jsonl.rejected.jsonl").read_text())["id"] == "4"
    assert not [*tmp_path.glob("*share-*")]


def test_a_join_that_was_killed_while_it_removed_shares_goes_on(tmp_path: Path, monkeypatch) -> None:
    """Catches a start anew that misses the shares that are joined already, and asks for them again."""
    source, shared = save(tmp_path / "in.jsonl", some(9)), tmp_path / "shared.jsonl"
    for index in range(3):
        assert run(source, shared, "--num-shards", 3, "--shard-index", index) == 0
    unlink, left = Path.unlink, [5]

    def killed(path: Path, **more) -> None:
        if "share-" in path.name:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        unlink(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert run(source, shared, "--num-shards", 3, "--merge") != 0
    whole = shared.read_bytes()
    assert run(source, shared, "--num-shards", 3, "--merge") == 0
    assert shared.read_bytes() == whole and {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "shared.jsonl"}


def test_a_join_that_was_killed_before_it_said_so_goes_on(tmp_path: Path, monkeypatch, capfd) -> None:
    """Between the rename and the mark of what is joined: catches a start anew that asks for --force, which a requeued
    job cannot give. What is not the shares' own is still nobody's to replace."""
    source, shared = save(tmp_path / "in.jsonl", some(9)), tmp_path / "shared.jsonl"
    for index in range(2):
        assert run(source, shared, "--num-shards", 2, "--shard-index", index) == 0

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hacl_megatron.hallucinate.files.write_done", killed)
        assert run(source, shared, "--num-shards", 2, "--merge") != 0
    whole = shared.read_bytes()
    for other in (whole + b"\n", whole[:-3], whole.replace(b"a", b"b", 1)):
        shared.write_bytes(other)
        assert run(source, shared, "--num-shards", 2, "--merge") == 2
        assert "shared.jsonl exists; give --force" in capfd.readouterr().err and shared.read_bytes() == other
    shared.write_bytes(whole)
    assert run(source, shared, "--num-shards", 2, "--merge") == 0
    assert shared.read_bytes() == whole and {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "shared.jsonl"}


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_join_that_was_killed_half_way_keeps_each_answer_once(tmp_path: Path, monkeypatch, killed_at: int) -> None:
    """In front of each file that it puts in place: catches answers that are written behind themselves again, and those
    of an earlier run, which are kept in front, that get lost."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    captions = [f"A red dog number {number} on a table." for number in range(9)]
    save(tmp_path / "in.jsonl", [{"id": str(i), "conversations": [], "text": text} for i, text in enumerate(captions)])
    shared = tmp_path / "shared.jsonl"
    replace, left = os.replace, [killed_at]

    def killed(source, target) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        replace(source, target)

    with ChatServer(lambda text, _=1: "No." if "number 4" in text else text.replace("red dog", "yellow cat")) as server:
        common = ["--method", "llm", "--base-url", server.url, "--input", tmp_path / "in.jsonl", "--output", shared]
        assert run_tool("generate_hallucinations", *common, "--model", "m") == 0
        earlier = [*answers_of(shared).read_text().splitlines()]
        shared.unlink()
        flags = [*common, "--model", "another", "--num-shards", 3]
        for index in range(3):
            assert run_tool("generate_hallucinations", *flags, "--shard-index", index) == 0
        logs = (answers_of(path) for path in sorted(tmp_path.glob("shared.share-*-of-00003.jsonl")))
        expected = [*earlier, *(line for log in logs for line in log.read_text().splitlines())]
        with monkeypatch.context() as patch:
            patch.setattr("hacl_megatron.hallucinate.files.os.replace", killed)
            assert run_tool("generate_hallucinations", *flags, "--merge") != 0
        assert run_tool("generate_hallucinations", *flags, "--merge") == 0
        assert len(expected) > len(earlier) + 9 and answers_of(shared).read_text().splitlines() == expected
        assert not [*tmp_path.glob("*share-*")]


def test_other_records_of_the_same_size_are_another_input(tmp_path: Path, capfd) -> None:
    """Catches shares of two states of a file that are joined."""
    source, shared = save(tmp_path / "in.jsonl", some(9)), tmp_path / "shared.jsonl"
    assert run(source, shared, "--num-shards", 2, "--shard-index", 0) == 0
    os.utime(source, ns=(0, 0))
    assert run(source, shared, "--num-shards", 2, "--shard-index", 1) == 0
    assert run(source, shared, "--num-shards", 2, "--merge") == 2
    assert "--shard-index 0;" in capfd.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_an_input_without_records_is_refused(tmp_path: Path, capfd, ending: str) -> None:
    """As by one process: catches an empty file that is written in silence."""
    source, shared = tmp_path / "in.jsonl", tmp_path / f"shared.{ending}"
    source.write_text("\n\n")
    for index in range(2):
        assert run(source, shared, "--num-shards", 2, "--shard-index", index) == 0
    assert run(source, shared, "--num-shards", 2, "--merge") == 2
    assert "in.jsonl: holds no records; expected at least one" in capfd.readouterr().err and not shared.exists()
