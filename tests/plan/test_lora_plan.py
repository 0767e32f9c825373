"""The plan and the dry run with LoRA: every parameter and byte of state as built, activations near what is kept."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.plan.example_plans import EXAMPLES
from tests.plan.plan_cases import activations_on_this_rank, state_on_this_rank
from tests.plan.test_dry_run import apart, outputs
from tests.plan.test_plan import command
from tests.training.runs import make_inputs

LORA = ["--lora-rank", "6"]
SOME = [*LORA, "--lora-target-modules", "q_proj", "up_proj", "o_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("plan"), samples=4)


def test_parameters_and_state_are_exact(folder: Path) -> None:
    runs = [
        ("pretrain", "tp2-sp-dist", [*LORA, "--bf16"]), ("finetune", "pp2-first1", SOME), ("finetune", "dp2-dist", LORA)
    ]  # fmt: skip
    ranks = run_distributed(state_on_this_rank, 2, [command(folder, *run[:2], *run[2]) for run in runs])
    for number, run in enumerate(runs):
        for found in (rank[number] for rank in ranks):
            assert found["planned parameters"] == found["parameters"], run
            assert found["planned"] == found["state"], run
    trained = {name: is_trained for name, _, is_trained, _ in ranks[0][1]["parameters"]}
    assert trained["language_model.decoder.layers.0.mlp.linear_fc1_lora.up_proj_B"]
    assert not trained["language_model.decoder.layers.0.mlp.linear_fc1.weight"]


def test_activations_are_near_what_autograd_keeps(folder: Path) -> None:
    cases = [
        (command(folder, stage, "tp2-sp", *extra), recompute, "pairs", 1)
        for stage, extra in (("finetune", LORA), ("finetune", [*SOME, "--bf16"]), ("pretrain", LORA))
        for recompute in ("none", "full", "mlp")
    ]
    for rank in run_distributed(activations_on_this_rank, 2, cases):
        for case, found in zip(cases, rank, strict=True):
            assert found["planned"] == pytest.approx(found["kept"], rel=0.05), case


def test_dry_run_counts_adapters(tmp_path: Path) -> None:
    """7B at rank 8: 8 x (in + out) of every matrix: 4 of 4096 x 4096 and 3 of 4096 x 11008, in 32 layers."""
    each = 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 32
    files = [
        ["--config", str(EXAMPLES / f"{name}.yaml"), "--world-size", "8"] for name in ("pretrain_7b", "finetune_7b")
    ]
    printed = apart(outputs, [[*file, "--lora-rank", "8"] for file in files])
    for text in printed:
        assert f"{each:,}" in text and "would train: connector, LoRA, heads" in text, text
