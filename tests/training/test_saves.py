"""Checkpoints of real runs: written while training goes on, once for what is frozen, readable at every layout."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.run import save as saver
from hacl_megatron.checkpoint.run.whole import make_whole
from hacl_megatron.train import run
from hacl_megatron.training.loop import Trainer
from hacl_megatron.training.reporting.metrics import MetricsLog
from hacl_megatron.training.reporting.status import TrainingStopped
from tests.training.runs import (
    assert_same_state,
    latest_checkpoint,
    layout_flags,
    make_inputs,
    metrics,
    refused,
    tensors,
    train,
)


def command(folder: Path, stage: str, layout: str, save: str | Path, *extra: str) -> list[str]:
    _, flags = layout_flags(layout)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *flags, *extra]


def run_heard(arguments: Sequence[str], heard: Path, patches: Callable[[], list] = list) -> None:
    """Train, with what is said to the user in a file too; a run that stops by itself says why there."""
    say = MetricsLog.say

    def say_and_note(self: MetricsLog, text: str) -> None:
        say(self, text)
        with heard.open("a") as file:
            file.write(text + "\n")

    with mock.patch.object(MetricsLog, "say", say_and_note):
        for patch in (started := patches()):
            patch.start()
        try:
            run(arguments)
        except TrainingStopped as stopped:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            if torch.distributed.get_rank() == 0:
                with heard.open("a") as file:
                    file.write(f"stopped: {stopped}\n")
        finally:
            for patch in started:
                patch.stop()


def slow_disk() -> list:
    """The files of a save are written when the run is steps ahead."""
    write = saver.write_parts

    def write_late(*arguments):
        time.sleep(1.0)
        return write(*arguments)

    return [mock.patch.object(saver, "write_parts", write_late)]


def failing_disk() -> list:
    """The second and third file that rank 1 writes come to nothing: of iteration 1 (after the frozen part), and 2."""
    write, calls = saver.write_parts, 0

    def write_or_fail(folder, parts, rank):
        nonlocal calls
        calls += 1
        if rank == 1 and calls in (2, 3):
            raise OSError(5, "Input/output error")
        return write(folder, parts, rank)

    return [mock.patch.object(saver, "write_parts", write_or_fail)]


def filled_disk(folder: Path) -> list:
    """Something else fills the disk that `folder` is on while iteration 2 is reported, and is gone two steps later.

    Not before iteration 1 is saved: it is written in the background, on a busy machine slowly.
    """
    report, filler = Trainer._report, folder / "filler"
    first_saved = folder / "run" / "latest_checkpointed_iteration.txt"

    def report_and_fill(self: Trainer, *arguments: Any) -> None:
        report(self, *arguments)
        if torch.distributed.get_rank() != 0:
            return
        if self.progress.iteration == 2:
            deadline = time.monotonic() + 100
            while not first_saved.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            try:
                with filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass
        elif self.progress.iteration == 4:
            filler.unlink()

    return [mock.patch.object(Trainer, "_report", report_and_fill)]


def save_again() -> list:
    """Nothing is trained: what was loaded is saved."""

    def only_save(self: Trainer) -> None:
        self._save(finish=True, again=True)

    return [mock.patch.object(Trainer, "train", only_save)]


AGAIN = ("dp2-dist", "tp2-dist", "pp2-dist", "tp1-dist", "dp2-dist")
"""Each loads and saves what the one before it saved."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on four groups of processes."""
    folder = make_inputs(tmp_path_factory.mktemp("saves"), samples=20)
    every_step = ["--save-interval", "1"]

    def heard(arguments: list[str], patches: Callable[[], list] = list) -> Callable[[], None]:
        save = Path(arguments[arguments.index("--save") + 1])
        return partial(run_heard, arguments, folder / f"{save.name}.txt", patches)

    one = [
        heard(command(folder, "finetune", "tp1", "late", "--save-interval", "2"), slow_disk),
        command(folder, "finetune", "tp1", "at-once", "--save-interval", "2", "--async-save", "false"),
        command(folder, "pretrain", "tp1", "few", *every_step, "--train-iters", "7", "--save-retain", "2",
                "--save-keep-interval", "3"),
        partial(copy_and_cut, folder / "late", folder / "cut"),
        refused(command(folder, "finetune", "tp1", "refused", "--load", str(folder / "cut")),
                "iter_0000005", "is missing", f"--load {folder / 'cut' / 'iter_0000004'}", "--load-fallback"),
        partial(shutil.copytree, folder / "late" / "iter_0000004", folder / "alone"),
        refused(command(folder, "finetune", "tp1", "refused", "--load", str(folder / "alone")), "frozen", "is missing"),
    ]  # fmt: skip
    two = [
        heard(command(folder, "pretrain", "dp2-dist", "failing", *every_step, "--train-iters", "4"), failing_disk),
        heard(command(folder, "finetune", "dp2", "back", "--load", str(folder / "cut"), "--load-fallback", "true")),
        command(folder, "finetune", "dp2-dist", "again-0", "--train-iters", "3"),
    ]
    three = [
        heard(command(folder, "finetune", AGAIN[i], f"again-{i}", "--load", str(folder / f"again-{i - 1}")), save_again)
        for i in range(1, len(AGAIN))
    ]
    train(one, 1)
    train([*two, *three[:2]], 2)
    train(three[2:3], 1)
    train(three[3:], 2)
    return folder


def copy_and_cut(save: Path, copy: Path) -> None:
    shutil.copytree(save, copy)
    max((copy / "iter_0000005").glob("*.distcp")).unlink()


