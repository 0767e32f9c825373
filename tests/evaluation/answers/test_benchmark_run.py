"""Whole runs of the command: killed and resumed, in shards, with broken images, in every benchmark's own format."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.answers.answerer import prompt_rows, read_export
from hacl_megatron.evaluation.answers.benchmarks import Amber, BenchmarkFiles, Item, Pope
from hacl_megatron.evaluation.journal import Journal, settings_path
from tests.distributed import context
from tests.evaluation.exports import write_pope_questions
from tests.tool_runs import run_tool

DATA = Path(__file__).parent / "data"
NUM_QUESTIONS = 24


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory, exports: dict[str, Path], images: Path) -> list[str]:
    """Flags of a POPE run but for --output."""
    questions = tmp_path_factory.mktemp("pope") / "q.json"
    write_pope_questions(questions, sorted(path.name for path in images.iterdir()), NUM_QUESTIONS)
    return ["--hf", str(exports["square"]), "--task", "pope", "--questions", str(questions),
            "--images", str(images), "--batch-size", "2", "--max-new-tokens", "8", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def made_whole(pope: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_tool("evaluate", *pope, "--output", folder / "whole.json") == 0
    return folder


@pytest.fixture
def whole(made_whole: Path, tmp_path: Path) -> dict:
    """Results of a run that nothing stopped, with its files, whole.answers.jsonl among them, in tmp_path."""
    shutil.copytree(made_whole, tmp_path, dirs_exist_ok=True)
    return json.loads((tmp_path / "whole.json").read_text())


def test_answers_that_the_context_cuts_are_counted(pope: list[str], tmp_path: Path, capsys) -> None:
    """Catches scores of answers that the model could not finish, without a word beside them."""
    export = shutil.copytree(pope[pope.index("--hf") + 1], tmp_path / "short")
    config = json.loads((export / "config.json").read_text())
    questions = records(Path(pope[pope.index("--questions") + 1]))
    tokenizer, sizes = load_tokenizer(str(export)), read_export(export)
    suffix = Pope.suffix
    longest = max(len(prompt_rows(question["text"] + suffix, tokenizer, sizes)) for question in questions)
    config["text_config"]["max_position_embeddings"] = longest + 4
    (export / "config.json").write_text(json.dumps(config))
    short = [str(export) if word == pope[1] else word for word in pope]
    assert run_tool("evaluate", *short, "--output", tmp_path / "short.json") == 0
    result, answers = json.loads((tmp_path / "short.json").read_text()), records(tmp_path / "short.answers.jsonl")
    cut = [answer for answer in answers if "cut" in answer]
    assert 0 < len(cut) < NUM_QUESTIONS and result["counts"]["cut answers"] == len(cut)
    line = f"{len(cut)} answers were cut: the answer ends at the model's context of {longest + 4} tokens"
    assert line in capsys.readouterr().out


def test_a_killed_run_goes_on_where_it_stopped(pope: list[str], whole: dict, tmp_path: Path) -> None:
    output, answers = tmp_path / "killed.json", tmp_path / "killed.answers.jsonl"
    # A process of the tests' fork server, which has paid the imports.
    process = context.Process(target=run_tool, args=("evaluate", *pope, "--output", str(output)))
    process.start()
    deadline = time.monotonic() + 300
    while not answers.is_file() or answers.read_bytes().count(b"\n") < 4:
        assert process.is_alive() and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = answers.read_bytes()
    assert 4 <= before.count(b"\n") < NUM_QUESTIONS and not output.exists()
    with open(answers, "ab") as file:
        file.write(b'{"question_id": 99, "ans')  # as if the kill had come amid a line

    assert run_tool("evaluate", *pope, "--output", output) == 0
    after = answers.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])  # nothing was asked again
    assert records(answers) == records(tmp_path / "whole.answers.jsonl")
    assert json.loads(output.read_text())["metrics"] == whole["metrics"]


def test_a_finished_run_is_scored_again_without_the_model(pope, whole, tmp_path: Path, monkeypatch) -> None:
    before = (tmp_path / "whole.answers.jsonl").read_bytes()
    monkeypatch.setattr("hacl_megatron.evaluation.answers.answerer.Answerer", None)
    assert run_tool("evaluate", *pope, "--output", tmp_path / "whole.json") == 0
    assert (tmp_path / "whole.answers.jsonl").read_bytes() == before
    again = json.loads((tmp_path / "whole.json").read_text())
    assert (again["metrics"], again["settings"]) == (whole["metrics"], whole["settings"])


def test_results_say_how_the_answers_were_made(whole: dict, pope: list[str]) -> None:
    settings = whole["settings"]
    assert settings["hf"] == pope[1] and settings["model"].startswith("sha256:")
    assert (settings["dtype"], settings["num_beams"], settings["max_new_tokens"]) == ("float32", 1, 8)
    assert settings["prompt_suffix"] == "\nAnswer the question using a single word or phrase."
    assert set(whole["files"]) == {"questions", "answers"}
    assert whole["counts"]["questions"] == NUM_QUESTIONS


def test_answers_of_other_settings_are_not_mixed(pope, whole, tmp_path: Path, exports, capsys) -> None:
    output = ("--output", tmp_path / "whole.json")
    assert run_tool("evaluate", *pope, *output, "--max-new-tokens", "5") == 2
    assert "max_new_tokens 8, now it is 5" in capsys.readouterr().err
    other = shutil.copytree(exports["square"], tmp_path / "other")
    weights = next(other.glob("model*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    assert run_tool("evaluate", *pope, *output, "--hf", other) == 2
    assert "answers made with model" in capsys.readouterr().err
    settings_path(tmp_path / "whole.answers.jsonl").unlink()
    assert run_tool("evaluate", *pope, *output) == 2
    assert "no run of this command began" in capsys.readouterr().err


def test_shards_together_give_what_one_process_gives(pope, whole, tmp_path: Path, capsys) -> None:
    shards = [*pope, "--output", str(tmp_path / "s.json"), "--num-shards", "3", "--shard-index"]
    assert run_tool("evaluate", *shards, "2") == 0
    assert run_tool("evaluate", *shards, "0") == 0
    assert "8 of 24 answers are still to come" in capsys.readouterr().out
    assert not (tmp_path / "s.json").exists()
    assert run_tool("evaluate", *shards, "1") == 0
    assert records(tmp_path / "s.answers.jsonl") == records(tmp_path / "whole.answers.jsonl")
    assert json.loads((tmp_path / "s.json").read_text())["metrics"] == whole["metrics"]


def test_a_broken_image_is_listed_and_ends_nothing(pope, whole, images: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    first, second = sorted(folder.iterdir())[:2]
    first.write_bytes(first.read_bytes()[:-40])
    second.unlink()
    capsys.readouterr()
    assert run_tool("evaluate", *pope, "--images", folder, "--output", tmp_path / "b.json") == 0
    result = json.loads((tmp_path / "b.json").read_text())
    listed = result["details"]["unusable_items"]
    broken = {number for number in range(1, NUM_QUESTIONS + 1) if number % 6 in (1, 2)}
    assert {item["key"] for item in listed} == broken and result["counts"]["unusable items"] == len(broken)
    assert "no such file" in listed[1]["reason"] and "cut off" in listed[0]["reason"]
    assert f"{len(broken)} items could not be put" in capsys.readouterr().out
    for answer, sound in zip(
        records(tmp_path / "b.answers.jsonl"), records(tmp_path / "whole.answers.jsonl"), strict=True
    ):
        if answer["question_id"] in broken:
            assert answer["answer"] == "" and answer["error"]
        else:
            assert answer == sound

    # The image is there again: without their lines its questions are asked anew, and stand in their places.
    shutil.copy(images / second.name, second)
    answers = tmp_path / "b.answers.jsonl"
    kept = [line for line in answers.read_text().splitlines(keepends=True) if "no such file" not in line]
    answers.write_text("".join(kept))
    assert run_tool("evaluate", *pope, "--images", folder, "--output", tmp_path / "b.json") == 0
    assert [answer["question_id"] for answer in records(answers)] == list(range(1, NUM_QUESTIONS + 1))
    assert json.loads((tmp_path / "b.json").read_text())["counts"]["unusable items"] == len(broken) // 2


def test_amber_answers_are_a_list_of_its_own_form(exports, images: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["cloud"]},
        {"id": 1005, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 1006, "type": "relation", "truth": "yes"},
    ]
    queries = [{"id": a["id"], "image": names[0], "query": "Is there a dog?"} for a in annotations]
    for name, content in (("annotations", annotations), ("queries", queries)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in ("relation.json", "safe_words.txt"):
        shutil.copy(DATA / "amber" / name, tmp_path)
    flags = ("--hf", exports["pad"], "--task", "amber", "--annotations", tmp_path / "annotations.json",
             "--images", images, "--questions", tmp_path / "queries.json", "--max-new-tokens", 4,
             "--device", "cpu")  # fmt: skip
    assert run_tool("evaluate", *flags, "--output", tmp_path / "r.json") == 0
    answers = json.loads((tmp_path / "r.answers.json").read_text())
    assert [answer["id"] for answer in answers] == [1, 1005, 1006]
    assert all(isinstance(answer["response"], str) for answer in answers)
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"CHAIR", "existence F1", "relation accuracy"} <= set(result["metrics"])
    assert result["settings"]["amber_nouns"] == "lexicon" and "approximation" in result["notes"][0]


@pytest.mark.parametrize(
    ("said", "response"),
    [("Yes", "Yes"), ("no.", "No"), ("Yes, the sky is.", "Yes"), ("NO", "No"), ("Not really", "Not really"), ("", "")],
)
def test_an_amber_answer_is_the_yes_or_no_it_starts_with(said: str, response: str) -> None:
    files = BenchmarkFiles(annotations=DATA / "amber/annotations.json")
    amber = Amber(files, ask=False)
    question = next(id for id, annotation in amber.annotations.items() if annotation["type"] == "relation")
    record = amber.record(Item(image="", prompt="", fields={"id": question}), said)
    assert record == {"id": question, "response": response, "said": said}
    described = next(id for id, annotation in amber.annotations.items() if annotation["type"] == "generative")
    assert amber.record(Item(image="", prompt="", fields={"id": described}), said)["response"] == said


def test_mmhal_answers_keep_every_key_of_its_template(exports, images: Path, tmp_path: Path, capsys) -> None:
    template = [
        {"question_type": "attribute", "question_topic": "animal", "image_id": "a1", "question": question,
         "image_src": f"https://example.org/x/{name}", "image_content": ["Dog"], "gt_answer": "Red.",
         "model_answer": ""}
        for question, name in zip(("What?", "Which?"), sorted(path.name for path in images.iterdir()), strict=False)
    ]  # fmt: skip
    (tmp_path / "template.json").write_text(json.dumps(template))
    flags = ("--hf", exports["square"], "--task", "mmhal", "--questions", tmp_path / "template.json",
             "--images", images, "--max-new-tokens", 4, "--device", "cpu",
             "--answers", tmp_path / "mine.json")  # fmt: skip
    assert run_tool("evaluate", *flags, "--output", tmp_path / "r.json") == 0
    answers = json.loads((tmp_path / "mine.json").read_text())
    assert [{**answer, "model_answer": ""} for answer in answers] == template
    assert all(answer["model_answer"] for answer in answers)
    assert "not judged" in capsys.readouterr().out


def test_chair_captions_every_image_with_known_objects(exports, images: Path, tmp_path: Path) -> None:
    (tmp_path / "objects.json").write_text('{"1": ["dog"], "2": [], "5": ["cat"], "99": ["car"]}')
    flags = ("--hf", exports["square"], "--task", "chair", "--objects", tmp_path / "objects.json", "--images", images,
             "--captions", tmp_path / "mine.jsonl", "--max-new-tokens", 4, "--device", "cpu")  # fmt: skip
    assert run_tool("evaluate", *flags, "--output", tmp_path / "r.json") == 0
    captions = records(tmp_path / "mine.jsonl")
    assert [caption["image_id"] for caption in captions] == [1, 2, 5]
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["captions"] == 3


def test_a_missing_library_is_named_before_any_generation(exports, images, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "textblob.en.inflect", None)
    monkeypatch.setattr("hacl_megatron.evaluation.answers.answerer.Answerer", None)
    (tmp_path / "objects.json").write_text('{"1": ["dog"]}')
    flags = ("--hf", exports["square"], "--objects", tmp_path / "objects.json", "--images", images)
    assert run_tool("evaluate", "--task", "chair", *flags, "--output", tmp_path / "r.json") == 2
    assert "pip install textblob" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--images", "."), "none of the 24 images is there"),
        (("--images", "/no/such/folder"), "none of the 24 images is there"),
        (("--hf", "/no/such/model"), "no such file"),
        (("--batch-size", "0"), "--batch-size 0, expected at least 1"),
        (("--shard-index", "1"), "--shard-index 1, expected 0 to 0"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(flags, message, pope, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("hacl_megatron.evaluation.answers.answerer.Answerer", None)
    assert run_tool("evaluate", *pope, *flags, "--output", tmp_path / "r.json") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("r.*"))


def test_one_process_at_a_time_writes_a_journal(tmp_path: Path) -> None:
    path, key = tmp_path / "a.jsonl", lambda record: record["id"]
    with Journal(path, {"a": 1}, key) as journal:
        journal.append({"id": 3, "answer": "lines \u2028 within \ud800"})
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(path, {"a": 1}, key)
    with Journal(path, {"a": 1}, key) as journal:
        assert list(journal.done) == [3]
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1: not a record"):
        Journal(path, {"a": 1}, key)
