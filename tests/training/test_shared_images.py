"""Images shared out over tensor-parallel ranks (`--vision-parallel share`), with what else touches gradients: data
parallelism, the distributed optimiser, reductions and gathers that overlap, bf16.

Adam's epsilon is far above the gradients here, so that a step is proportional to them: what weights have moved is the
sum of their gradients, and one that is counted twice, or for half of the images, shows in full.
"""

import math
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.runs import LOSSES, layout_flags, make_inputs, metrics, tensors, train, weights

COMPARED = (*LOSSES, "temperature", "hallucination margin", "grad-norm")
PROPORTIONAL = ["--adam-eps", "1", "--lr", "0.5", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0"]
# The temperature's gradient is in the tens: at the rate of the others its first step would end at its upper bound.
TRAINED = ["--freeze-ViT", "false", "--train-iters", "2", *PROPORTIONAL, "--clip-grad", "0", "--heads-lr", "1e-2"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
# name -> (layout, samples of a micro-batch over all ranks, flags)
RUNS = {
    "start": ("tp1", 8, ["--train-iters", "1", "--lr", "1e-30", "--heads-lr", "1e-30"]),
    "whole": ("tp1", 8, []),
    "whole, recomputed": ("tp1", 8, []),
    "dist": ("tp2-dp2-dist-share", 4, OVERLAP),
    "dist, recomputed": ("tp2-dp2-dist-share", 4, OVERLAP),
    "bf16 split": ("tp2-split", 4, ["--bf16"]),
    "bf16 share": ("tp2-share", 4, ["--bf16", *OVERLAP]),
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BUCKET = 12_000
"""Parameters: the tiny tower fills some buckets, of which one is reduced while the pass backward goes on."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, on one group of processes per world size."""
    folder = make_inputs(tmp_path_factory.mktemp("shared_images"))
    config = folder / "small.yaml"
    settings = yaml.safe_load((folder / "finetune.yaml").read_text()) | {"ddp": {"bucket_size": BUCKET}}
    config.write_text(yaml.safe_dump(settings))
    again = folder / "recomputed.yaml"
    again.write_text(yaml.safe_dump(settings | {"transformer": RECOMPUTE}))
    by_size: dict[int, list[list[str]]] = {}
    for name, (layout, samples, flags) in RUNS.items():
        size, sizes = layout_flags(layout, samples=samples)
        file = again if name.endswith("recomputed") else config
        command = ["--config", str(file), "--save", str(folder / name), *TRAINED, *sizes, *flags]
        by_size.setdefault(size, []).append(command)
    for size, commands in by_size.items():
        train(commands, size)
    return folder


def moved(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """By how much each of a run's weights, in fp32, is not what it began with."""
    start, state = weights(folder / "start"), tensors(folder / run)
    return {name: state.get(f"optimizer.state.param.{name}", state[name]).float() - start[name] for name in start}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a weight's way from the expected one, in parts of that; and the weight's name."""
    assert found.keys() == expected.keys() and all(way.any() for way in expected.values())
    return max((float((found[name] - way).norm() / way.norm()), name) for name, way in expected.items())


def test_a_sharded_optimiser_takes_the_steps_of_one_process(finished: Path) -> None:
    """Catches sums over tensor-parallel ranks that come before the data-parallel ones are there, or miss a part of a
    bucket. Measured: 4e-6 of a weight's way."""
    for row, other in zip(metrics(finished / "whole"), metrics(finished / "dist"), strict=True):
        for tag in COMPARED:
            assert math.isclose(row[tag], other[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, row, other)
    way = moved(finished, "whole")
    assert sum(name.startswith("vision_tower.") and bool(tensor.any()) for name, tensor in way.items()) > 10
    assert furthest(moved(finished, "dist"), way) < (1e-4, "")


@pytest.mark.parametrize("run", ["whole", "dist"])
def test_recomputed_layers_of_the_tower_change_nothing(finished: Path, run: str) -> None:
    """Catches layers that run again in another mode or on other images, and gradients that are reduced before that."""
    found, expected = (moved(finished, name) for name in (f"{run}, recomputed", run))
    assert furthest(found, expected) < (1e-5, "")


def test_bf16_takes_the_steps_that_it_takes_with_a_tower_that_is_split(finished: Path) -> None:
    """Catches gradients of one rank's images alone. Measured: 0.04 of a weight's way."""
    for row, other in zip(metrics(finished / "bf16 split"), metrics(finished / "bf16 share"), strict=True):
        for tag in LOSSES:
            assert math.isclose(row[tag], other[tag], rel_tol=0.01), (tag, row, other)
    assert furthest(moved(finished, "bf16 share"), moved(finished, "bf16 split")) < (0.1, "")
