"""Validation sees each sample once: it stops at the end of its data and says so.

Public reports: Megatron-Bridge#5626: validation that wraps past its end without a word.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from hacl_megatron.train import run
from tests.training.runs import LOSSES, make_inputs, metrics, train

TAGS = [f"{tag} validation" for tag in LOSSES]


def run_heard(arguments: Sequence[str], heard: Path) -> None:
    """Train, with what rank 0 tells the terminal in a file."""
    target = heard if torch.distributed.get_rank() == 0 else Path(os.devnull)
    with target.open("w") as file, contextlib.redirect_stdout(file):
        run(arguments)


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples in batches of 8, 12 and 6, by rows too, and on two ranks; without contrast across a batch's border."""
    folder = make_inputs(tmp_path_factory.mktemp("validation"), samples=24)
    data = json.loads((folder / "data" / "pretrain.json").read_text())
    (folder / "twelve.json").write_text(json.dumps(data[:12]))
    missing = [{**record, "image": "missing.jpg"} for record in data[:4]]
    (folder / "bad.json").write_text(json.dumps([*missing, *data[4:8]]))
    (folder / "none.json").write_text(json.dumps(missing))
    valid = ["--valid-data-path", str(folder / "twelve.json"), "--eval-interval", "1", "--train-iters", "1"]

    def heard(name: str, batch: int, iters: int, *sizes: str):
        flags = [*valid, "--global-batch-size", str(batch), "--eval-iters", str(iters), "--lr", "1e-30"]
        save = ["--save", str(folder / name)]
        command = ["--config", str(folder / "pretrain.yaml"), *save, *flags, "--micro-batch-size", "1", *sizes]
        return partial(run_heard, command, folder / f"{name}.txt")

    one = [
        heard("12", 12, 1, "--micro-batch-size", "12"),
        heard("6", 6, 2, "--micro-batch-size", "6"),
        heard("8", 8, 10, "--micro-batch-size", "8"),
        heard("8-apart", 8, 10, "--micro-batch-size", "2", "--balance-micro-batches", "false"),
        heard("8-even", 8, 10, "--micro-batch-size", "2"),
        heard("8-rows", 8, 10, "--micro-batch-tokens", "512"),
        heard("8-first", 8, 1, "--micro-batch-size", "8"),
    ]
    train(one, 1)
    two = ["--micro-batch-size", "4", "--train-iters", "2"]
    train([heard("8-dp2", 8, 10, "--micro-batch-size", "4"), heard("8-pp2", 8, 10, "--micro-batch-size", "8",
           "--pipeline-model-parallel-size", "2"),
           heard("bad", 8, 1, *two, "--valid-data-path", str(folder / "bad.json")),
           heard("none", 8, 1, *two, "--valid-data-path", str(folder / "none.json"))], 2)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["8", "8-apart", "8-even", "8-rows", "8-dp2", "8-pp2"])
def test_every_sample_counts_once(validated: Path, name: str) -> None:
    """The mean over the target tokens of 12 samples is the same in one batch of 12."""
    found, expected = metrics(validated / name)[0], metrics(validated / "12")[0]
    assert found["lm loss validation"] == pytest.approx(expected["lm loss validation"], rel=1e-5)
    for tag in TAGS:
        assert found[tag] == pytest.approx(metrics(validated / "8")[0][tag], rel=1e-4), tag
    assert metrics(validated / "8-first")[0]["lm loss validation"] != pytest.approx(found["lm loss validation"])


@pytest.mark.parametrize("name", ["8", "8-apart", "8-even", "8-rows", "8-dp2", "8-pp2"])
def test_the_end_is_said_in_one_line(validated: Path, name: str) -> None:
    said = (validated / f"{name}.txt").read_text().splitlines()
    line = (
        "validation ends with the 12 samples of --valid-data-path, after 2 global batches; "
        "--eval-iters 10 asks for 80 samples"
    )
    assert said.count(line) == 1


@pytest.mark.parametrize("name", ["12", "6", "8-first"])
def test_nothing_is_said_where_the_samples_suffice(validated: Path, name: str) -> None:
    assert "validation ends" not in (validated / f"{name}.txt").read_text()


def test_unusable_samples_are_said_once_and_a_validation_of_nothing_is_none(validated: Path) -> None:
    """They were left out without a word, and of unusable samples alone a validation said `validation at 1: `."""
    for name in ("bad", "none"):
        (line,) = [line for line in (validated / f"{name}.txt").read_text().splitlines() if "goes without" in line]
        assert line.startswith(
            "validation goes without 4 unusable samples of --valid-data-path (pretrain-0: no such file"
        )
    assert "validation at 1: lm loss " in (validated / "bad.txt").read_text()
    assert "validation at 2: nothing to show: no sample has" in (validated / "none.txt").read_text()
