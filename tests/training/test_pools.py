"""Negatives from beyond one micro-batch: the queue over steps, layouts and resumes; gradient caching under dropout."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedObject

from hacl_megatron.checkpoint.run.load import load_checkpoint
from hacl_megatron.train import run
from hacl_megatron.training.losses import StepLosses
from tests.training.runs import LOSSES, assert_same_state, latest_checkpoint, layout_flags, make_inputs, metrics, train

COMPARED = (*LOSSES, "temperature", "grad-norm", "retrieval accuracy i2t")
QUEUE = ["--contrastive-negatives", "queue", "--queue-size", "20"]  # two and a half steps of at most 8 pairs

VALIDATED = ["--eval-interval", "1", "--eval-iters", "1"]


def command(folder: Path, name: str, layout: str, *extra: str, samples: int = 8) -> list[str]:
    _, flags = layout_flags(layout, samples=samples)
    return ["--config", str(folder / "pretrain.yaml"), "--save", str(folder / name), *flags, *extra]


def run_with_nan(arguments: Sequence[str], step: int, spoilt_pairs: Path) -> None:
    """Train in one micro-batch, with a step's loss not a number, and leave its pairs' keys in a file."""
    loss, calls = StepLosses.of_micro_batch, 0

    def spoilt(self: StepLosses, output, index):
        nonlocal calls
        calls += 1
        value, sums = loss(self, output, index)
        if calls == step:
            value = value * math.nan
            torch.save(self.micro_batches[index].main.image_keys, spoilt_pairs)
        return value, sums

    with mock.patch.object(StepLosses, "of_micro_batch", spoilt):
        run(arguments)


def run_comparing_passes(arguments: Sequence[str]) -> None:
    """Train, and see each micro-batch's embeddings come out of the main pass as they came out of the one ahead."""
    cache, loss, ahead, compared = StepLosses.cache_gradients, StepLosses.of_micro_batch, [], 0

    def kept(self: StepLosses, outputs):
        ahead[:] = outputs
        return cache(self, outputs)

    def checked(self: StepLosses, output, index):
        nonlocal compared
        for name in ("image_embeddings", "caption_embeddings", "hallucinated_embeddings"):
            torch.testing.assert_close(getattr(output, name), getattr(ahead[index], name), rtol=0, atol=1e-6)
        compared += output.image_embeddings.shape[0]
        return loss(self, output, index)

    with (
        mock.patch.object(StepLosses, "cache_gradients", kept),
        mock.patch.object(StepLosses, "of_micro_batch", checked),
    ):
        run(arguments)
    assert compared > 20


