"""POPE's metrics against what POPE's own script prints."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from hacl_megatron.evaluation.answers.benchmarks import BenchmarkFiles, Pope
from hacl_megatron.evaluation.answers.pope import score_pope
from hacl_megatron.evaluation.json_files import read_records
from tests.tool_runs import run_tool

DATA = Path(__file__).parent / "data/pope"


def questions_and_answers(split: str) -> tuple[list[dict], list[dict]]:
    return (
        read_records(DATA / f"coco_pope_{split}.json", needed=("text", "label"), kind="questions"),
        read_records(DATA / f"answers_{split}.jsonl", needed=("answer",), kind="answers"),
    )


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_every_digit_is_the_published_scripts(split: str) -> None:
    lines = (DATA / f"official_{split}.txt").read_text().splitlines()
    tp, fp, tn, fn = map(int, lines[1].split())
    scores = score_pope(*questions_and_answers(split))
    assert [str(value) for value in scores.metrics.values()] == [line.split(": ")[1] for line in lines[2:7]]
    assert list(scores.counts.values()) == [150, tp, fp, tn, fn]


def test_a_metric_without_a_denominator_is_undefined_not_an_end() -> None:
    asked = [{"text": "Is there a car?", "label": "no"}]
    metrics = score_pope(asked, [{"answer": "no"}]).metrics
    assert metrics == {"accuracy": 1.0, "precision": None, "recall": None, "f1": None, "yes ratio": 0.0}
    all_wrong = score_pope([*asked, {"text": "Is there a cat?", "label": "yes"}], [{"answer": "yes"}, {"answer": "no"}])
    assert all_wrong.metrics["f1"] is None and all_wrong.metrics["precision"] == 0.0


def test_an_empty_answer_is_counted_and_named() -> None:
    scores = score_pope([{"text": "Is there a car?", "label": "no"}], [{"answer": " "}])
    assert scores.counts["false positives"] == 1
    assert "1 empty answers" in scores.notes[0]


@pytest.mark.parametrize(
    ("answer", "published", "is_doubtful"),
    [
        ("No\n", "yes", True), ("NO.", "yes", True), ("There isn't one.", "yes", True), ("Not at all", "yes", True),
        ("It isn’t there", "yes", True), ("\nNo", "yes", True), ("Yes, there is no doubt", "no", True),
        ("**No**", "yes", True), ("Nah", "yes", True), ("It is without one", "yes", True), ("isnt there", "yes", True),
        ("N", "yes", True), ("Negative", "yes", True), ("Neither", "yes", True), ("A nation", "yes", False),
        ("No", "no", False), ("no, it is not", "no", False), ("Yes", "yes", False),
        ("Yes. It is not big.", "yes", False),
        ("A knot", "yes", False), ("", "yes", False), ("There is no car", "no", False),
    ],
)  # fmt: skip
def test_the_published_rule_decides_and_its_doubtful_readings_are_named(answer, published, is_doubtful) -> None:
    """Silently, a model that ends its "No" with a line break had a yes ratio of 1."""
    text = answer  # AoiDragon/POPE, evaluate.py
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    assert ("no" if "No" in words or "not" in words or "no" in words else "yes") == published
    scores = score_pope([{"text": "Is there a car?", "label": published}] * 5, [{"answer": answer}] * 5)
    assert scores.metrics["accuracy"] == 1.0
    said = [note for note in scores.notes if "seem to say" in note]
    assert len(said) == is_doubtful and len(scores.details.get("ambiguous_answers", ())) == 5 * is_doubtful
    if is_doubtful:
        other = "no" if published == "yes" else "yes"
        assert f"5 answers seem to say {other} and are read as {published}" in said[0] and "1: " in said[0]


def test_answers_in_llavas_form_score_alike(tmp_path: Path) -> None:
    """As its model_vqa_loader.py writes them for the very same questions."""
    lines = (DATA / "answers_popular.jsonl").read_text().splitlines()
    path, questions = tmp_path / "llava.jsonl", DATA / "coco_pope_popular.json"
    records = [
        {"question_id": n, "prompt": answer["question"] + "\nAnswer the question using a single word or phrase.",
         "text": answer["answer"], "answer_id": "x", "model_id": "llava", "metadata": {}}
        for n, answer in enumerate(map(json.loads, lines))
    ]  # fmt: skip
    benchmark = Pope(BenchmarkFiles(questions=questions), ask=False)
    path.write_text("\n".join(map(json.dumps, records)))
    scores = benchmark.score(benchmark.read_answers(path), path)
    assert scores.metrics == benchmark.score(benchmark.read_answers(DATA / "answers_popular.jsonl"), path).metrics
    path.write_text(json.dumps({"question_id": 1, "output": "yes"}))
    with pytest.raises(ValueError, match=r"line 1: found output, question_id, .*its own or LLaVA's \(prompt, text\)"):
        benchmark.read_answers(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: a.pop(), "149 answers to 150 questions"),
        (lambda q, a: a.reverse(), "order of the questions"),
        (lambda q, a: q[3].update(label="maybe"), "question 4: label 'maybe'"),
        (lambda q, a: a[3].update(answer=None), "record 4: answer is NoneType"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(change, message: str) -> None:
    questions, answers = questions_and_answers("random")
    change(questions, answers)
    with pytest.raises(ValueError, match=message):
        score_pope(questions, answers)


def test_answers_with_questions_in_other_letters_and_with_a_prompt_behind_them_are_taken() -> None:
    asked = [{"text": "Is there a car?", "label": "no"}]
    for text in ("is there  a car?", "Is there a car?\nAnswer the question using a single word or phrase."):
        assert score_pope(asked, [{"question": text, "answer": "no"}]).metrics["accuracy"] == 1.0


def test_the_command_writes_and_shows_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers, output = DATA / "coco_pope_popular.json", DATA / "answers_popular.jsonl", tmp_path / "a/r.json"
    assert (
        run_tool("evaluate", "--task", "pope", "--questions", questions, "--answers", answers, "--output", output) == 0
    )
    result, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert result["metrics"]["accuracy"] == 0.76
    assert re.search(r"^f1 +0\.7777777777777777$", shown, re.MULTILINE)
    assert result["counts"]["questions"] == 150
    assert result["settings"]["task"] == "pope"
    assert result["versions"]["python"]
    assert result["files"]["answers"]["digest"] == f"sha256:{hashlib.sha256(answers.read_bytes()).hexdigest()}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --task"),
        (("--task", "pope"), "--task pope needs --questions"),
        (("--task", "pope", "--questions", DATA / "coco_pope_random.json"), "give --answers"),
        (("--task", "pope", "--questions", DATA / "coco_pope_random.json", "--captions", "x"), "by --answers"),
        (("--task", "pope", "--questions", DATA / "nowhere.json", "--answers", "x"), "no such file"),
        (("--task", "pope", "--questions", DATA / "answers_random.jsonl", "--answers", "x"), "POPE questions"),
        (("--task", "chair", "--objects", DATA.parent / "chair/objects.json"), "give --captions"),
        (("--task", "amber", "--answers", "x"), "--task amber needs --annotations"),
        (("--task", "mmhal", "--answers", "x", "--images", "y"), "--images is for generation"),
    ],
)
def test_a_mistake_is_one_line(arguments, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("evaluate", *arguments, "--output", tmp_path / "results.json") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "results.json").exists()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answer": "yes"}\n\n{"answer": "y\n')
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        read_records(path, needed=("answer",), kind="answers")
    path.write_text('{"answer": "yes"}\n{"text": "yes"}\n')
    with pytest.raises(ValueError, match="line 2: found text, expected an object with answer"):
        read_records(path, needed=("answer",), kind="answers")


@pytest.mark.parametrize("prefix", ["", "pope="])
def test_a_url_of_images_is_refused_without_its_password(prefix: str, tmp_path: Path, capfd) -> None:
    """Catches one that became a path first, and was then shown as it is."""
    given = ["--task", "pope", "--hf", tmp_path, "--images", f"{prefix}s3://user:hidden@bucket/a"]
    assert run_tool("evaluate", *given, "--output", tmp_path / "r.json") == 2
    said = "".join(capfd.readouterr())
    assert "--images s3://...@bucket/a: found a URL" in said and "hidden" not in said


@pytest.mark.parametrize("flag", ["--data-path", "--questions", "--load", "--output"])
def test_no_url_of_a_file_is_shown_with_its_password(capfd, tmp_path: Path, flag: str) -> None:
    """As a path it lost a slash, was looked for in the working folder, and shown as it had been given."""
    given = {"--load": tmp_path, "--tasks": "preference", "--image-folder": tmp_path, "--output": tmp_path / "out.json"}
    given[flag] = "s3://user:hidden@bucket/a?X-Amz-Signature=hidden"
    assert run_tool("evaluate", *(part for pair in given.items() for part in pair)) == 2
    said = capfd.readouterr().err
    assert f"{flag} s3://...@bucket/a?...: found a URL; " in said and "hidden" not in said and said.count("\n") == 1
