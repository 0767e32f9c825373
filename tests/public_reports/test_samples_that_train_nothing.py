"""Samples that train nothing are counted, named and listed; a run in which nothing has a target ends with a word.

Public reports: trl#6668, LLaVA-NeXT#385, LLaVA#816. Before, such a run said "finished" with 0 bad samples.
"""

import contextlib
import io
import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from megatron.core import parallel_state

from hacl_megatron.train import run
from hacl_megatron.training.reporting.status import TrainingStopped
from tests.training.runs import common_state, layout_flags, make_inputs, metrics, train

QUESTION = {"from": "human", "value": "and what else?"}


def stops(arguments: list[str], steps: int = 1) -> None:
    """On every rank alike, so that one line is said."""
    said = rf"no sample of {steps} steps had a target token or a pair.*bad_samples.jsonl"
    with pytest.raises(TrainingStopped, match=said):
        run(arguments)
    parallel_state.destroy_model_parallel()  # a run that ends so leaves its groups to the process's end


def says(arguments: list[str], to: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run(arguments)
    with to.open("a") as file:
        file.write(shown.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("untrained"), samples=8)
    records = json.loads((folder / "data" / "finetune.json").read_text())
    for record in records:
        record.pop("text", None), record.pop("Hallucination caption", None), record.pop("caption", None)
    half, pairs = json.loads(json.dumps([records, records]))
    images = sorted(path.name for path in (folder / "data" / "images").iterdir() if path.is_file())
    for record, image in zip(pairs, images * 8, strict=False):
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        record.update(image=image, text=f"a red cat in {record['id']}", conversations=[asked])
    for record in half[:2]:
        record["conversations"] = [*record["conversations"], QUESTION]
    half[2]["conversations"] = [*half[2]["conversations"][:-1], {"from": "gpt", "value": ""}]
    for record in records:
        record["conversations"] = [*record["conversations"], QUESTION]
    settings = yaml.safe_load((folder / "finetune.yaml").read_text())
    settings = {key: value for key, value in settings.items() if not key.startswith("contrastive-data")}
    (folder / "alone.yaml").write_text(yaml.safe_dump(settings))  # pairs would train, and are no matter here
    commands = {}
    for name, some in (("half", half), ("none", records), ("pairs", pairs)):
        path = folder / "data" / f"{name}.json"
        path.write_text(json.dumps(some))
        _, flags = layout_flags("dp2", samples=8)
        more = ["--data-path", str(path), "--global-batch-size", "8", "--train-iters", "2"]
        commands[name] = ["--config", str(folder / "alone.yaml"), "--save", str(folder / name), *flags, *more]
    unheard = [*commands["pairs"], "--save", str(folder / "unheard"), "--contrastive-weight", "0"]
    slow = [*commands["none"], "--save", str(folder / "slow"), "--global-batch-size", "2", "--train-iters", "8"]
    slow += ["--micro-batch-size", "1"]
    slow += ["--load", str(folder / "slow"), "--exit-interval", "2"]  # an epoch is 4 steps, no start makes more than 2
    runs = [
        partial(says, commands["half"], folder / "said"),
        partial(stops, commands["none"]),
        partial(run, commands["pairs"]),
        partial(stops, unheard),
        partial(run, slow),
        partial(stops, slow, 4),
    ]
    train(runs, 2)
    return folder


def test_they_are_listed_in_a_class_of_their_own_and_named_once_a_kind(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "half" / "bad_samples.jsonl").read_text().splitlines()]
    untrained = [line for line in lines if line["class"] == "trains nothing"]
    assert len(untrained) == len(lines) == 2 * 3 and {line["sample_id"] for line in lines} == {0, 1, 2}
    assert common_state(runs / "half")["progress"]["untrained_samples"] == 6
    assert common_state(runs / "half")["progress"]["bad_samples"] == 0
    assert [row["untrained-samples"] for row in metrics(runs / "half")] == [3, 6]
    assert all(row["lm loss"] > 0 for row in metrics(runs / "half"))
    said = (runs / "said").read_text()
    assert "it ends with a question, and LLaVA's mismatch rule takes all its labels away" in said
    assert said.count("trains nothing: ") <= 2 * 3 and "samples drawn (" in said
    assert "note: " in said and "2 of 8 records" in said  # at the start, before anything is drawn


def status(save: Path) -> dict:
    return json.loads((save / "run_status.json").read_text())


def test_the_status_counts_them_by_kind(runs: Path) -> None:
    """Also where the run failed for it, which the checkpoint and the terminal alone said."""
    found = status(runs / "half")
    assert (found["state"], found["drawn_samples"], found["bad_samples"], found["untrained_samples"]) == (
        "finished", 16, 0, 6,
    )  # fmt: skip
    kind = "it ends with a question, and LLaVA's mismatch rule takes all its labels away"
    assert found["untrained_kinds"][kind] == 4 and sum(found["untrained_kinds"].values()) == 6
    found = status(runs / "none")
    assert found["state"] == "failed" and "no sample of 1 steps" in found["reason"]
    assert found["untrained_kinds"] == {kind: 8}


def test_pairs_alone_are_a_run_unless_nothing_comes_of_them(runs: Path) -> None:
    """No dialogue has a target: right for contrastive data. With --contrastive-weight 0 no pair trains either, which
    was "finished" with nothing counted."""
    assert status(runs / "pairs")["state"] == "finished" and status(runs / "pairs")["untrained_samples"] == 0
    assert [row["contrastive loss"] > 0 for row in metrics(runs / "pairs")] == [True, True]
    assert status(runs / "unheard")["untrained_samples"] == 8


def test_steps_without_a_target_are_counted_over_a_resume(runs: Path) -> None:
    """A run that is stopped on request before its 100 steps, or its epoch, was never judged. After the stop the count
    begins anew: whoever resumes may have mended the data."""
    state = common_state(runs / "slow")["progress"]
    assert state["iteration"] == 4 and state["targetless_steps"] == 0 and state["untrained_samples"] == 8
    assert sum(status(runs / "slow")["untrained_kinds"].values()) == 8


def test_a_run_without_a_target_in_its_first_epoch_ends(runs: Path) -> None:
    """`stops` holds the message; the run is saved, and its log says which step had none."""
    assert common_state(runs / "none")["progress"]["untrained_samples"] == 8
    assert len((runs / "none" / "bad_samples.jsonl").read_text().splitlines()) == 8
