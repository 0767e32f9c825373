"""A run's length and its schedules across a resume: at another batch size, with another length, after its end.

Public reports: transformers#22580, open_clip#413: epochs that end early or late after a resume at another batch size.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hacl_megatron.config.flags import TrainingFlags
from hacl_megatron.config.layout import iterations_of_epochs
from hacl_megatron.train import run
from hacl_megatron.training.optimizer.schedule import RunLength
from tests.training.runs import assert_same_state, common_state, latest_checkpoint, make_inputs, metrics, refused, train

EPOCHS = 4
# 16 samples: 8 iterations at batch 8, of which 3 are warm-up; lambda rises over the first 7.
WARM = ["--lr-warmup-fraction", "0.4", "--contrastive-warmup-fraction", "0.9"]


def command(folder: Path, save: str, *extra: str, batch: int | None = 8, length: Sequence[str] = ()) -> list[str]:
    length = length or ("--num-train-epochs", str(EPOCHS))
    sizes = [] if batch is None else ["--global-batch-size", str(batch), "--micro-batch-size", str(batch)]
    save = str(folder / save)
    return ["--config", str(folder / "pretrain.yaml"), "--save", save, "--load", save, *sizes, *length, *WARM, *extra]


def run_heard(arguments: Sequence[str], heard: Path) -> None:
    """Train, with what rank 0 tells the terminal in a file."""
    with (
        (heard if torch.distributed.get_rank() == 0 else Path(os.devnull)).open("w") as file,
        contextlib.redirect_stdout(file),
    ):
        run(arguments)


def goes_on(folder: Path, name: str, source: str, *extra: str, **how) -> list:
    """Commands that copy a run and resume the copy; what it said is in `NAME.txt`."""
    resumed = command(folder, name, *extra, **how)
    return [
        partial(shutil.copytree, folder / source, folder / name),
        partial(run_heard, resumed, folder / f"{name}.txt"),
    ]


def as_written_before(save: Path) -> None:
    """Make a checkpoint one of a version that counted the schedule in iterations alone."""
    checkpoint = latest_checkpoint(save)
    common, sizes = checkpoint / "common.pt", checkpoint / "files.json"
    state = torch.load(common, weights_only=False)
    del state["progress"]["samples_a_step"]
    torch.save(state, common)
    files = json.loads(sizes.read_text())["files"]  # it had no checksums either
    assert "common.pt" in files
    sizes.write_text(json.dumps({"files": files | {"common.pt": common.stat().st_size}}))


def without_batch(folder: Path) -> Path:
    """The same inputs, with the batch that comes of the processes."""
    flags = yaml.safe_load((folder / "pretrain.yaml").read_text())
    del flags["global-batch-size"]
    (folder / "default").mkdir()
    (folder / "default" / "pretrain.yaml").write_text(yaml.safe_dump({**flags, "micro-batch-size": 8}))
    return folder / "default"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("epochs"), samples=16)
    default = without_batch(folder)
    iterations = ["--train-iters", "8"]
    elsewhere = str(folder / "llava-again")
    one = [
        command(folder, "whole"),
        command(folder, "half", "--exit-interval", "4"),
        *goes_on(folder, "at-8", "half"),
        *goes_on(folder, "at-16", "half", batch=16),
        *goes_on(folder, "at-4", "half", batch=4),
        # Twice interrupted: at 16 after one iteration, then back at 8.
        *goes_on(folder, "at-16-and-8", "half", "--exit-interval", "5", batch=16),
        partial(run_heard, command(folder, "at-16-and-8"), folder / "at-16-and-8.txt"),
        partial(shutil.copytree, folder / "half", folder / "old"),
        partial(as_written_before, folder / "old"),
        *goes_on(folder, "old-at-16", "old", batch=16),
        *goes_on(folder, "old-at-8", "old"),
        *goes_on(folder, "again", "whole"),
        *goes_on(folder, "one-epoch", "whole", length=("--num-train-epochs", "1")),
        *goes_on(folder, "more-epochs", "half", length=("--num-train-epochs", "8")),
        *goes_on(folder, "other-flags", "half", "--lr", "2e-3", "--pretrained-checkpoint", elsewhere, batch=16),
        refused(command(folder, "half", "--seed", "5"), "seed 1234", "this run has 5", "--seed"),
        command(folder, "half-of-iterations", "--exit-interval", "4", length=iterations),
        *goes_on(folder, "iterations-at-16", "half-of-iterations", batch=16, length=iterations),
        *goes_on(folder, "fewer-iterations", "half-of-iterations", length=("--train-iters", "3")),
        command(default, "default", "--exit-interval", "4", batch=None),
    ]
    train(one, 1)
    train([partial(run_heard, command(default, "default", batch=None), folder / "default.txt")], 2)
    return folder


def drawn(save: Path) -> int:
    return common_state(save)["data_state"]["consumed_samples"]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("at-8", 8), ("at-16", 6), ("at-4", 12), ("at-16-and-8", 7), ("old-at-8", 8), ("old-at-16", 6),
        ("default/default", 6),
    ],
)  # fmt: skip
def test_all_epochs_are_drawn_and_no_more_whatever_the_batch_after_a_resume(runs: Path, name: str, last: int) -> None:
    assert [row["iteration"] for row in metrics(runs / name)] == list(range(1, last + 1))
    assert drawn(runs / name) == EPOCHS * 16
    assert (
        json.loads((runs / name / "run_status.json").read_text()).items()
        >= {"iteration": last, "train_iters": last}.items()
    )


def test_a_whole_run_has_the_rates_of_a_schedule_in_iterations_to_the_last_bit(runs: Path) -> None:
    optimizer = SimpleNamespace(param_groups=[])
    flags = {"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 0.0, "lr_warmup_steps": 3, "lr_decay_steps": 8}
    decay = {"start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 8, "wd_incr_style": "constant"}
    expected = []
    schedule = OptimizerParamScheduler(optimizer, lr_decay_style="cosine", **flags, **decay)
    for _ in range(8):
        expected.append(schedule.get_lr({}))
        schedule.step(1)
    assert [row["learning-rate"] for row in metrics(runs / "whole")] == expected
    assert_same_state(runs / "whole", runs / "at-8")
    assert [row["learning-rate"] for row in metrics(runs / "old-at-8")] == expected


@pytest.mark.parametrize(
    ("name", "steps_before"),
    [
        ("at-16", [4, 6]), ("old-at-16", [4, 6]), ("at-4", [4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]),
        ("at-16-and-8", [4, 6, 7]), ("default/default", [4, 6]),
    ],
)  # fmt: skip
def test_the_schedules_go_on_where_they_were_at_another_batch(runs: Path, name: str, steps_before: list[float]) -> None:
    rows = metrics(runs / name)[4:]
    rates = [1e-3 * (1 + math.cos(math.pi * (step - 3) / 5)) / 2 for step in steps_before]
    assert [row["learning-rate"] for row in rows] == pytest.approx(rates, rel=1e-9)
    made = [(after - before) for before, after in zip(steps_before, [*steps_before[1:], 8], strict=True)]
    weights = [10 ** min(0.0, 4 * ((at + step) / 7 - 1)) for at, step in zip(steps_before, made, strict=True)]
    assert [row["contrastive weight"] for row in rows] == pytest.approx(weights, rel=1e-9)
    whole = {row["iteration"] - 1: row["learning-rate"] for row in metrics(runs / "whole")}
    for step, row in zip(steps_before, rows, strict=True):
        assert step not in whole or row["learning-rate"] == whole[step]


def test_a_run_of_iterations_keeps_its_rates_at_another_batch(runs: Path) -> None:
    rates = [row["learning-rate"] for row in metrics(runs / "iterations-at-16")]
    assert rates == [row["learning-rate"] for row in metrics(runs / "whole")]
    assert drawn(runs / "iterations-at-16") == 4 * 8 + 4 * 16


def heard(runs: Path, name: str) -> str:
    return (runs / f"{name}.txt").read_text()


def test_a_run_that_goes_on_as_it_was_says_nothing_of_changes(runs: Path) -> None:
    for name in ("at-8", "old-at-8"):
        assert "resumed iteration 4" in heard(runs, name)
        for word in ("not as in", "not read", "learning rate:", "nothing is left"):
            assert word not in heard(runs, name), name


@pytest.mark.parametrize(("name", "batch"), [("at-16", 16), ("at-4", 4), ("old-at-16", 16), ("default", 16)])
def test_another_batch_is_said_and_the_rate_that_stays_is_not(runs: Path, name: str, batch: int) -> None:
    lines = heard(runs, name).splitlines()
    assert f"not as in the run that is resumed: --global-batch-size {batch} (was 8)" in lines
    assert not any("learning rate:" in line for line in lines)


def test_other_rates_and_weights_that_are_not_read_are_named(runs: Path) -> None:
    said = heard(runs, "other-flags")
    assert "not as in the run that is resumed: --global-batch-size 16 (was 8), --lr 0.002 (was 0.001)\n" in said
    changes = json.loads((runs / "other-flags" / "run_status.json").read_text())["changes"]
    assert len(changes) == 2 and all(f"{line}\n" in said for line in changes)
    assert f"not read: --pretrained-checkpoint {runs / 'llava-again'} (was {runs / 'llava'})" in said
    assert "learning rate: the saved run's schedule stood at 0.000905, this run's stands at 0.00181" in said


def test_more_epochs_say_how_the_rate_jumps(runs: Path) -> None:
    said = heard(runs, "more-epochs")
    assert "--num-train-epochs 8.0 (was 4.0)" in said
    # Step 4 of 8 with 3 of warm-up, then step 4 of 16 with 6.
    assert "learning rate: the saved run's schedule stood at 0.000905, this run's stands at 0.000667" in said
    rows = metrics(runs / "more-epochs")
    assert len(rows) == 16 and rows[4]["learning-rate"] == pytest.approx(1e-3 * 4 / 6)


@pytest.mark.parametrize(
    ("name", "done", "asked"),
    [
        ("again", 8, "--num-train-epochs 4 of 16 samples"),
        ("one-epoch", 8, "--num-train-epochs 1 of 16 samples"),
        ("fewer-iterations", 4, "--train-iters 3"),
    ],
)
def test_a_run_that_is_over_says_so_when_it_is_started_again(runs: Path, name: str, done: int, asked: str) -> None:
    said = heard(runs, name)
    assert f"nothing is left to train or to save: {done} iterations have drawn {8 * done} samples, and {asked}" in said
    assert f"an epoch, {done} iterations" in said
    status = json.loads((runs / name / "run_status.json").read_text())
    assert (status["state"], status["iteration"], status["train_iters"]) == ("finished", done, done)
    assert len(metrics(runs / name)) == done


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "done", "samples_drawn", "last"),
    [
        (4, 16, 8, 0, 0, 8), (4, 16, 16, 4, 32, 6), (4, 16, 4, 4, 32, 12), (1, 16, 8, 8, 64, 8),
        (3, 20, 8, 0, 0, 8), (3, 20, 8, 7, 56, 8), (3, 20, 8, 8, 64, 8), (3, 20, 16, 7, 56, 8), (0.5, 20, 8, 0, 0, 2),
        (1.1, 10, 1, 0, 0, 11), (1.1, 10, 1, 11, 11, 11),
    ],
)  # fmt: skip
def test_iterations_are_those_done_and_what_is_left_of_the_epochs(
    epochs, samples, batch, done, samples_drawn, last
) -> None:
    assert iterations_of_epochs(epochs, samples, batch, done=done, drawn=samples_drawn) == last


def test_a_constant_batch_counts_whole_steps_wherever_a_run_is_cut() -> None:
    """Whatever the batch: in samples, 3e-4 * 7 * k / (7 * w) would not round as 3e-4 * k / w does."""
    flags = TrainingFlags(num_train_epochs=3.0)
    whole = RunLength.of(flags, num_samples=20, batch=7)
    assert (whole.steps, whole.increment, whole.samples_a_step) == (9, 1, 7)
    for done in range(10):
        for saved in (7, None):
            cut = RunLength.of(flags, num_samples=20, batch=7, iteration=done, drawn=7 * done, samples_a_step=saved)
            numbers = (cut.steps, cut.increment, cut.position, cut.rate_scale)
            assert numbers == (9, 1, done, 1) and all(type(number) is int for number in numbers)
