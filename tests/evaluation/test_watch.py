"""`tools/evaluate.py --watch` beside a tiny run: all of its checkpoints, once each, through kills and deletions."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from hacl_megatron.checkpoint.convert.model_card import ModelCard
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.run.retain import prune
from hacl_megatron.evaluation.answers.amber import DIMENSIONS, score_amber
from hacl_megatron.evaluation.answers.benchmarks import BENCHMARKS
from hacl_megatron.evaluation.answers.chair import Synonyms, score_chair
from hacl_megatron.evaluation.answers.pope import score_pope
from hacl_megatron.evaluation.watch.best import FACTS_FILE, KeepBest
from hacl_megatron.evaluation.watch.curves import Curves, wait_for_the_next_second
from hacl_megatron.platform.folder_lock import FolderLock
from tests.distributed import context
from tests.evaluation.exports import write_pope_questions
from tests.tool_runs import run_tool, to_hf
from tests.training.runs import make_inputs, train

ITERATIONS = [1, 2, 3]
QUICK = ("--max-new-tokens", "4", "--device", "cpu", "--poll-seconds", "0.05", "--wait-for-restart", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`save`, a finished run with a checkpoint an iteration; `questions.json` and `objects.json` on its images."""
    folder = make_inputs(tmp_path_factory.mktemp("watched"), samples=12, layers=2, vision_layers=2)
    flags = ["--config", str(folder / "finetune.yaml"), "--save", str(folder / "save"), "--micro-batch-size", "8"]
    train([[*flags, "--train-iters", "3", "--save-interval", "1", "--lr", "0.02"]], 1)
    names = sorted(path.name for path in (folder / "data" / "images").glob("*.jpg"))
    write_pope_questions(folder / "questions.json", names, 8)
    (folder / "objects.json").write_text(json.dumps({int(name[:4]): ["dog"] for name in names}))
    return folder


@pytest.fixture
def save(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(trained / "save", tmp_path / "save")


def flags_of(trained: Path) -> list[str]:
    return ["--tasks", "pope", "chair", "--questions", str(trained / "questions.json"), "--objects",
            str(trained / "objects.json"), "--images", str(trained / "data" / "images"), *QUICK]  # fmt: skip


def scored(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "evaluation" / "scores.jsonl").read_text().splitlines()]


