"""Evaluations without generation: the same at every layout as transformers on the export; resumed; with a bad image."""

import base64
import json
import re
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from hacl_megatron.evaluation.answers.benchmarks import BENCHMARKS
from hacl_megatron.evaluation.likelihood.beliefs import why_no_heads
from hacl_megatron.evaluation.likelihood.preference import CAPTION_QUESTION
from hacl_megatron.evaluation.likelihood.task_run import from_text
from hacl_megatron.evaluation.likelihood.task_table import TASKS as TABLE
from hacl_megatron.evaluation.likelihood.yesno import SHORT_ANSWER
from tests.browser import Browser, needs_browser
from tests.distributed import context, run_distributed
from tests.evaluation.exports import write_pope_questions
from tests.evaluation.likelihood.likelihood_oracle import PLAIN, Oracle, records
from tests.tiny import write_tiny_llava
from tests.tiny_data import write_tiny_data
from tests.tool_runs import run_tool, to_hf, to_megatron

NUM_SAMPLES = 14
BROKEN = 5
LAYOUTS = {"tp1": (1, 1, 1), "tp2": (2, 2, 1), "tp2-sp": (2, 2, 1), "pp2": (2, 1, 2), "dp2": (2, 1, 1)}
"""Processes, tensor-parallel size, pipeline stages."""
TASKS = ("preference", "retrieval", "yesno")
TOLERANCE = 1e-4
QUESTION, CHOSEN, REJECTED = "What is there?", "A blue square on the left.", "A red circle."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint (`save`), its export, data with one broken image, questions, and `LAYOUT.json` of every layout."""
    folder = tmp_path_factory.mktemp("likelihood")
    to_megatron(write_tiny_llava(folder / "source"), folder / "save")
    to_hf(folder / "save", folder / "export")
    data = write_tiny_data(folder / "data", n=NUM_SAMPLES)
    samples = json.loads(data["contrastive"].read_text())
    for sample in samples[::3]:  # asks for something else: the fixed question takes its place
        sample["conversations"] = [
            {"from": "human", "value": "<image>\nName a shape."},
            {"from": "gpt", "value": "A circle."},
        ]
    samples[2]["Hallucination caption"] = [samples[2]["text"]]  # no twin, for it does not differ
    data["contrastive"].write_text(json.dumps(samples))
    broken = data["images"] / samples[BROKEN]["image"]
    broken.write_bytes(broken.read_bytes()[:200])
    names = [sample["image"] for sample in samples]
    write_pope_questions(folder / "questions.json", names, NUM_SAMPLES + 3)
    for size in (1, 2):
        wanted = [layout for layout, (processes, *_) in LAYOUTS.items() if processes == size]
        commands = [command(folder, folder / "save", layout) for layout in wanted]
        if size == 1:
            commands.append(
                command(folder, folder / "export", "tp1", "--version", "plain", "--limit", "4", name="plain")
            )
            commands.append(page_command(folder))
        run_distributed(evaluate_all, size, commands)
    return folder


def command(folder: Path, load: Path, layout: str, *extra: str, name: str | None = None) -> list[str]:
    _, tp, pp = LAYOUTS[layout]
    sequence_parallel = ["--sequence-parallel"] if layout.endswith("-sp") else []
    return [
        "--load", str(load), "--tasks", *TASKS, "--data-path", str(folder / "data" / "contrastive.json"),
        "--image-folder", str(folder / "data" / "images"), "--questions", str(folder / "questions.json"),
        "--output", str(folder / f"{name or layout}.json"), "--batch-size", "3", "--image-backend", "pillow",
        "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--device", "cpu",
        *sequence_parallel, *extra,
    ]  # fmt: skip


def page_command(folder: Path) -> list[str]:
    """Of tools/inspect_data.py, with a rejected answer beside the samples, and one record more than it is to show."""
    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    more = {"question": QUESTION, "image": samples[0]["image"], "chosen": CHOSEN, "rejected": [REJECTED, CHOSEN]}
    (folder / "data" / "page.json").write_text(json.dumps([{**more, "id": "left out"}, *samples, more]))
    ids = [f"#{number}" for number in range(1, NUM_SAMPLES + 2)]
    return [
        "--data-path", str(folder / "data" / "page.json"), "--image-folder", str(folder / "data" / "images"),
        "--load", str(folder / "export"), "--output", str(folder / "page.html"), "--batch-size", "3",
        "--image-backend", "pillow", "--device", "cpu", "--ids", *ids,
    ]  # fmt: skip


def evaluate_all(commands: list[list[str]]) -> None:
    for arguments in commands:
        assert run_tool("evaluate" if "--tasks" in arguments else "inspect_data", *arguments) == 0, arguments


def numbers(record: dict) -> np.ndarray:
    """Everything measured of an item, in one row."""
    if "error" in record:
        return np.empty(0)
    if "image_embedding" in record:
        texts = [record["image_embedding"], record["caption_embedding"], *record["hallucinated_embeddings"]]
        return np.concatenate([from_text(text) for text in texts])
    if "answer" in record:
        return np.array([record["log_likelihood_yes"], record["log_likelihood_no"]])
    return np.array([answer["log_likelihood"] for answer in (record["caption"], *record["hallucinated"])])


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder / "export", folder / "data" / "images")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tp1"])
@pytest.mark.parametrize("task", TASKS)
def test_every_layout_gives_the_same(folder: Path, task: str, layout: str) -> None:
    one, many = (records(folder / f"{name}.json", task) for name in ("tp1", layout))
    assert len(one) == len(many) >= NUM_SAMPLES - 1
    for expected, found in zip(one, many, strict=True):
        assert [expected.get(name) for name in ("key", "name", "question", "error", "answer", "caption_key")] == [
            found.get(name) for name in ("key", "name", "question", "error", "answer", "caption_key")
        ]
        np.testing.assert_allclose(numbers(found), numbers(expected), atol=TOLERANCE, rtol=0)
    first, second = (json.loads((folder / f"{name}.json").read_text())["tasks"][task] for name in ("tp1", layout))
    assert first["counts"] == second["counts"]
    for metric, value in first["metrics"].items():
        assert second["metrics"][metric] == pytest.approx(value, abs=TOLERANCE), metric


def test_captions_are_as_likely_as_transformers_finds_them(folder: Path, oracle: Oracle) -> None:
    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    found = records(folder / "tp1.json", "preference")
    assert [record["key"] for record in found] == [key for key in range(NUM_SAMPLES) if key != 2]
    spread = []
    for record in found:
        sample = samples[record["key"]]
        if record["key"] == BROKEN:
            assert sample["image"] in record["error"]
            continue
        own = sample["conversations"][1]["value"] == sample["text"]
        question = sample["conversations"][0]["value"].replace("<image>", "").strip() if own else CAPTION_QUESTION
        wrong = sample["Hallucination caption"]
        texts = [sample["text"], *([wrong] if isinstance(wrong, str) else wrong)]
        answers = [record["caption"], *record["hallucinated"]]
        for text, answer in zip(texts, answers, strict=True):
            expected = oracle.log_likelihood(sample["image"], question, text)
            assert answer["num_tokens"] == len(expected)
            assert answer["log_likelihood"] == pytest.approx(float(expected.sum()), abs=TOLERANCE)
        spread.append(answers[0]["log_likelihood"])
    assert np.std(spread) > 1  # not one number for all


def test_the_page_shows_what_is_believed(folder: Path, oracle: Oracle) -> None:
    """Catches margins of another sample or twin than they stand by, with the sign turned, or other than evaluate.py
    measures. The twin that is the caption, token for token, has none, nor has the rejected answer that was chosen."""
    page = (folder / "page.html").read_text()
    rows = json.loads(re.search(r'id="index">(.*?)</script>', page)[1])["samples"]
    likely = {record["key"]: record for record in records(folder / "tp1.json", "preference")}
    near = {record["key"]: record for record in records(folder / "tp1.json", "retrieval")}
    assert len(rows) == NUM_SAMPLES + 1
    for key, row in enumerate(rows[:-1]):
        if key in (2, BROKEN):
            assert row["margins"] == {}
            continue
        caption, *others = [
            (one["log_likelihood"], one["log_likelihood"] / one["num_tokens"])
            for one in (likely[key]["caption"], *likely[key]["hallucinated"])
        ]
        image, own, *twins = [
            from_text(text)
            for text in (
                near[key]["image_embedding"], near[key]["caption_embedding"], *near[key]["hallucinated_embeddings"]
            )
        ]  # fmt: skip
        expected = {
            "sum": min(caption[0] - other[0] for other in others),
            "per token": min(caption[1] - other[1] for other in others),
            "cosine": min(float(image @ own - image @ twin) for twin in twins),
        }
        assert row["margins"] == pytest.approx(expected, abs=TOLERANCE), key
    image = json.loads((folder / "data" / "contrastive.json").read_text())[0]["image"]
    chosen, rejected = (oracle.log_likelihood(image, QUESTION, text) for text in (CHOSEN, REJECTED))
    expected = {"sum": chosen.sum() - rejected.sum(), "per token": chosen.mean() - rejected.mean()}
    assert rows[-1]["margins"] == pytest.approx({name: float(value) for name, value in expected.items()}, abs=TOLERANCE)
    chunks = [zlib.decompress(base64.b64decode(text)).decode() for text in re.findall(r'id="s\d+">(.*?)<', page)]
    for row, chunk in zip(rows, chunks, strict=True):
        assert ("believed, by" in chunk) == any(margin <= 0 for margin in row["margins"].values())
    assert "Not scored" not in chunks[BROKEN] and "Unusable" in chunks[BROKEN] and "caption ahead by" not in chunks[2]
    assert f"log-likelihood {likely[0]['caption']['log_likelihood']:.2f} " in chunks[0]
    result = json.loads((folder / "tp1.json").read_text())["tasks"]["retrieval"]["metrics"]
    assert f"retrieval hallucination margin <b>{result['hallucination margin']:.3f}</b>" in page


@needs_browser
def test_what_is_believed_is_found_in_the_page(folder: Path) -> None:
    """Catches a filter that turns the sign, samples without a score that count as believed, and another order."""
    page = (folder / "page.html").read_text()
    rows = json.loads(re.search(r'id="index">(.*?)</script>', page)[1])["samples"]
    margins = [row["margins"] for row in rows]
    shown = "[...document.querySelectorAll('.where')].map(line => Number(line.textContent.split(' ')[1]) - 1)"
    with Browser() as browser:
        for measure in ("sum", "per token", "cosine"):
            believed = sorted(
                (own[measure], at) for at, own in enumerate(margins) if measure in own and own[measure] <= 0
            )
            scored = sorted((own.get(measure, np.inf), at) for at, own in enumerate(margins))
            for choice, expected in (("&believed=" + measure, believed), ("", scored)):
                browser.open(folder / "page.html", f"sort={measure}{choice}".replace(" ", "+"))
                browser.wait("drawn && drawn === drawing")
                assert browser.run(shown) == [at for _, at in expected], (measure, choice)
            assert len(believed) < len(rows) - 2 and (believed or measure != "sum")
        assert not browser.problems


def test_heads_that_nobody_trained_give_no_cosines(folder: Path, tmp_path: Path) -> None:
    """Catches numbers on the page that are those of random heads."""
    assert "drawn at random when it was converted" in why_no_heads(folder / "save")
    assert "has no hacl_heads.safetensors" in why_no_heads(folder / "source")
    assert why_no_heads(folder / "export") is None
    shutil.copytree(folder / "save" / "iter_0000000", tmp_path / "iter_0000000")  # what a run's own start would save
    assert why_no_heads(tmp_path / "iter_0000000") is None


def test_metrics_of_preference(folder: Path) -> None:
    result = json.loads((folder / "tp1.json").read_text())["tasks"]["preference"]
    good = [record for record in records(folder / "tp1.json", "preference") if "error" not in record]
    rows = [[(a["log_likelihood"], a["num_tokens"]) for a in (r["caption"], *r["hallucinated"])] for r in good]
    sums = [[total for total, _ in row] for row in rows]
    means = [[total / number for total, number in row] for row in rows]
    assert result["metrics"]["accuracy sum"] == np.mean([row[0] > max(row[1:]) for row in sums])
    assert result["metrics"]["accuracy per token"] == np.mean([row[0] > max(row[1:]) for row in means])
    assert result["metrics"]["margin sum"] == pytest.approx(np.mean([row[0] - u for row in sums for u in row[1:]]))
    assert result["metrics"]["margin per token"] == pytest.approx(
        np.mean([row[0] - u for row in means for u in row[1:]])
    )
    assert result["counts"] == {
        "samples": NUM_SAMPLES - 2, "hallucinated captions": sum(map(len, rows)) - len(rows), "unusable items": 1,
    }  # fmt: skip
    assert result["details"]["unusable_items"][0]["key"] == BROKEN


def test_yes_and_no_are_as_likely_as_transformers_finds_them(folder: Path, oracle: Oracle) -> None:
    questions = [json.loads(line) for line in (folder / "questions.json").read_text().splitlines()]
    result = json.loads((folder / "tp1.json").read_text())["tasks"]["yesno"]
    said = []
    for record, question in zip(records(folder / "tp1.json", "yesno"), questions, strict=True):
        if "error" in record:
            assert question["image"] == questions[BROKEN]["image"]
            said.append("yes")  # as POPE reads an empty answer
            continue
        yes, no = (
            float(oracle.log_likelihood(question["image"], question["text"] + SHORT_ANSWER, answer).sum())
            for answer in ("Yes", "No")
        )
        assert (record["log_likelihood_yes"], record["log_likelihood_no"]) == pytest.approx((yes, no), abs=TOLERANCE)
        said.append("yes" if yes > no else "no")
        assert record["answer"].lower() == said[-1]
    right = [one == question["label"] for one, question in zip(said, questions, strict=True)]
    assert result["metrics"]["accuracy"] == np.mean(right)
    assert result["metrics"]["yes ratio"] == np.mean([one == "yes" for one in said])


def test_embeddings_are_those_of_transformers(folder: Path, oracle: Oracle) -> None:
    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    found = records(folder / "tp1.json", "retrieval")
    assert len(found) == NUM_SAMPLES
    for record in found:
        if record["key"] == BROKEN:
            assert "error" in record
            continue
        sample = samples[record["key"]]
        wrong = sample["Hallucination caption"]
        texts = [sample["text"], *([wrong] if isinstance(wrong, str) else wrong)]
        expected = [oracle.embedding(oracle.image_state(sample["image"]), "vision_projector")]
        expected += [oracle.embedding(oracle.text_state(text), "text_projector") for text in texts]
        np.testing.assert_allclose(numbers(record), torch.cat(expected).numpy(), atol=TOLERANCE, rtol=0)


def test_plain_template_and_export_for_load(folder: Path, oracle: Oracle) -> None:
    """An export can be evaluated as it is; the plain template leaves the question out."""
    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    found = records(folder / "plain.json", "preference")
    assert [record["key"] for record in found] == [0, 1, 3]
    for record in found:
        sample = samples[record["key"]]
        expected = oracle.log_likelihood(sample["image"], "", sample["text"], PLAIN)
        assert record["caption"]["num_tokens"] == len(expected)
        assert record["caption"]["log_likelihood"] == pytest.approx(float(expected.sum()), abs=TOLERANCE)
    # yes and no are v1 whatever the run's template is, and the export's weights are the checkpoint's
    for one, other in zip(records(folder / "plain.json", "yesno"), records(folder / "tp1.json", "yesno"), strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), atol=TOLERANCE, rtol=0)


def test_a_killed_evaluation_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    """Killed for real; what it left is kept as it is, for a marked record is still there in the end."""
    for name in ("data", "questions.json"):
        (tmp_path / name).symlink_to(folder / name)
    arguments = command(tmp_path, folder / "save", "tp1", "--batch-size", "1", name="killed")
    journal = tmp_path / "killed.preference.jsonl"
    process = context.Process(target=run_tool, args=("evaluate", *arguments))
    process.start()
    deadline = time.monotonic() + 300
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 2:
        assert process.is_alive() and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    lines = journal.read_text().splitlines()
    assert 2 <= len(lines) < NUM_SAMPLES - 1 and not (tmp_path / "killed.json").exists()
    marked = json.loads(lines[0])
    marked["caption"]["log_likelihood"] = -1234.5
    journal.write_text("\n".join([json.dumps(marked), *lines[1:], '{"key": 9, "cut']))
    (tmp_path / "other.json").write_text((folder / "data" / "contrastive.json").read_text() + "\n")
    other = [str(tmp_path / "other.json") if part.endswith("contrastive.json") else part for part in arguments]
    run_distributed(go_on, 1, arguments, other, [*arguments, "--pool-size", "1"])
    whole = records(folder / "tp1.json", "preference")
    found = records(tmp_path / "killed.json", "preference")
    assert [record["key"] for record in found] == [record["key"] for record in whole]
    assert found[0]["caption"]["log_likelihood"] == -1234.5
    for one, other in zip(found[1:], whole[1:], strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), atol=TOLERANCE)
    assert (tmp_path / "killed.json").is_file()


def go_on(arguments: list[str], *refused: list[str]) -> None:
    """Finish an evaluation, and see that the `refused` ones (other data for the same records) are not begun."""
    assert run_tool("evaluate", *arguments) == 0
    for other in refused:
        assert run_tool("evaluate", *other) == 2
        parallel_state.destroy_model_parallel()


def evaluate_nan(arguments: list[str]) -> str:
    """What the tool says of a checkpoint that was damaged after it was loaded, as one that diverged would be."""
    import contextlib
    import io
    from unittest import mock

    from hacl_megatron.evaluation.likelihood import run

    def load_broken(*loaded):
        module = load_model(*loaded)
        with torch.no_grad():
            module.language_model.output_layer.weight[3, 3] = float("nan")
        return module

    load_model = run.load_model
    with mock.patch.object(run, "load_model", load_broken), contextlib.redirect_stderr(io.StringIO()) as written:
        assert run_tool("evaluate", *arguments) == 2
    return written.getvalue()


def test_a_model_of_nan_is_refused_and_not_scored(folder: Path) -> None:
    """Its comparisons all come out false: an accuracy of 0.0, and a status of 0."""
    (written,) = run_distributed(evaluate_nan, 1, command(folder, folder / "save", "tp1", name="nan"))
    assert [line for line in written.splitlines() if "error: " in line and "not finite" in line], written
    assert not (folder / "nan.json").exists()


@pytest.mark.parametrize(("flag", "table"), [("--tasks", {**TABLE, **BENCHMARKS}), ("--task", BENCHMARKS)])
def test_the_tool_offers_every_task_there_is(flag: str, table: dict, capfd) -> None:
    """Its choices are written down apart, for `--help` to be fast: a task that one of the two lists lacks is caught."""
    assert run_tool("evaluate", "--output", "o.json", flag, "nonsense") == 2
    offered = capfd.readouterr().err.partition("choose from ")[2]
    assert re.findall(r"\w+", offered) == list(table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tasks"], "needs --tasks"),
        (["--tasks", "preference", "--data-path"], "needs --data-path"),
        (["--load", "nowhere"], "found no checkpoint"),
        (["--tensor-model-parallel-size", "3"], "cannot be divided"),
        (["--dtype", "float16"], "float16"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--task", "pope"], "leave --task"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capfd, change: list[str], words: str) -> None:
    if change == ["--tasks"]:
        arguments = ["--load", str(folder / "save"), "--output", str(tmp_path / "o.json")]
    elif change[-1] == "--data-path":
        arguments = ["--load", str(folder / "save"), "--output", str(tmp_path / "o.json"), "--tasks", "preference",
                     "--image-folder", str(tmp_path)]  # fmt: skip
    else:
        arguments = [*command(folder, folder / "save", "tp1", name="mistake"), *change]
    assert run_tool("evaluate", *arguments) == 2
    assert words in capfd.readouterr().err
