"""The invariance of the losses: tensor, sequence, pipeline and data parallel sizes only change rounding."""

from pathlib import Path

import pytest
import torch

from tests.training.runs import assert_same_run, layout_flags, make_inputs, metrics, train, weights

LAYOUTS = ("tp2", "tp2-sp", "pp2-first1", "dp2", "tp2-pp2-sp", "tp2-dp2", "pp2-dp2")
COMPARED = (
    "lm loss",
    "contrastive loss i2t",
    "contrastive loss t2i",
    "temperature",
    "hallucination margin",
    "grad-norm",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout and stage trained for 5 steps, in one group of processes per world size."""
    folder = make_inputs(tmp_path_factory.mktemp("invariance"))
    by_size: dict[int, list[list[str]]] = {}
    for layout in ("tp1", *LAYOUTS):
        size, flags = layout_flags(layout)
        for stage in ("pretrain", "finetune"):
            extra = ["--use-distributed-optimizer"] if "dp2" in layout else []
            save = str(folder / f"{stage}-{layout}")
            command = ["--config", str(folder / f"{stage}.yaml"), "--save", save, *flags, *extra]
            by_size.setdefault(size, []).append(command)
    for size, commands in by_size.items():
        train(commands, size)
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_weights_as_one_process(finished: Path, stage: str, layout: str) -> None:
    assert_same_run(finished / f"{stage}-tp1", finished / f"{stage}-{layout}", COMPARED)


def test_the_data_exercises_mixed_batches(finished: Path) -> None:
    """Guards the test above: batches with and without pairs' hallucinations, and losses that move."""
    for stage in ("pretrain", "finetune"):
        rows = metrics(finished / f"{stage}-tp1")
        assert all(row["contrastive loss"] > 0.1 for row in rows)
        assert len({round(row["lm loss"], 6) for row in rows}) == 5
    before = weights(finished / "pretrain-tp1")
    assert not torch.equal(before["connector.0.weight"], weights(finished / "finetune-tp1")["connector.0.weight"])
