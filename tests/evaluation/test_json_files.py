"""Answer files that are nested deep, hold numbers without end, lists for names, or half a surrogate pair: one line.

They were tracebacks (RecursionError, TypeError: unhashable, UnicodeEncodeError).
"""

import json
from pathlib import Path

import pytest

from hacl_megatron.evaluation.journal import Journal
from tests.tool_runs import run_tool

QUESTION = {"question_id": 1, "image": "1.jpg", "text": "Is there a car?", "label": "no"}
ANNOTATION = {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}
GOOD = {
    "pope": {"questions": [QUESTION], "answers": [{"question": QUESTION["text"], "answer": "No"}]},
    "amber": {"annotations": [ANNOTATION], "answers": [{"id": 1005, "response": "Yes"}]},
    "chair": {"objects": {"1": ["cake"]}, "captions": [{"image_id": 1, "caption": "A cake."}]},
}


def evaluate(folder: Path, task: str, contents: dict[str, str]) -> int:
    flags: list[object] = []
    for name, text in contents.items():
        (folder / f"{name}.json").write_text(text)
        flags += [f"--{name}", folder / f"{name}.json"]
    return run_tool("evaluate", "--task", task, *flags, "--output", folder / "out.json")


LISTS = ("pope", "amber")
DEEP = "[" * 50_000 + "]" * 50_000
CASES = [
    *[(task, name, f"{json.dumps(some)[:-1]}, {DEEP}]") for task in LISTS for name, some in GOOD[task].items()],
    *[(task, file, DEEP) for task in GOOD for file in GOOD[task]],
    ("chair", "objects", '{"1": %s}' % ("[" * 900 + "]" * 900)),
    ("pope", "answers", '{"answer": "No", "more": %s}' % ("[" * 900 + "]" * 900)),
    ("pope", "answers", '{"answer": "No", "question": %s}' % ("9" * 10_000)),
    ("pope", "questions", json.dumps([{**QUESTION, "text": 3}])),
    ("pope", "questions", json.dumps([{**QUESTION, "label": ["no"]}])),
    ("amber", "annotations", json.dumps([{**ANNOTATION, "id": [1]}])),
    ("amber", "annotations", json.dumps([{**ANNOTATION, "type": {}}])),
    ("amber", "answers", json.dumps([{"id": {"a": 1}, "response": "Yes"}])),
    ("chair", "captions", json.dumps([{"image_id": [1], "caption": "A cake."}])),
]  # fmt: skip


@pytest.mark.parametrize(("task", "file", "text"), CASES, ids=range(len(CASES)))
def test_one_line_that_names_the_file(tmp_path, capfd, task, file, text):
    contents = {name: json.dumps(value) for name, value in GOOD[task].items()}
    assert evaluate(tmp_path, task, {**contents, file: text}) == 2
    errors = capfd.readouterr().err
    assert f"{file}.json" in errors and errors.count("\n") == 1 and "Traceback" not in errors
    assert len(errors) < 1000


def test_half_of_a_surrogate_pair_is_scored_and_written(tmp_path, capfd):
    """The results file shows a doubtful answer, and could not be written."""
    answer = {"question": QUESTION["text"], "answer": "isn't \ud83d\x1b[2J"}
    contents = {"questions": json.dumps([QUESTION]), "answers": json.dumps(answer)}
    assert evaluate(tmp_path, "pope", contents) == 0
    found = json.loads((tmp_path / "out.json").read_bytes().decode("utf-8"))
    assert found["details"]["ambiguous_answers"][0]["answer"] == answer["answer"]
    assert "\x1b" not in capfd.readouterr().out


def test_a_journal_that_holds_a_deep_line_names_it(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal(path, {}, lambda record: record["id"]) as journal:
        journal.append({"id": 1})
    path.write_text(path.read_text() + DEEP + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2"):
        Journal(path, {}, lambda record: record["id"])
