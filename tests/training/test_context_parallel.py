"""Runs whose packs are shared out over context-parallel ranks: the same training, saved, resumed and scored.

Losses and gradients of single steps are in `test_gradient_invariance`, with every other axis beside this one.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from hacl_megatron.assemble import processes
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import parse_run_config
from tests.tool_runs import run_tool
from tests.training.runs import LOSSES, assert_same_state, layout_flags, make_inputs, metrics, train, weights

COMPARED = (*LOSSES, "temperature", "hallucination margin", "grad-norm", "params-norm")
LORA = ["--lora-rank", "4", "--lr", "1e-2", "--connector-lr", "1e-3"]
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# name -> (stage, flags, the YAML's `transformer:` section at context-parallel size 2)
RUNS = {
    "pretrain": ("pretrain", ["--contrastive-negatives", "queue", "--queue-size", "12"], {}),
    # A trained tower, scores of the first weights made at the run's start, validation and its tasks.
    "twins": (
        "finetune",
        ["--freeze-ViT", "false", "--preference-loss", "dpo", "--valid-data-path", "{}/data/contrastive.json",
         "--eval-interval", "2", "--eval-iters", "1", "--eval-tasks", "retrieval", "preference"],
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ),
    "lora": ("finetune", LORA, RECOMPUTE),
}  # fmt: skip
DROPOUT = [*LORA, "--lora-dropout", "0.3"]


def command(folder: Path, layout: str, name: str, save: str, *extra: str) -> list[str]:
    stage, flags, transformer = RUNS[name]
    if name == "pretrain":  # with the optimiser that every rank has whole
        layout = layout.removesuffix("-dist")
    config = folder / f"{stage}.yaml"
    if transformer and "cp" in layout:
        settings = yaml.safe_load(config.read_text()) | {"transformer": transformer}
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
    files = ["--config", str(config), "--save", str(folder / save), "--log-params-norm"]
    # Two micro-batches: embeddings run ahead, gradients are cached.
    return [*files, *layout_flags(layout, samples=4)[1], *(flag.format(folder) for flag in flags), *extra]


def draws(folder: str) -> None:
    """Ranks draw the same until the model is built, and then each its own masks."""
    config = parse_run_config(["--config", f"{folder}/pretrain.yaml", *layout_flags("cp2")[1]])
    groups = processes.initialize_parallelism(config, Layout.of(config, 2))

    def same() -> bool:
        with get_cuda_rng_tracker().fork():
            drawn = torch.rand(100)
        both = [torch.empty(100) for _ in range(2)]
        torch.distributed.all_gather(both, drawn)
        return torch.equal(*both)

    assert same()
    processes.draw_apart(config, groups)
    assert not same()
    parallel_state.destroy_model_parallel()


def evaluate(folder: str, ranks: int) -> None:
    """Likelihoods and embeddings of what two ranks trained."""
    where = ["--load", f"{folder}/twins-cp2", "--output", f"{folder}/evaluated-{ranks}.json", "--device", "cpu"]
    data = ["--data-path", f"{folder}/data/contrastive.json", "--image-folder", f"{folder}/data/images", "--limit", "6"]
    how = ["--tasks", "preference", "retrieval", "--batch-size", "3", "--context-parallel-size", str(ranks)]
    assert run_tool("evaluate", *where, *data, *how) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on three groups of processes."""
    folder = make_inputs(tmp_path_factory.mktemp("context"), samples=20)
    half, cut = ["--load", str(folder / "half")], ["--load", str(folder / "dropout-cut")]
    one = [command(folder, "tp1-dist", name, name) for name in RUNS]
    one.append(command(folder, "tp1-dist", "lora", "half", "--exit-interval", "2"))
    two = [command(folder, "cp2-dist", name, f"{name}-cp2") for name in RUNS]
    two += [
        command(folder, "cp2-dist", "lora", "lora-resumed", *half, "--exit-interval", "4"),
        command(folder, "cp2-dist", "lora", "dropout", *DROPOUT),
        command(folder, "cp2-dist", "lora", "dropout-cut", *DROPOUT, "--exit-interval", "3"),
        command(folder, "cp2-dist", "lora", "dropout-cut", *DROPOUT, *cut),
        partial(draws, str(folder)),
        partial(evaluate, str(folder), 2),
    ]
    train(one, 1)
    train(two, 2)
    last = command(folder, "tp1-dist", "lora", "lora-resumed", "--load", str(folder / "lora-resumed"))
    train([last, partial(evaluate, str(folder), 1)], 1)
    return folder


def assert_same_training(expected: Path, found: Path, *, first: int = 0) -> None:
    one, other = metrics(expected)[first:], metrics(found)
    assert len(one) == len(other) == 5 - first
    for row, other_row in zip(one, other, strict=True):
        beside = ("preference loss", "logps/", "retrieval ", "lm loss")  # at first, accuracies are rounding's
        tags = [tag for tag in row if tag in COMPARED or tag.startswith(beside)]
        assert {*COMPARED} <= {*tags} and {*tags} <= {*other_row}
        for tag in tags:
            assert math.isclose(row[tag], other_row[tag], rel_tol=1e-4, abs_tol=1e-5), (tag, row[tag], other_row)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_does(finished: Path, name: str) -> None:
    """Gradients, norm, optimiser shards, recomputed layers, trained towers, adapters, queue, scores and validation."""
    assert_same_training(finished / name, finished / f"{name}-cp2")


def test_a_run_goes_on_with_more_ranks_and_with_fewer(finished: Path) -> None:
    """From one to two and back: the optimiser's shards are cut anew each time, no sample is drawn twice."""
    assert_same_training(finished / "lora", finished / "lora-resumed", first=2)


def test_what_two_ranks_trained_is_evaluated_by_one_and_by_two(finished: Path) -> None:
    """Catches a layout that is taken over from the run, and ranks that score their own rows alone."""
    one, two = (json.loads((finished / f"evaluated-{ranks}.json").read_text())["tasks"] for ranks in (1, 2))
    assert set(one) == set(two) == {"preference", "retrieval"}
    for task, found in one.items():
        assert found["counts"] == two[task]["counts"]
        assert found["metrics"] == pytest.approx(two[task]["metrics"], rel=1e-4, abs=1e-5)


def test_a_run_with_dropout_resumes_bitwise(finished: Path) -> None:
    """Each rank's own random state is saved: one for both would have the other rank draw other masks."""
    assert_same_state(finished / "dropout", finished / "dropout-cut")
    assert not torch.equal(*(weights(finished / name)["connector.0.weight"] for name in ("dropout", "lora-cp2")))
