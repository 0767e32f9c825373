"""A run that bad data stopped goes on once they are mended, and is stopped again where they are not.

Public reports: Sa2VA#21: what is wrong with the data stays counted against those who have mended them.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from megatron.core import parallel_state

from hacl_megatron.train import run
from hacl_megatron.training.reporting.status import TrainingStopped
from tests.training.runs import common_state, layout_flags, make_inputs, metrics, train


def run_stopped(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(TrainingStopped, match=message):
        run(arguments)
    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 samples in batches of 8, half of the images missing: stopped after an epoch, resumed with and without them."""
    folder = make_inputs(tmp_path_factory.mktemp("mended"), samples=16)
    images, away = folder / "data" / "images", folder / "away"
    names = [sample["image"] for sample in json.loads((folder / "data" / "pretrain.json").read_text())][::2]
    shutil.copytree(images, away)
    for name in {*names}:
        (images / name).unlink()

    def command(save: str) -> list[str]:
        save = str(folder / save)
        flags = ["--train-iters", "6", "--max-bad-fraction", "0.1", "--save", save, "--load", save]
        return ["--config", str(folder / "pretrain.yaml"), *layout_flags("tp1")[1], *flags]

    first = r"^\d+ of 16 samples were unusable, more than --max-bad-fraction 0.1: see .*bad_samples.jsonl.* limit$"
    again = r"of 16 samples since iteration 2 were unusable.* \(\d+ of 32 in the whole run\)$"
    train(
        [
            partial(run_stopped, command("mended"), first),
            partial(shutil.copytree, folder / "mended", folder / "as-before"),
            partial(run_stopped, command("as-before"), again),
            partial(shutil.copytree, away, images, dirs_exist_ok=True),
            command("mended"),
        ],
        1,
    )
    return folder


def test_a_resume_with_mended_data_goes_on_and_keeps_the_totals(stopped: Path) -> None:
    rows = metrics(stopped / "mended")
    assert [row["iteration"] for row in rows] == list(range(1, 7))
    bad = rows[1]["bad-samples"]
    assert bad > 1.6 and [row["bad-samples"] for row in rows[2:]] == [bad] * 4
    assert common_state(stopped / "mended")["progress"]["bad_samples"] == bad


def test_a_resume_with_the_same_data_is_judged_anew_and_stopped_again(stopped: Path) -> None:
    assert [row["iteration"] for row in metrics(stopped / "as-before")] == [1, 2, 3, 4]
    assert metrics(stopped / "as-before")[-1]["bad-samples"] == 2 * metrics(stopped / "mended")[1]["bad-samples"]
