"""What the answers of both kinds rely on: a killed run's file goes on, nobody else writes it, nothing else is in it."""

import errno
import fcntl
from pathlib import Path

import pytest

from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.hallucinate.answers import AnswerLog, answer_key


def log(path: Path) -> AnswerLog:
    return AnswerLog(path)


def journal(path: Path) -> Journal:
    return Journal(path, {"model": "m"}, lambda record: record["key"])


def add(file: AnswerLog | Journal, number: int) -> None:
    if isinstance(file, AnswerLog):
        file.add(answer_key(number), str(number), f"answer {number} é\u2028", True)
    else:
        file.append({"key": number, "answer": f"answer {number} é\u2028"})


KINDS = pytest.mark.parametrize("open_file", [log, journal])


@KINDS
@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_cut_last_line_goes_and_the_next_stands_in_its_place(tmp_path, open_file, cut):
    """A line that was cut is taken for an answer, stops the next run, or is continued by the next answer."""
    path = tmp_path / "new folder" / "a.jsonl"
    with open_file(path) as file:
        for number in range(3):
            add(file, number)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with open_file(path) as file:
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
        add(file, 2)
        assert path.read_bytes() == whole  # with the system before the next line is begun


def test_the_log_gives_answers_back_while_it_grows(tmp_path):
    """A place that is off by what was read, written or cut in between."""
    for start in (0, 3):
        with log(tmp_path / "a.jsonl") as file:
            for number in range(start, start + 3):
                add(file, number)
                assert [file.get(answer_key(n)) for n in range(number + 2)] == [
                    *((f"answer {n} é\u2028", True) for n in range(number + 1)), None
                ]  # fmt: skip
            assert len(file) == start + 3


@KINDS
def test_one_process_at_a_time_holds_the_file(tmp_path, open_file, monkeypatch):
    path = tmp_path / "a.jsonl"
    with open_file(path) as file:
        add(file, 0)
        with pytest.raises(ValueError, match=r"a\.jsonl: an?other (run|process) is writing"):
            open_file(path)
        monkeypatch.setattr(fcntl, "flock", _no_locks)
        open_file(path).__exit__()
    monkeypatch.undo()
    open_file(path).__exit__()


def _no_locks(*_: object) -> None:
    raise OSError(38, "Function not implemented")


@KINDS
@pytest.mark.parametrize("line", ["[]", "{}", "7", '{"key": [', "\udcff"])
def test_a_line_of_something_else_is_named_and_the_file_let_go(tmp_path, open_file, line):
    path = tmp_path / "a.jsonl"
    with open_file(path) as file:
        add(file, 0)
    first = path.read_bytes()
    path.write_bytes(first + line.encode("utf-8", "surrogateescape") + b"\n" + first)
    with pytest.raises(ValueError, match=r"a\.jsonl.* line 2.* (not a record|no answer)"):
        open_file(path)
    path.write_bytes(first)
    open_file(path).__exit__()


@KINDS
def test_a_file_system_without_locks_is_said(tmp_path, open_file, monkeypatch, capsys):
    """Two processes mix their lines, and nobody was told that nothing prevents it."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_file(tmp_path / "a.jsonl") as file:
        add(file, 0)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a.jsonl'} cannot be locked here (No locks available)" in said