def drawn(save: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard shows of a run's folder: its runs, their tags, (step, value)."""
    reader = EventMultiplexer().AddRunsFromDirectory(str(save / "tensorboard"))
    reader.Reload()
    return {
        run: {tag: [(event.step, event.value) for event in reader.Scalars(run, tag)] for tag in found["scalars"]}
        for run, found in reader.Runs().items()
    }


def test_every_checkpoint_is_scored_drawn_at_its_iteration_and_the_best_is_kept(
    trained: Path, save: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint that is left out, scores of another one, curves that hide the trainer's, a scratch left."""
    command = ["evaluate", "--watch", save, *flags_of(trained), "--keep-best", "pope accuracy"]
    assert run_tool(*command) == 0
    records = scored(save)
    assert [record["iteration"] for record in records] == ITERATIONS
    assert not list((save / "evaluation" / "scratch").iterdir())
    assert "the run is finished; 3 checkpoints are scored" in capfd.readouterr().out

    by_hand = {}
    export = to_hf(save / "iter_0000002", tmp_path / "export")
    for task, files in (("pope", ["--questions", "questions.json"]), ("chair", ["--objects", "objects.json"])):
        out = tmp_path / f"{task}.json"
        given = ["--hf", export, "--task", task, files[0], trained / files[1], "--images", trained / "data" / "images"]
        assert run_tool("evaluate", *given, *QUICK[:4], "--output", out) == 0
        by_hand |= {f"{task} {name}": value for name, value in json.loads(out.read_text())["metrics"].items()}
    by_hand = {tag: value for tag, value in by_hand.items() if value is not None}
    assert records[1]["scores"] == by_hand and "pope f1" in by_hand

    shown = drawn(save)
    assert [step for step, _ in shown["."]["lm loss"]] == ITERATIONS
    for tag in by_hand:
        expected = [(record["iteration"], pytest.approx(record["scores"][tag])) for record in records]
        assert shown["evaluation"][tag] == expected, tag

    best = max(records, key=lambda record: record["scores"]["pope accuracy"])  # the first of equal ones
    facts = json.loads((save / "best" / FACTS_FILE).read_text())
    assert {key: facts[key] for key in best} == best and facts["kept for"] == "pope accuracy"
    if best["iteration"] == 2:
        assert (save / "best" / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()

    capfd.readouterr()
    assert run_tool("show_run", save) == 0  # of a real run, with real scores
    glance = capfd.readouterr().out
    assert "finished" in glance.splitlines()[0] and "3 of 3 (100%)" in glance and "note:" not in glance
    assert "scores of the export of iteration 3" in glance and "pope accuracy" in glance

    # The same command again: nothing to do, and no point twice.
    monkeypatch.setattr("hacl_megatron.evaluation.watch.run.export", None)
    assert run_tool(*command) == 0
    assert scored(save) == records and drawn(save) == shown
    monkeypatch.undo()

    # Another score, of which the best is not kept yet; and then other questions.
    assert run_tool(*command[:-1], "chair Recall", "--best-folder", tmp_path / "recall") == 0
    top = max(records, key=lambda record: record["scores"]["chair Recall"])
    assert json.loads((tmp_path / "recall" / FACTS_FILE).read_text())["iteration"] == top["iteration"]
    assert scored(save) == records
    capfd.readouterr()
    assert run_tool(*command, "--prompt-suffix", "?") == 2
    err = capfd.readouterr().err
    assert "scores.jsonl holds scores made with" in err and err.count("\n") == 1


def test_a_killed_watch_goes_on_in_the_middle_of_a_checkpoint(trained: Path, save: Path) -> None:
    """Catches a finished checkpoint that is scored again, answers that are asked again, and half a line in the way."""
    shutil.rmtree(save / "iter_0000003")
    pope = [word for word in flags_of(trained) if word != "chair"]
    flags = [*pope, "--batch-size", "1"]
    process = context.Process(target=run_tool, args=("evaluate", "--watch", save, *flags))
    process.start()
    deadline = time.monotonic() + 300
    while not (begun := list((save / "evaluation").glob("iter_0000002-*/pope.answers.jsonl"))) or (
        begun[0].read_bytes().count(b"\n") < 2
    ):
        assert process.is_alive() and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    journal, answers = save / "evaluation" / "scores.jsonl", begun[0].read_bytes()
    before = journal.read_bytes()
    assert [record["iteration"] for record in scored(save)] == [1]
    first = next((save / "evaluation").glob("iter_0000001-*/pope.answers.jsonl"))
    finished = first.stat().st_mtime_ns
    with journal.open("ab") as file:
        file.write(b'{"iteration": 2, "chec')  # as if the kill had come amid a line

    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second
    assert run_tool("evaluate", "--watch", save, *flags) == 0
    assert journal.read_bytes().startswith(before) and first.stat().st_mtime_ns == finished
    assert begun[0].read_bytes().startswith(answers[: answers.rfind(b"\n") + 1])
    assert [record["iteration"] for record in scored(save)] == [1, 2]
    for tag, points in drawn(save)["evaluation"].items():
        assert [step for step, _ in points] == [1, 2], tag
    assert not list((save / "evaluation" / "scratch").iterdir())


def test_checkpoints_that_go_away_or_are_damaged_cost_a_word(
    trained: Path, save: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a watch that retention kills, and a damaged checkpoint that stops it or is scored."""
    shutil.copytree(save / "iter_0000003", save / "iter_0000004")
    common = save / "iter_0000004" / "common.pt"
    common.write_bytes(common.read_bytes()[:-1])
    read = ShardedReader.read

    def read_while_the_run_deletes(reader: ShardedReader, name: str):
        if (save / "iter_0000001").is_dir():
            prune(save, latest=3, newest=2, every=None)
        return read(reader, name)

    monkeypatch.setattr(ShardedReader, "read", read_while_the_run_deletes)
    assert run_tool("evaluate", "--watch", save, *flags_of(trained)) == 0
    out = capfd.readouterr().out
    assert "iteration 1 is skipped: the run has deleted it while it was read" in out
    assert "iteration 4 is skipped: it is damaged: " in out and "common.pt has" in out
    assert [record["iteration"] for record in scored(save)] == [2, 3]
    assert not list((save / "evaluation" / "scratch").iterdir())


def test_it_waits_for_a_run_that_lives_or_comes_back_and_ends_with_it(
    trained: Path, save: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Catches an end while the run trains or is in the queue, a last checkpoint that is missed, and a watch that never
    ends."""
    status = (save / "run_status.json").read_text()
    for iteration in ITERATIONS[1:]:
        (save / f"iter_{iteration:07d}").rename(tmp_path / f"{iteration}")
    lock = FolderLock(save, what="the run")
    lock.take()
    (save / "run_status.json").unlink()

    def go_on() -> None:
        for iteration in ITERATIONS[1:]:
            while not (save / "evaluation" / "scores.jsonl").is_file() or len(scored(save)) < iteration - 1:
                time.sleep(0.01)
            (save / "run_status.json").write_text('{"state": "stopped"}')
            lock.release()  # preempted
            time.sleep(0.3)
            lock.take()
            (tmp_path / f"{iteration}").rename(save / f"iter_{iteration:07d}")
        (save / "run_status.json").write_text(status)
        lock.release()

    run = threading.Thread(target=go_on, daemon=True)
    run.start()
    assert run_tool("evaluate", "--watch", save, *flags_of(trained), "--wait-for-restart", "60") == 0
    run.join(10)
    out = capfd.readouterr().out
    assert "the run is stopped; waiting 60 s for its next start" in out and "the run is finished; 3 checkpoints" in out
    assert [record["iteration"] for record in scored(save)] == ITERATIONS


def test_an_iteration_that_a_run_comes_to_again_is_scored_again(trained: Path, save: Path) -> None:
    """Catches the scores of weights that are no more."""
    command = ["evaluate", "--watch", save, *flags_of(trained)]
    shutil.move(save / "iter_0000003", save / "iter_0000002.partial")
    assert run_tool(*command) == 0
    shutil.rmtree(save / "iter_0000002")
    (save / "iter_0000002.partial").rename(save / "iter_0000002")
    assert run_tool(*command) == 0
    assert [record["iteration"] for record in scored(save)] == [1, 2, 2]
    assert len({record["checkpoint"] for record in scored(save)}) == 3
    last = scored(save)[-1]["scores"]
    assert {tag: points[-1] for tag, points in drawn(save)["evaluation"].items()} == {
        tag: (2, pytest.approx(value)) for tag, value in last.items()
    }


def test_curves_have_one_point_an_iteration_whatever_came_twice(tmp_path: Path) -> None:
    """Catches zigzags of points from before a kill, and of an iteration that was scored twice."""

    def record(iteration: int, value: float) -> dict:
        return {"iteration": iteration, "written": 1e9 + iteration, "scores": {"pope f1": value}}

    with Curves(tmp_path / "tensorboard" / "evaluation", []) as curves:
        for iteration in (10, 20, 30):
            curves.add(record(iteration, iteration / 100))
        curves.add(record(20, 0.9))
    assert drawn(tmp_path)["evaluation"]["pope f1"] == [
        (10, pytest.approx(0.1)), (20, pytest.approx(0.9)), (30, pytest.approx(0.3)),
    ]  # fmt: skip
    wait_for_the_next_second()
    with Curves(tmp_path / "tensorboard" / "evaluation", [record(10, 0.1), record(20, 0.9)]):
        pass
    assert [step for step, _ in drawn(tmp_path)["evaluation"]["pope f1"]] == [10, 20]


def test_which_way_a_score_is_better_is_known_of_every_task(tmp_path: Path) -> None:
    """Catches a best model that is the one that hallucinates most, and a metric that cannot be chosen."""
    where = tmp_path / "x"
    pope = score_pope([{"text": "?", "label": "yes"}], [{"answer": "Yes"}], where=where)
    chair = score_chair([{"image_id": 1, "caption": "A dog."}], {1: {"dog"}}, synonyms=Synonyms.read(None), where=where)
    kinds = {kind for kinds in DIMENSIONS.values() for kind in kinds}
    annotations = {n: {"type": kind, "truth": "yes"} for n, kind in enumerate(kinds)}
    amber = score_amber(
        annotations, [{"id": n, "response": "Yes"} for n in annotations], words=None, nouns=None, where=where
    )
    described = {"CHAIR", "Cover", "Hal", "Cog"}
    for task, metrics in (("pope", {*pope.metrics} - {"yes ratio"}), ("chair", {*chair.metrics}),
                          ("amber", {*amber.metrics} | described)):  # fmt: skip
        assert {*BENCHMARKS[task].better} == metrics
    ways = {f"{task} {metric}": way for task, kind in BENCHMARKS.items() for metric, way in kind.better.items()}
    assert {score for score, way in ways.items() if way == "lower"} == {
        "chair CHAIRs",
        "chair CHAIRi",
        "amber CHAIR",
        "amber Hal",
        "amber Cog",
    }
    assert KeepBest(score="chair CHAIRi", folder=where).is_better({"chair CHAIRi": 0.1}, [{"chair CHAIRi": 0.2}, {}])
    best = KeepBest(score="pope f1", folder=where)
    assert not best.is_better({"pope f1": 0.2}, [{"pope f1": 0.2}]) and not best.is_better({}, [])


def test_a_readme_of_ones_own_stays_beside_the_next_best_export(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches one that goes with the export that it described, and a link through which it gets into the new export."""
    export, best = tmp_path / "export", KeepBest(score="pope f1", folder=tmp_path / "best")
    export.mkdir()
    for name in ("config.json", "hacl_heads.safetensors"):
        (export / name).write_text("{}")
    ModelCard(text="# Ours\n").write(export, tmp_path / "none")
    ours = (export / "README.md").read_text()
    best.keep(export, {"iteration": 1})
    (export / "README.md").unlink()  # another export
    ModelCard(text="# Ours, later\n").write(export, tmp_path / "none")
    best.keep(export, {"iteration": 2})
    later = (export / "README.md").read_text()
    assert (best.folder / "README.md").read_text() == later != ours and not capsys.readouterr().out
    (best.folder / "README.md").unlink()
    (best.folder / "README.md").write_text("# Mine")
    best.keep(export, {"iteration": 3})
    assert (best.folder / "README.md").read_text() == "# Mine" and (export / "README.md").read_text() == later
    assert "README.md is your own and stays as it is" in capsys.readouterr().out
    assert json.loads((best.folder / FACTS_FILE).read_text())["iteration"] == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--watch", "SAVE", "--tasks", "retrieval"], "of pope, chair, amber, mmhal, found retrieval"),
        (["--watch", "SAVE", "--tasks", "pope", "--images", "DATA"], "--task pope needs --questions"),
        (["--watch", "gone", *"ABC"], "no such folder"),
        (["--watch", "SAVE", *"ABC", "--keep-best", "pope F1"], "no such score; did you mean pope f1"),
        (["--watch", "SAVE", *"ABC", "--keep-best", "pope f1", "--best-folder", "DATA"], "is no earlier export"),
        (["--watch", "SAVE", *"ABC", "--batch-size", "0"], "--batch-size 0, expected at least 1"),
        (["--watch", "SAVE", *"ABC", "--images", "SAVE"], "none of the 8 images of pope is there"),
        (["--watch", "SAVE", *"ABC", "--hf", "x"], "--watch and --hf do not go together"),
        (["--watch", "SAVE", "--tasks", "pope", "amber", "--questions", "a"], "for which of pope, amber? write"),
        (["--watch", "SAVE", "--tasks", "pope", "--questions", "a", "pope=b"], "--questions names two for pope"),
        (["--task", "pope", "--questions", "a", "b", "--output", "r.json"], "--questions takes one value here"),
        (["--load", "SAVE", "--tasks", "pope", "--image-folder", ".", "--output", "r.json"], "needs answers in words"),
        (["--task", "pope", "--keep-best", "pope f1"], "--keep-best goes with --watch SAVE"),
        (["--task", "pope"], "give --output"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_a_checkpoint_is_read(
    trained: Path, flags: list[str], says: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hacl_megatron.evaluation.watch.run.export", None)
    monkeypatch.chdir(trained)
    words = {"SAVE": ["save"], "DATA": ["data"], "A": ["--tasks", "pope"], "B": ["--questions", "questions.json"],
             "C": ["--images", "data/images"]}  # fmt: skip
    assert run_tool("evaluate", *(word for flag in flags for word in words.get(flag, [flag]))) == 2
    err = capfd.readouterr().err
    assert says in err and err.count("\n") == 1, err
    assert not (trained / "save" / "evaluation").exists()
