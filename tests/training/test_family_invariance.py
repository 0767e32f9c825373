"""Losses, gradients and whole runs of every family at every layout, its head tied or not, with LoRA or without.

The reference is one process with one micro-batch; that it computes what transformers and peft do, `tests/model` shows.
Each pair of two of those choices is met here, `HACL_FULL_INVARIANCE=1` runs every combination.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch

from hacl_megatron.config.lora import is_lora
from tests.distributed import run_distributed
from tests.selection import selected
from tests.tiny_data import swap_twins
from tests.training.family_cases import FAMILIES, Model, write_models
from tests.training.gradient_cases import Case, read, record
from tests.training.runs import assert_same_run, layout_flags, make_inputs, train

FULL = bool(os.environ.get("HACL_FULL_INVARIANCE"))
SAMPLES = 8
STAGES = ("pretrain", "finetune")
LAYOUTS = ("tp2", "tp2-sp", "pp2-first1", "tp2-pp2-sp-first1")
BY_THREE = ("tp3", "tp3-sp")


@dataclass(frozen=True)
class Start:
    """What a run trains."""

    family: str
    tied: bool
    lora: bool
    stage: str
    by_three: bool = False

    @property
    def model(self) -> Model:
        return Model(self.family, self.tied, self.lora, self.by_three)

    def __str__(self) -> str:
        return f"{self.model.name}-{self.stage}"


SOME = {
    Start("llama", False, False, "pretrain"): ("tp2-sp", "tp2-pp2-sp-first1"),
    Start("llama", True, True, "finetune"): ("tp2", "pp2-first1"),
    Start("qwen2", False, False, "finetune"): ("tp2", "pp2-first1", "cp2"),
    Start("qwen2", True, True, "pretrain"): ("tp2-sp", "tp2-pp2-sp-first1"),
    Start("qwen3", False, True, "pretrain"): ("tp2", "pp2-first1"),
    Start("qwen3", True, False, "finetune"): ("tp2-sp", "tp2-pp2-sp-first1", "cp2"),
    Start("mistral", False, True, "finetune"): ("tp2-sp", "tp2-pp2-sp-first1"),
    Start("mistral", True, False, "pretrain"): ("tp2", "pp2-first1"),
    Start("qwen2", False, True, "finetune", by_three=True): ("tp3-sp",),
}
EVERY = {
    Start(*values, by_three): BY_THREE if by_three else LAYOUTS
    for by_three in (False, True)
    for values in product(FAMILIES, (False, True), (False, True), STAGES)
}
CASES = [(start, layout) for start, layouts in (EVERY if FULL else SOME).items() for layout in layouts]
ALONE = [(start, "tp1") for start in dict.fromkeys(start for start, _ in CASES)]
REFERENCES = [Case("all", "prompt"), *([Case("own", "image"), Case("own", "image", preference="phrase")] * FULL)]
"""An image's embedding behind the prompt that it shares with the dialogue; by itself; beside answers."""

CHAIN = ("tp2-sp-dist", "pp2-first1-dist", "tp2-pp2-sp-first1-dist", *(["tp1-dist"] * FULL))
"""Layouts of a run that is stopped after a step, and goes on at the next; at the last to its end."""
CHAIN_BY_THREE = ("tp3-sp-dist", "tp1-dist")
"""Of which the first pads embedding and head to other sizes than the whole run's."""
RESUMED = [*EVERY] if FULL else [Start("qwen3", True, False, "finetune")]


def cases() -> list[Case]:
    """Of every layout. By tokens, the number of micro-batches is uneven."""
    found = [Case("all", "prompt", micro_batches=4)]
    if FULL:
        found += [Case("all", "prompt"), Case("all", "prompt", tokens=400), Case("own", "image", micro_batches=4)]
        found += [Case("own", "image", preference="phrase", micro_batches=4)]
    return found


