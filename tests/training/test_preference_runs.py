"""Runs with a likelihood objective: what they report, that it acts, what becomes of twins that cannot be compared."""

import json
from functools import partial
from pathlib import Path

import pytest
from megatron.core import parallel_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from hacl_megatron.train import run
from hacl_megatron.training.reporting.status import TrainingStopped
from tests.tiny_data import swap_twins
from tests.training.runs import common_state, layout_flags, make_inputs, metrics, train

PHRASE = ["--preference-loss", "phrase", "--contrastive-weight", "0"]


def stops(arguments: list[str], steps: int = 1) -> None:
    with pytest.raises(TrainingStopped, match=f"--preference-loss phrase found no twin to compare in {steps} steps"):
        run(arguments)
    parallel_state.destroy_model_parallel()  # a run that ends so leaves its groups to the process's end


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("twins"), samples=8)
    swap_twins(folder / "data")
    records = json.loads((folder / "data" / "pretrain.json").read_text())
    for record in records:
        record.pop("Hallucination caption", None)
    (folder / "data" / "without.json").write_text(json.dumps(records))
    records[0] |= {"text": "Something else.", "Hallucination caption": ["Nothing at all."]}
    records[1] |= {"Hallucination caption": "A dog on the moon."}
    (folder / "data" / "few.json").write_text(json.dumps(records))

    def command(name: str, *more: str) -> list[str]:
        flags = [*layout_flags("dp2")[1], *PHRASE, "--save", str(folder / name), *more]
        return ["--config", str(folder / "pretrain.yaml"), *flags]

    valid = ["--valid-data-path", str(folder / "data" / "pretrain.json"), "--eval-interval", "15", "--eval-iters", "1"]
    few, without = (["--data-path", str(folder / "data" / f"{name}.json")] for name in ("few", "without"))
    small = ["--train-iters", "2", "--global-batch-size", "2", "--micro-batch-size", "1"]
    train(
        [
            command("learns", "--train-iters", "15", "--freeze-LM", "false", *valid),
            command("few", "--train-iters", "2", *few),
            partial(stops, command("without", "--train-iters", "2", *without)),
            command("short", *small, *without, "--exit-interval", "1"),
            partial(stops, command("short", *small, *without, "--load", str(folder / "short")), 2),
            command("alone", "--train-iters", "1", "--generation-weight", "0", *few),
        ],
        2,
    )
    return folder


def test_true_answers_become_likelier_than_their_twins(runs: Path) -> None:
    rows = metrics(runs / "learns")
    assert rows[-1]["preference loss"] < 0.8 * rows[0]["preference loss"]
    assert rows[-1]["preference margin"] > rows[0]["preference margin"]
    assert all(0 <= row["preference accuracy"] <= 1 for row in rows)
    assert rows[-1]["preference loss validation"] < rows[0]["preference loss"]
    assert "preference margin validation" in rows[-1] and "contrastive loss" not in rows[-1]
    accumulator = EventAccumulator(str(runs / "learns" / "tensorboard"), size_guidance={"tensors": 0})
    (layout,) = accumulator.Reload().Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    assert [category.title for category in page.category] == ["Losses", "Likelihood of twins", "Optimiser", "Speed"]
    charts = [chart for category in page.category[:2] for chart in category.chart]
    tags = {pattern.strip("^$").replace("\\", "") for chart in charts for pattern in chart.multiline.tag}
    assert tags <= {*rows[-1]}, "each of its charts finds its tags"


def test_a_twin_of_no_answer_is_counted_and_listed_and_the_rest_of_its_sample_trains(runs: Path) -> None:
    assert [row["uncompared-twins"] for row in metrics(runs / "few")] == [1, 2]
    assert common_state(runs / "few")["progress"]["uncompared_twins"] == 2
    lines = [json.loads(line) for line in (runs / "few" / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["class"] for line in lines] == ["has a twin that is not compared"] * 2
    assert {line["name"] for line in lines} == {"pretrain-0"} and "no answer of the dialogue" in lines[0]["reason"]
    assert all(row["bad-samples"] == row["untrained-samples"] == 0 for row in metrics(runs / "few"))


def test_a_run_without_twins_ends_with_a_word(runs: Path) -> None:
    """`stops` holds the message; what was trained is saved."""
    assert common_state(runs / "without")["progress"]["iteration"] == 1


def test_a_run_without_twins_that_is_shorter_than_an_epoch_ends_with_a_word_too(runs: Path) -> None:
    """It said "finished". Its steps are counted over a resume, which once forgot that twins had been found, too."""
    progress = common_state(runs / "short")["progress"]
    assert progress["iteration"] == 2 and progress["twinless_steps"] == 0
    assert common_state(runs / "learns")["progress"]["twinless_steps"] is None


def test_samples_without_twins_train_nothing_where_twins_alone_do(runs: Path) -> None:
    """With --generation-weight 0 their targets weigh nothing; they were counted as if they trained."""
    (row,) = metrics(runs / "alone")
    assert row["untrained-samples"] == 7 and row["grad-norm"] > 0
    lines = [json.loads(line) for line in (runs / "alone" / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["reason"] for line in lines if line["class"] == "trains nothing"}
    assert reasons == {"it has no pair or twin that trains, and --generation-weight is 0"}