def dump_queue(save: Path) -> None:
    """The queue in the newest checkpoint of `save`, into a file that needs no process group to be read."""
    wanted = {"queue": ShardedObject("queue", None, (1,), (0,))}
    torch.save(load_checkpoint(wanted, latest_checkpoint(save))["queue"], save / "queue.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("pools"))
    dropout = yaml.safe_load((folder / "finetune.yaml").read_text())
    dropout["transformer"] = {"hidden_dropout": 0.3}
    (folder / "dropout.yaml").write_text(yaml.safe_dump(dropout))
    cut = ["--exit-interval", "3", "--train-iters", "5"]
    one = [
        command(folder, "queue-1", "tp1", *QUEUE),
        command(folder, "step-1", "tp1"),
        command(folder, "cut-1", "tp1", *QUEUE, *cut),
        command(folder, "cut-1", "tp1", *QUEUE, "--load", str(folder / "cut-1")),
        partial(run_with_nan, command(folder, "nan", "tp1", *QUEUE, "--train-iters", "3"), 3, folder / "third.pt"),
        partial(run_with_nan, command(folder, "nan-2", "tp1", *QUEUE, "--train-iters", "3"), 2, folder / "second.pt"),
        command(folder, "two-steps", "tp1", *QUEUE, *["--exit-interval", "2", "--train-iters", "3"]),
        partial(dump_queue, folder / "nan"),
        partial(dump_queue, folder / "two-steps"),
        partial(dump_queue, folder / "nan-2"),
        _with_dropout(folder, "plain"),
        _with_dropout(folder, "validated", *VALIDATED),
        _with_dropout(folder, "validated-2", *VALIDATED, "--micro-batch-size", "4"),
    ]
    two = [
        command(folder, "queue-tp2", "tp2-sp", *QUEUE),
        command(folder, "queue-dp2", "dp2", *QUEUE, samples=4),
        command(folder, "cut-pp2", "pp2-first1", *QUEUE, *cut, samples=2),
        command(folder, "cut-pp2", "dp2", *QUEUE, "--load", str(folder / "cut-pp2")),
        partial(
            run_comparing_passes,
            ["--config", str(folder / "dropout.yaml"), *layout_flags("tp2", samples=2)[1]],
        ),
        _by_tokens(folder),
    ]
    train(one, 1)
    train(two, 2)
    return folder


def _with_dropout(folder: Path, name: str, *extra: str) -> list[str]:
    """Stage 1's pairs, steps that move nothing, a queue, and dropout: what differs between steps is theirs alone."""
    given = ["--config", str(folder / "dropout.yaml"), "--save", str(folder / name), *layout_flags("tp1")[1], *QUEUE]
    pairs = str(folder / "data" / "contrastive.json")
    return [*given, "--lr", "1e-30", "--data-path", pairs, "--valid-data-path", pairs, *extra]


def _by_tokens(folder: Path) -> list[str]:
    flags = layout_flags("dp2")[1]
    at = flags.index("--micro-batch-size")
    del flags[at : at + 2]
    files = ["--config", str(folder / "pretrain.yaml"), "--save", str(folder / "tokens")]
    return [*files, *flags, "--micro-batch-tokens", "260"]


def assert_same_training(expected: Path, found: Path) -> None:
    one, other = metrics(expected), metrics(found)
    assert len(one) == len(other) == 5
    for row, other_row in zip(one, other, strict=True):
        for tag in COMPARED:
            assert math.isclose(row[tag], other_row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, row, other_row)


def test_the_queue_adds_negatives_from_the_second_step_on(finished: Path) -> None:
    step, queue = metrics(finished / "step-1"), metrics(finished / "queue-1")
    assert step[0]["contrastive loss"] == queue[0]["contrastive loss"], "an empty queue"
    assert all(
        more["contrastive loss"] > few["contrastive loss"] + 0.1 for more, few in zip(queue[1:], step[1:], strict=True)
    )


@pytest.mark.parametrize("name", ["queue-tp2", "queue-dp2"])
def test_the_queue_is_the_same_at_any_layout_and_number_of_micro_batches(finished: Path, name: str) -> None:
    assert_same_training(finished / "queue-1", finished / name)


def test_a_resumed_run_has_its_queue_again(finished: Path) -> None:
    assert_same_state(finished / "queue-1", finished / "cut-1")
    assert metrics(finished / "cut-1")[3]["contrastive loss"] == metrics(finished / "queue-1")[3]["contrastive loss"]
    assert_same_training(finished / "queue-1", finished / "cut-pp2")  # and at another layout


def test_a_skipped_step_leaves_nothing_in_the_queue(finished: Path) -> None:
    assert metrics(finished / "nan")[2]["skipped-steps"] == 1
    one, other = (torch.load(finished / name / "queue.pt") for name in ("nan", "two-steps"))
    assert one.keys() == other.keys() and one["image"].shape[0] > 8
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_step_behind_a_skipped_one_adds_its_own_pairs_alone(finished: Path) -> None:
    """Catches pairs of the skipped step that wait, and go in with the next one's."""
    assert [row["skipped-steps"] for row in metrics(finished / "nan-2")] == [0, 1, 1]
    kept = torch.load(finished / "nan-2" / "queue.pt")["image_keys"]
    assert 8 < len(kept) <= 16
    assert not torch.isin(torch.load(finished / "second.pt"), kept).any()


def test_validation_leaves_training_as_it_is(finished: Path) -> None:
    """Catches dropout that stays off behind the first validation, or draws for it; and its pairs in the queue."""
    one, other = metrics(finished / "plain"), metrics(finished / "validated")
    assert len(one) == len(other) == 5
    for row, other_row in zip(one, other, strict=True):
        assert [row[tag] for tag in COMPARED] == [other_row[tag] for tag in COMPARED]


@pytest.mark.parametrize("name", ["validated", "validated-2"])
def test_validation_has_no_dropout_and_no_queue(finished: Path, name: str) -> None:
    """Weights that stand still give equal losses; the queue, which fills meanwhile, would add its negatives: to the
    terms of one micro-batch, or to those that are computed behind the last of two."""
    rows = metrics(finished / name)
    for tag in LOSSES:
        assert len({row[f"{tag} validation"] for row in rows}) == 1, tag
    assert rows[-1]["contrastive loss"] > rows[0]["contrastive loss"] + 0.1, "the queue has filled"


def test_a_budget_of_rows_changes_nothing_but_the_number_of_micro_batches(finished: Path) -> None:
    rows = metrics(finished / "tokens")
    assert_same_training(finished / "step-1", finished / "tokens")
    assert {row["micro-batches"] for row in rows} != {1.0}
