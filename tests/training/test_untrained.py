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

from hacl_megatron.train import run
from hacl_megatron.training.reporting.status import TrainingStopped
from tests.training.runs import common_state, layout_flags, make_inputs, metrics, train

QUESTION = {"from": "human", "value": "and what else?"}


def stops(arguments: list[str]) -> None:
    """On every rank alike, so that one line is said."""
    with pytest.raises(TrainingStopped, match=r"no sample of 1 steps had a target token or a pair.*bad_samples.jsonl"):
        run(arguments)


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
    half = json.loads(json.dumps(records))
    for record in half[:2]:
        record["conversations"] = [*record["conversations"], QUESTION]
    half[2]["conversations"] = [*half[2]["conversations"][:-1], {"from": "gpt", "value": ""}]
    for record in records:
        record["conversations"] = [*record["conversations"], QUESTION]
    settings = yaml.safe_load((folder / "finetune.yaml").read_text())
    settings = {key: value for key, value in settings.items() if not key.startswith("contrastive-data")}
    (folder / "alone.yaml").write_text(yaml.safe_dump(settings))  # pairs would train, and are no matter here
    commands = {}
    for name, some in (("half", half), ("none", records)):
        path = folder / "data" / f"{name}.json"
        path.write_text(json.dumps(some))
        _, flags = layout_flags("dp2", samples=8)
        more = ["--data-path", str(path), "--global-batch-size", "8", "--train-iters", "2"]
        commands[name] = ["--config", str(folder / "alone.yaml"), "--save", str(folder / name), *flags, *more]
    train([partial(says, commands["half"], folder / "said"), partial(stops, commands["none"])], 2)
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


def test_a_run_without_a_target_in_its_first_epoch_ends(runs: Path) -> None:
    """`stops` holds the message; the run is saved, and its log says which step had none."""
    assert common_state(runs / "none")["progress"]["untrained_samples"] == 8
    assert len((runs / "none" / "bad_samples.jsonl").read_text().splitlines()) == 8