def record_all(folder: str, wanted: list[tuple[Start, str]]) -> None:
    for start, layout in wanted:
        _, flags = layout_flags(layout, samples=SAMPLES)
        flags += ["--global-batch-size", str(SAMPLES), *start.model.flags(Path(folder), start.stage)]
        flags += ["--make-vocab-size-divisible-by", "12"]  # whole gradients are compared: tables of one size
        asked = list(dict.fromkeys([*REFERENCES, *(cases() * FULL)])) if layout == "tp1" else cases()
        record(folder, f"{start}-{layout}", flags, start.stage, asked, samples=SAMPLES)


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and all models that the selected tests start from."""
    folder = make_inputs(tmp_path_factory.mktemp("families"))
    swap_twins(folder / "data")
    starts = [start for start, _ in selected(request, "case", [*CASES, *ALONE])]
    write_models(folder, [start.model for start in [*starts, *selected(request, "start", RESUMED)]])
    return folder


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest, root: Path) -> Path:
    """Every selected case, in one group of processes per world size."""
    wanted = selected(request, "case", [*CASES, *ALONE])
    wanted = list(dict.fromkeys([*((start, "tp1") for start, _ in wanted), *wanted]))
    for size in sorted({layout_flags(layout)[0] for _, layout in wanted}):
        for some in _few([case for case in wanted if layout_flags(case[1])[0] == size]):
            run_distributed(record_all, size, str(root), some)
    return root


def _few(listed: list[Any]) -> Iterator[list[Any]]:
    """As many as one group of processes does in its time."""
    size = 4 if FULL else 12
    return (listed[at : at + size] for at in range(0, len(listed), size))


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, root: Path) -> Path:
    """Whole runs of the selected starts, and those that changed their layout after every step."""
    starts = selected(request, "start", RESUMED)

    def command(start: Start, name: str, layout: str, *extra: str) -> list[str]:
        files = ["--config", str(root / f"{start.stage}.yaml"), "--save", str(root / f"{start}-{name}")]
        return [*files, *layout_flags(layout, samples=8)[1], *start.model.flags(root, start.stage), *extra]

    for some in _few(starts):
        train([command(start, "whole", "tp1-dist") for start in some], 1)
    for chain in (CHAIN, CHAIN_BY_THREE):
        for size, layouts in groupby(enumerate(chain, start=1), lambda at: layout_flags(at[1])[0]):
            commands = []
            for (number, layout), start in product(list(layouts), starts):
                if start.by_three == (chain is CHAIN_BY_THREE):
                    stops = [] if number == len(chain) else ["--exit-interval", "1"]
                    load = ["--load", str(root / f"{start}-chain")]
                    commands.append(command(start, "chain", layout, "--micro-batch-size", "2", *load, *stops))
            for some in _few(commands):
                train(some, size)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_losses_and_gradients_are_those_of_one_process(recorded: Path, case: tuple[Start, str]) -> None:
    """Fails where a family's biases, norms or wider heads, a tied head or an adapter are cut, summed or scaled
    wrongly at a layout."""
    start, layout = case
    worst = 0.0
    for one in cases():
        expected = read(
            recorded,
            start.stage,
            f"{start}-tp1",
            1,
            Case(one.hallucination_negatives, one.context, preference=one.preference),
        )
        found = read(recorded, start.stage, f"{start}-{layout}", layout_flags(layout)[0], one)
        assert found["num_micro_batches"] == one.micro_batches or one.tokens
        torch.testing.assert_close(found["losses"][:4], expected["losses"][:4], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["losses"][4:], expected["losses"][4:], rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            difference = float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
            assert difference <= 1e-4, (one.name(), name, difference)
            worst = max(worst, difference)
        assert all(norm == megatrons > 0 for norm, megatrons in found["norms"]), (one.name(), found["norms"])
    print(f"{start}-{layout}: gradients differ by {worst:.1e} at most")


@pytest.mark.parametrize("start", RESUMED, ids=str)
def test_a_run_that_changes_its_layout_after_every_step_is_the_whole_run(finished: Path, start: Start) -> None:
    """Fails where an optimiser's state or a weight of a family, or of an adapter, comes back cut in another way."""
    tags = ("lm loss", "contrastive loss i2t", "contrastive loss t2i", "temperature", "grad-norm", "learning-rate")
    assert_same_run(finished / f"{start}-whole", finished / f"{start}-chain", tags)


@pytest.mark.parametrize("case", ALONE, ids=lambda case: str(case[0]))
def test_the_reference_has_gradients_of_all_that_trains(recorded: Path, case: tuple[Start, str]) -> None:
    """Guards the tests above: none of what they compare is zero, down-projections of adapters least of all."""
    start, layout = case
    found = read(recorded, start.stage, f"{start}-{layout}", 1, REFERENCES[0])["gradients"]
    assert any(is_lora(name) for name in found) == start.lora
    assert [name for name, gradient in found.items() if not gradient.norm() > 1e-7] == []


def test_each_pair_of_choices_is_met() -> None:
    """Fails where a line of `SOME` goes that was the only one of its kind."""
    rows = [
        (start.family, start.tied, start.lora, start.stage, layout)
        for start, layouts in SOME.items()
        for layout in layouts
        if layout in LAYOUTS
    ]
    values = (tuple(FAMILIES), (False, True), (False, True), STAGES, LAYOUTS)
    for one, other in combinations(range(len(values)), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(values[one], values[other])), (one, other)