def test_what_is_written_later_is_the_state_at_the_save(saved: Path) -> None:
    """Steps went on before the first byte was written: without a copy, these would be the later weights."""
    for iteration in (2, 4, 5):
        for name in ("late", "at-once"):
            (saved / name / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        assert_same_state(saved / "at-once", saved / "late")
    stalls = {
        name: [row["save-stall-seconds"] for row in metrics(saved / name) if "save-stall-seconds" in row]
        for name in ("late", "at-once")
    }
    assert [row["iteration"] for row in metrics(saved / "late") if "save-stall-seconds" in row] == [3, 5]
    assert stalls["late"][0] < 1.0 and len(stalls["at-once"]) == 2


def test_old_checkpoints_go_and_the_frozen_part_stays_as_it_was(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "few").glob("iter_*")) == [
        "iter_0000003", "iter_0000006", "iter_0000007"
    ]  # fmt: skip
    assert (saved / "few" / "latest_checkpointed_iteration.txt").read_text() == "7\n"
    (frozen,) = (saved / "few" / "frozen").iterdir()
    # The same weights at another layout, by another run: the same name.
    assert [path.name for path in (saved / "failing" / "frozen").iterdir()] == [frozen.name]
    first = min(path.stat().st_mtime_ns for path in (saved / "few").glob("iter_*/common.pt"))
    assert all(file.stat().st_mtime_ns < first for file in frozen.iterdir())


def test_an_iteration_holds_what_trains_and_a_whole_copy_all(saved: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(saved / "few")
    whole = make_whole(checkpoint, tmp_path / "whole")

    def shards(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.distcp"))

    (frozen,) = (saved / "few" / "frozen").iterdir()
    assert shards(whole) == shards(checkpoint) + shards(frozen)
    assert shards(checkpoint) < shards(frozen) / 3
    assert not any("frozen" in path.name and path.is_dir() for path in whole.iterdir())
    ours, copied = ShardedReader(checkpoint), ShardedReader(whole)
    assert ours.names() == copied.names()
    assert all(torch.equal(ours.read(name), copied.read(name)) for name in ours.names())
    # Nothing of the model is missing, and what is frozen is the pretrained model's.
    source = ShardedReader(latest_checkpoint(saved / "failing"))
    name = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
    assert name in ours.names() and torch.equal(ours.read(name), source.read(name))
    with pytest.raises(ValueError, match="exists already"):
        make_whole(checkpoint, whole)


def test_a_failure_on_one_rank_is_told_and_the_next_save_tried(saved: Path) -> None:
    said = (saved / "failing.txt").read_text()
    for iteration in (1, 2):
        assert f"iteration {iteration} was NOT saved, the run goes on without: rank 1: Input/output error" in said
    assert "saved iteration 3 to" in said and "saved iteration 4 to" in said
    folders = sorted(path.name for path in (saved / "failing").glob("iter_*"))
    assert folders == ["iter_0000003", "iter_0000004"]
    assert [row["iteration"] for row in metrics(saved / "failing")] == [1, 2, 3, 4]


def test_a_run_falls_back_on_all_ranks_and_overwrites_what_was_damaged(saved: Path) -> None:
    assert [row["iteration"] for row in metrics(saved / "back")] == [5]
    expected, found = metrics(saved / "late")[4], metrics(saved / "back")[0]
    assert found["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-4)


@pytest.mark.parametrize("turn", range(1, len(AGAIN)))
def test_weights_and_optimiser_go_through_every_layout_bitwise(saved: Path, turn: int) -> None:
    first, found = tensors(saved / "again-0"), tensors(saved / f"again-{turn}")
    assert first.keys() == found.keys()
    assert sum(name.startswith("optimizer.state.exp_avg_sq.") for name in first) > 10
    for name, expected in first.items():
        rows = min(len(expected), len(found[name]))  # the vocabulary is padded to the tensor-parallel size
        assert torch.equal(expected[:rows], found[name][:rows]), name
        assert len(found[name]) == len(expected) or "embed" in name or "output_layer" in name, name


# ----------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture(scope="module")
def small_disk(saved: Path):
    """A disk of 8 MB."""
    disk = saved / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_ends_a_save_and_not_the_run(saved: Path, small_disk: Path) -> None:
    arguments = command(saved, "finetune", "dp2", small_disk / "run", "--save-interval", "1", "--train-iters", "5")
    patches = partial(filled_disk, small_disk)
    train([partial(run_heard, [*arguments, "--save-retain", "1"], saved / "disk.txt", patches)], 2)
    said = (saved / "disk.txt").read_text()
    for iteration in (2, 3):
        assert f"iteration {iteration} was NOT saved" in said and "No space left on device" in said
    assert "saved iteration 1" in said and "saved iteration 5" in said
    assert [path.name for path in (small_disk / "run").glob("iter_*")] == ["iter_0000005"]
    assert [row["iteration"] for row in metrics(small_disk / "run")] == [1, 2, 3, 4, 5]


def test_a_run_that_cannot_save_its_end_says_so_and_leaves_the_last_whole_one(saved: Path, small_disk: Path) -> None:
    shutil.rmtree(small_disk / "run")
    arguments = command(saved, "finetune", "dp2", small_disk / "run", "--save-interval", "1", "--train-iters", "3")
    train([partial(run_heard, arguments, saved / "end.txt", partial(filled_disk, small_disk))], 2)
    stopped = (saved / "end.txt").read_text().splitlines()[-1]
    assert stopped.startswith("stopped: iteration 3 could not be saved") and "No space left on device" in stopped
    assert [path.name for path in (small_disk / "run").glob("iter_*")] == ["iter_0000001"]
    assert (small_disk / "run" / "latest_checkpointed_iteration.txt").read_text() == "1\n"
