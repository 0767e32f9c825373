"""Runs with LoRA: small checkpoints, resumed at any layout; the same training however it is laid out and cut."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from hacl_megatron.checkpoint.run.stored.index import read_index
from hacl_megatron.config.lora import is_lora
from tests.training.runs import (
    LOSSES,
    assert_same_state,
    latest_checkpoint,
    layout_flags,
    make_inputs,
    metrics,
    refused,
    train,
    weights,
)
from tests.training.test_pools import run_comparing_passes

LORA = ["--lora-rank", "4", "--lora-alpha", "12", "--lr", "1e-2", "--connector-lr", "1e-3"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
COMPARED = (*LOSSES, "temperature", "grad-norm")


def command(folder: Path, name: str, layout: str, *extra: str, stage: str = "finetune", samples: int = 8) -> list[str]:
    _, flags = layout_flags(layout, samples=samples)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / name), *flags, *extra]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on two groups of processes."""
    folder = make_inputs(tmp_path_factory.mktemp("lora"), samples=20)
    half, full = ["--load", str(folder / "half")], str(folder / "full")
    still = ["--lr", "1e-30", "--train-iters", "1"]
    one = [
        command(folder, "full", "tp1-dist", *LORA),
        command(folder, "half", "tp1-dist", *LORA, "--exit-interval", "2"),
        # Without LoRA flags: a checkpoint's own adapters go on, resumed or taken as weights.
        command(folder, "resumed", "tp1-dist", *half, *LORA[4:]),
        command(folder, "taken", "tp1", "--pretrained-checkpoint", full, *still),
        command(folder, "pre", "tp1", *LORA, stage="pretrain"),
        command(folder, "none", "tp1", "--train-iters", "2", stage="pretrain"),
        command(folder, "fresh", "tp1", *LORA[:4], *still, "--pretrained-checkpoint", str(folder / "none")),
        refused(
            command(folder, "other", "tp1-dist", *half, "--lora-rank", "5"), "LoRA of rank 5", "has LoRA of rank 4"
        ),
        refused(
            command(folder, "late", "tp1", *LORA, "--load", str(folder / "none"), stage="pretrain"),
            "--lora-rank is 4", "has no LoRA", "--pretrained-checkpoint",
        ),
    ]  # fmt: skip
    two = [
        command(folder, "full-tp2-sp", "tp2-sp-dist", *LORA),
        command(folder, "full-pp2", "pp2-first1", *LORA),
        command(folder, "resumed-tp2", "tp2-dist", *half, *LORA),
        command(folder, "resumed-pp2", "pp2-dist", *half, *LORA),
        # Two micro-batches a rank: embeddings run ahead, gradients are cached.
        command(folder, "pre-dp2", "dp2-dist", *LORA, *OVERLAP, stage="pretrain", samples=4),
        partial(
            run_comparing_passes,
            command(folder, "dropout", "tp2", *LORA, "--lora-dropout", "0.3", samples=4),
        ),
    ]
    train(one, 1)
    train(two, 2)
    return folder


def assert_same_training(expected: Path, found: Path, *, first: int = 0) -> None:
    one, other = metrics(expected)[first:], metrics(found)
    assert len(one) == len(other) == 5 - first
    for row, other_row in zip(one, other, strict=True):
        assert row["iteration"] == other_row["iteration"]
        for tag in COMPARED:
            assert math.isclose(row[tag], other_row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, row[tag], other_row[tag])


def test_adapters_train_and_nothing_beside_them_in_the_language_model(finished: Path) -> None:
    after, before = weights(finished / "full"), weights(finished / "half")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    adapters = {name for name in after if is_lora(name)}
    assert len(adapters) == 14 and adapters <= moved
    assert {name.partition(".")[0] for name in moved - adapters} == {"connector", "heads"}
    losses = [row["lm loss"] for row in metrics(finished / "full")]
    assert losses[-1] < losses[0]


def test_layouts_train_alike(finished: Path) -> None:
    """Tensor and sequence parallelism, pipeline stages, and with the plain optimiser; gradient norms too."""
    for name in ("full-tp2-sp", "full-pp2"):
        assert_same_training(finished / "full", finished / name)


def test_stage_1_trains_adapters_too_however_it_is_cut(finished: Path) -> None:
    """`--freeze-LM` and LoRA: texts go through trained parameters, in the main pass or ahead of it."""
    assert_same_training(finished / "pre", finished / "pre-dp2")
    assert not torch.equal(*(weights(finished / name)[key] for name, key in _first_adapter(finished)))


def _first_adapter(folder: Path) -> list[tuple[str, str]]:
    key = next(name for name in weights(folder / "pre") if name.endswith("linear_qkv_lora.q_proj_B"))
    return [("pre", key), ("fresh", key)]


def test_resumed_run_goes_on_bitwise_and_at_other_layouts(finished: Path) -> None:
    assert_same_state(finished / "full", finished / "resumed")
    for name in ("resumed-tp2", "resumed-pp2"):
        assert_same_training(finished / "full", finished / name, first=2)


def test_checkpoint_holds_the_adapters_and_names_the_frozen_weights(finished: Path) -> None:
    stored = read_index(latest_checkpoint(finished / "full")).tensors
    in_frozen = {
        name: {chunk.file.startswith("../frozen/") for chunk in entry.chunks} for name, entry in stored.items()
    }
    base = {name: where for name, where in in_frozen.items() if name.startswith("language_model.")}
    assert all(where == {not is_lora(name)} for name, where in base.items())
    assert sum(is_lora(name) for name in base) == 14
    # The two halves of a run share them.
    assert len(list((finished / "full" / "frozen").iterdir())) == 1


def test_weights_are_taken_with_their_adapters_or_get_fresh_ones(finished: Path) -> None:
    full, taken = weights(finished / "full"), weights(finished / "taken")
    assert full.keys() == taken.keys()
    assert all(torch.equal(value, taken[name]) for name, value in full.items() if is_lora(name))
    none, fresh = weights(finished / "none"), weights(finished / "fresh")
    assert set(fresh) - set(none) == {name for name in fresh if is_lora(name)}
    assert all(torch.equal(none[name], fresh[name]) for name in none if name.startswith(("language", "vision")))
    up = {name: value for name, value in fresh.items() if is_lora(name) and name.endswith("_B")}
    assert len(up) == 7 and all(value.abs().max() < 1e-20 for value in up.values())
    down = fresh["language_model.decoder.layers.mlp.linear_fc1_lora.up_proj_A"]
    assert down.shape == (4, 4, 48) and 0.9 * 48**-0.5 < down.abs().max() <= 48**-0.5
    assert not torch.equal(down[0], down[1])


def test_dropout_draws(finished: Path) -> None:
    """Masks are there (that both passes draw the same ones, the run itself has seen)."""
    dropped, plain = metrics(finished / "dropout")[0], metrics(finished / "full")[0]
    assert dropped["lm loss"] == pytest.approx(plain["lm loss"], rel=1e-5), "B is zero in the first step"
    assert abs(dropped["grad-norm"] - plain["grad-norm"]) > 1e-3 * plain["grad-norm"]
