"""What pipelines, shared embeddings and overlapped communication must not change: the losses of one process."""

import math
from pathlib import Path

import pytest
import torch

from tests.training.runs import (
    LOSSES,
    assert_same_state,
    layout_flags,
    make_inputs,
    metrics,
    tensors,
    train,
    weights,
)

COMPARED = (*LOSSES, "temperature", "hallucination margin", "grad-norm")
# One pool of negatives a micro-batch, wherever its samples are: 1 process with 4 samples or 2 ranks with 2 each.
TWO_MICRO_BATCHES = ["--contrastive-negatives", "micro-batch"]
PIPELINES = ("pp4", "pp4-dist", "pp4-dist-bf16")
OVERLAP = {
    "grad": ("dp2", ["--overlap-grad-reduce"]),
    "grad-param": ("dp2-dist", ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "grad-two": ("dp2", ["--overlap-grad-reduce", *TWO_MICRO_BATCHES]),
    "grad-param-two": ("dp2-dist", ["--overlap-grad-reduce", "--overlap-param-gather", *TWO_MICRO_BATCHES]),
    "two": ("dp2-dist", TWO_MICRO_BATCHES),
    "bf16": ("dp2-dist", ["--bf16"]),
    "grad-param-bf16": ("dp2-dist", ["--bf16", "--overlap-grad-reduce", "--overlap-param-gather"]),
}


def command(folder: Path, stage: str, layout: str, save: str, *extra: str, samples: int = 8) -> list[str]:
    _, flags = layout_flags(layout, samples=samples)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *flags, *extra]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on one group of processes per world size."""
    folder = make_inputs(tmp_path_factory.mktemp("pipeline"))
    tied = make_inputs(folder / "tied", tie=True)
    one = [command(folder, stage, "tp1", f"{stage}-1") for stage in ("pretrain", "finetune")]
    one += [
        command(folder, "finetune", "tp1", "two-1", *TWO_MICRO_BATCHES, samples=4),
        command(tied, "finetune", "tp1", "tied-1"),
    ]
    two = [command(tied, "finetune", "pp2-first1", "tied-pp2")]
    for stage in ("pretrain", "finetune"):
        for name, (layout, extra) in OVERLAP.items():
            if stage == "finetune" or name in ("grad-param", "bf16", "grad-param-bf16"):
                samples = 4 if name.endswith("two") else 8
                two.append(command(folder, stage, layout, f"{stage}-{name}", *extra, samples=samples))
    load = ["--load", str(folder / "cut-overlap")]
    two += [
        command(folder, "finetune", *args)
        for args in (
            ("dp2-dist", "cut-overlap", *OVERLAP["grad-param"][1], "--exit-interval", "2"),
            ("dp2-dist", "cut-overlap", *OVERLAP["grad-param"][1], *load),
        )
    ]
    four = []
    for layout in PIPELINES:
        flags = ["--bf16"] if "bf16" in layout else []
        sizes, name = layout.removesuffix("-bf16"), f"pretrain-cut-{layout}"
        four += [
            command(folder, "pretrain", sizes, f"pretrain-{layout}", *flags),
            command(folder, "pretrain", sizes, name, *flags, "--exit-interval", "3"),
            command(folder, "pretrain", sizes, name, *flags, "--load", str(folder / name)),
        ]
    for commands, size in ((one, 1), (two, 2), (four, 4)):
        train(commands, size)
    return folder


def assert_same_training(expected: Path, found: Path) -> None:
    one, other = metrics(expected), metrics(found)
    assert len(one) == len(other) == 5
    for row, other_row in zip(one, other, strict=True):
        for tag in COMPARED:
            assert math.isclose(row[tag], other_row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, row, other_row)


@pytest.mark.parametrize("layout", PIPELINES)
def test_stages_without_a_trained_parameter_train_save_and_resume(finished: Path, layout: str) -> None:
    if "bf16" not in layout:
        assert_same_training(finished / "pretrain-1", finished / f"pretrain-{layout}")
    assert_same_state(finished / f"pretrain-{layout}", finished / f"pretrain-cut-{layout}")
    assert (
        metrics(finished / f"pretrain-cut-{layout}")[4]["lm loss"]
        == metrics(finished / f"pretrain-{layout}")[4]["lm loss"]
    )


def test_embeddings_shared_by_first_and_last_stage(finished: Path) -> None:
    tied = finished / "tied"
    assert_same_training(tied / "tied-1", tied / "tied-pp2")
    one, two = weights(tied / "tied-1"), weights(tied / "tied-pp2")
    name = "language_model.embedding.word_embeddings.weight"
    assert "language_model.output_layer.weight" not in two
    # 5 steps of lr 1e-3 and not a row further: gradients of both ends were summed.
    assert (one[name] - two[name]).abs().max() <= 6e-3
    assert ((one[name] - two[name]).abs() > 2e-5).float().mean() <= 0.01


@pytest.mark.parametrize(
    ("stage", "name"), [("finetune", "grad"), ("finetune", "grad-param"), ("pretrain", "grad-param")]
)
def test_overlapped_communication_changes_no_loss(finished: Path, stage: str, name: str) -> None:
    assert_same_training(finished / f"{stage}-1", finished / f"{stage}-{name}")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_overlapped_communication_in_bf16(finished: Path, stage: str) -> None:
    """The temperature, being fp32, is then gathered apart from everything else."""
    plain, overlapped = metrics(finished / f"{stage}-bf16"), metrics(finished / f"{stage}-grad-param-bf16")
    for tag in (*LOSSES, "temperature"):
        assert [row[tag] for row in plain] == [row[tag] for row in overlapped], tag
    assert plain[4]["temperature"] != plain[0]["temperature"]
    assert_same_state(finished / f"{stage}-bf16", finished / f"{stage}-grad-param-bf16")


@pytest.mark.parametrize("name", ["two", "grad-two", "grad-param-two"])
def test_two_micro_batches_of_two_ranks_have_the_pools_of_one_process(finished: Path, name: str) -> None:
    assert_same_training(finished / "two-1", finished / f"finetune-{name}")
    pooled = [row["contrastive loss i2t"] for row in metrics(finished / "two-1")]
    assert pooled[0] < metrics(finished / "finetune-1")[0]["contrastive loss i2t"], "half the pool, fewer negatives"


def test_what_is_saved_under_overlapped_gathering_is_up_to_date(finished: Path) -> None:
    """Updated parameters are gathered during the next forward pass; a save must not come before it."""
    plain, gathered = weights(finished / "finetune-1"), weights(finished / "finetune-grad-param")
    for name in ("connector.0.weight", "heads.text_projector.weight", "language_model.output_layer.weight"):
        assert ((plain[name] - gathered[name]).abs() > 2e-5).float().mean() <= 0.01, name
    state = tensors(finished / "finetune-grad-param")
    for name, master in state.items():
        if name.startswith("optimizer.state.param."):
            assert torch.equal(state[name.removeprefix("optimizer.state.param.")], master), name
    assert_same_state(finished / "finetune-grad-param", finished / "cut-overlap")
