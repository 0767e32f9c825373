"""Losses and every gradient of a global batch are the same at any layout and cut into any micro-batches.

The reference is one process with one micro-batch. `HACL_FULL_INVARIANCE=1` runs every combination.
"""

import os
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.selection import selected
from tests.tiny_data import swap_twins
from tests.training.gradient_cases import SAMPLES, Case, peaks, read, record
from tests.training.runs import layout_flags, make_inputs

LAYOUTS = (
    "tp1", "dp2", "tp2", "tp2-sp", "pp2-first1", "tp2-pp2-sp", "pp2-dp2", "cp2", "cp4", "cp2-tp2-sp", "cp2-pp2-first1",
    "cp2-dp2", "tp2-share", "tp2-sp-share", "tp2-pp2-share",
)  # fmt: skip
STAGES = ("pretrain", "finetune")
FULL = bool(os.environ.get("HACL_FULL_INVARIANCE"))
OBJECTIVES = (
    list(product(("own", "all", "none"), ("image", "prompt"))) if FULL else [("all", "prompt"), ("own", "image")]
)


def cases(layout: str) -> list[Case]:
    if "share" in layout and not FULL:
        # Features of images kept for a second pass and made at once, an image a micro-batch, or none; crops.
        found = [Case("all", "prompt", micro_batches=SAMPLES if layout == "tp2-share" else 4)]
        return [*found, Case("own", "image", preference="mdpo", micro_batches=1)]
    if "cp" in layout and not FULL:
        # Whatever ranks make of their own rows: pairs cached and at once, branches, read rows, twins (mdpo's crops and
        # branches), texts ahead (pretrain). Captions of a few rows are shorter than four ranks' eight pieces.
        found = [Case("own", "image", preference="mdpo", micro_batches=4 if layout == "cp4" else 1)]
        return [
            *found,
            Case("all", "prompt", micro_batches=4),
            *[Case("all", "prompt", tokens=700)] * (layout == "cp2"),
        ]
    counts = (1, 4, 8, 16) if layout == "tp1" else (1, 4)
    found = [Case(*objective, micro_batches=n) for objective in OBJECTIVES for n in counts]
    if layout != "tp1" and not FULL:  # each objective once, and each number; how it is cut, tp1 has of all
        found = [Case(*objective, micro_batches=n) for objective, n in zip(OBJECTIVES, (4, 1), strict=True)]
    # By tokens: an odd number of micro-batches of uneven sizes. And the queue, still empty, changes nothing.
    # Without hallucinated negatives those embeddings get no gradient.
    found += [Case("none", "prompt", micro_batches=n) for n in (counts[:2] if layout == "tp1" or FULL else (4,))]
    found += [Case("own", "image", micro_batches=n, preference="phrase") for n in (1, 4)]
    cuts = (1, 4) if layout == "tp1" else (4,)
    found += [Case("own", "image", micro_batches=n, preference=loss) for n in cuts for loss in ("dpo", "mdpo")]
    found += [Case("own", "image", preference="phrase", separate=True)] if layout in ("tp1", "tp2-pp2-sp") else []
    return [*found, Case("all", "prompt", tokens=700), Case("all", "prompt", "queue", micro_batches=4)]


def record_all(folder: str, layouts: list[str], stages: list[str]) -> None:
    for layout, stage in product(layouts, stages):
        _, flags = layout_flags(layout, samples=SAMPLES)
        record(folder, layout, [*flags, "--global-batch-size", str(SAMPLES)], stage, cases(layout))


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case at the selected layouts and stages, in one group of processes per world size."""
    folder = make_inputs(tmp_path_factory.mktemp("gradients"))
    swap_twins(folder / "data")
    by_size: dict[int, list[str]] = {}
    for layout in {"tp1", *selected(request, "layout", LAYOUTS)}:
        by_size.setdefault(layout_flags(layout)[0], []).append(layout)
    for size, layouts in by_size.items():
        run_distributed(record_all, size, str(folder), layouts, selected(request, "stage", STAGES))
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_one_process_and_one_micro_batch(
    recorded: Path, layout: str, stage: str
) -> None:
    ranks = layout_flags(layout)[0]
    for case in cases(layout):
        objective = (case.hallucination_negatives, case.context)
        expected = read(recorded, stage, "tp1", 1, Case(*objective, preference=case.preference))
        found = read(recorded, stage, layout, ranks, case)
        assert found["num_micro_batches"] == case.micro_batches or case.tokens
        # A preference's margin is a small difference of sums over answers.
        torch.testing.assert_close(found["losses"][:4], expected["losses"][:4], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["losses"][4:], expected["losses"][4:], rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            difference = float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
            assert difference <= 1e-4, (case.name(), name, difference)
        assert all(norm == megatrons > 0 for norm, megatrons in found["norms"]), (case.name(), found["norms"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_tells_objectives_apart(recorded: Path, stage: str) -> None:
    """Guards the test above: what it compares is not all zeros, and each objective has gradients of its own."""
    alone, beside = (read(recorded, stage, "tp1", 1, Case("own", "image", preference=p)) for p in ("none", "phrase"))
    assert beside["losses"][3] > 0.05
    gradients = [found["gradients"]["connector.0.weight"] for found in (alone, beside)]
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()
    one, other = (read(recorded, stage, "tp1", 1, Case(*objective)) for objective in OBJECTIVES[:2])
    for name in ("connector.0.weight", "heads.vision_projector.weight", "heads.temperature"):
        gradients = [found["gradients"][name] for found in (one, other)]
        assert all(gradient.abs().max() > 1e-6 for gradient in gradients), name
        assert not torch.allclose(*gradients, rtol=1e-3), name
    assert read(recorded, stage, "tp1", 1, Case("all", "prompt", tokens=700))["num_micro_batches"] > 1


@pytest.mark.parametrize("stage", STAGES)
def test_memory_does_not_grow_with_the_micro_batches(recorded: Path, stage: str) -> None:
    """Beyond embeddings and kept tower features: 4 more micro-batches take less than a tenth of what one takes."""
    (found,) = run_distributed(peaks, 1, str(recorded), stage, [2, 6], 4)
    assert found[6] - found[2] < 0.1 * found[2], found
