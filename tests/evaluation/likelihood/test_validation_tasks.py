"""`--eval-tasks`: at each validation, on its samples; equal to the trainer's own numbers and to tools/evaluate.py."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import run_distributed
from tests.tool_runs import run_tool
from tests.training.runs import layout_flags, make_inputs, metrics, refused, train, weights

LAYOUTS = ("tp2-sp", "pp2-dist", "dp2-dist")
SAMPLES = 16
"""Two validation batches of 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("tasks"), samples=20)
    commands = []
    for layout in LAYOUTS:
        commands.append(command(folder, layout, "--eval-tasks", "preference", "retrieval"))
    commands.append(command(folder, "tp2-sp", save="without"))
    train(commands, 2)
    return folder


def command(folder: Path, layout: str, *extra: str, save: str | None = None) -> list[str]:
    valid = ["--valid-data-path", str(folder / "data" / "contrastive.json")]
    often = ["--eval-interval", "2", "--eval-iters", str(SAMPLES // 8), "--train-iters", "4"]
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather"] if layout == "dp2-dist" else []
    return ["--config", str(folder / "finetune.yaml"), "--save", str(folder / (save or layout)), *valid, *often,
            *layout_flags(layout)[1], *overlap, *extra]  # fmt: skip


def last(save: Path) -> dict[str, float]:
    rows = metrics(save)
    assert "retrieval i2t recall@1 validation" in rows[1] and "retrieval i2t recall@1 validation" not in rows[2]
    return rows[3]


def test_same_at_every_layout_and_as_the_trainer_finds(folder: Path) -> None:
    rows = [last(folder / layout) for layout in LAYOUTS]
    tags = [tag for tag in rows[0] if tag.startswith(("preference ", "retrieval ")) and tag.endswith(" validation")]
    assert len(tags) == 4 + 8 + 1  # preference's, retrieval's, and the trainer's own `retrieval accuracy i2t`
    for row in rows:
        for kind, tolerance in (("margin", 1e-5), ("accuracy", 1e-9)):
            mine, trainers = (row[f"{prefix}hallucination {kind} validation"] for prefix in ("retrieval ", ""))
            assert mine == pytest.approx(trainers, abs=tolerance)
        for tag in tags:
            # trained apart for four steps: what training's own rounding leaves
            assert row[tag] == pytest.approx(rows[0][tag], abs=2e-2 if "margin" in tag else 1 / 8), tag
    assert (
        rows[0]["preference margin sum validation"] != metrics(folder / "tp2-sp")[1]["preference margin sum validation"]
    )


def test_tensorboard_has_them(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tp2-sp" / "tensorboard")).Reload()
    shown = events.Scalars("preference accuracy per token validation")
    assert [event.step for event in shown] == [2, 4]
    assert shown[1].value == pytest.approx(last(folder / "tp2-sp")["preference accuracy per token validation"])


def test_they_change_nothing_in_training(folder: Path) -> None:
    one, other = weights(folder / "tp2-sp"), weights(folder / "without")
    assert all((one[name] == other[name]).all() for name in one)


def evaluate_all(commands: list[list[str]]) -> None:
    for arguments in commands:
        assert run_tool("evaluate", *arguments) == 0


def test_the_checkpoints_evaluate_to_the_same(folder: Path) -> None:
    """At another layout, and in the run's own template."""
    data = ["--data-path", str(folder / "data" / "contrastive.json"), "--image-folder", str(folder / "data" / "images")]
    tasks = ["--tasks", "retrieval", "preference", "--limit", str(SAMPLES), "--device", "cpu"]
    commands = [
        ["--load", str(folder / layout), "--output", str(folder / f"{layout}.json"), *data, *tasks]
        for layout in LAYOUTS
    ]
    run_distributed(evaluate_all, 1, commands)
    for layout in LAYOUTS:
        found, expected = json.loads((folder / f"{layout}.json").read_text())["tasks"], last(folder / layout)
        assert [*found] == ["retrieval", "preference"]
        for task, result in found.items():
            for metric, value in result["metrics"].items():
                assert value == pytest.approx(expected[f"{task} {metric} validation"], abs=1e-4), (layout, task, metric)


def test_mistakes(folder: Path) -> None:
    no_captions = folder / "words.json"
    turns = [{"from": "human", "value": "Is a circle round?"}, {"from": "gpt", "value": "Yes."}]
    no_captions.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    train(
        [
            refused(command(folder, "tp2", "--eval-tasks", "yesno"), "--eval-tasks yesno is unknown"),
            refused(
                command(folder, "tp2", "--eval-tasks", "retrieval", "--eval-interval", "0"), "--eval-interval is 0"
            ),
        ],
        2,
    )
    missing = ["--eval-tasks", "preference", "--valid-data-path", str(no_captions)]
    train([refused(command(folder, "dp1", *missing, save="new"), "words.json", "leave the task out")], 1)
