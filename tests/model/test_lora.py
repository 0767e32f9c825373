"""Our adapters against `peft` on transformers' LLaVA, in fp32: logits, embeddings and gradients, at every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hacl_megatron.config.lora import TARGETS
from tests.distributed import run_distributed
from tests.model.lora_cases import (
    FULL_RECOMPUTE,
    LAYERS,
    Case,
    Variant,
    compare_all,
    cut,
    gradients_under_dropout,
    write_reference,
)
from tests.model.parity_cases import Layout
from tests.model.test_parity import EMBEDDINGS, GRADIENTS, LOGITS
from tests.tiny import FAMILY_SIZES

VARIANTS = {
    "all": Variant(),
    "some": Variant(targets=("q_proj", "v_proj", "up_proj", "down_proj")),
    "text alone": Variant(text_alone=True),
    "qwen2": Variant(sizes=FAMILY_SIZES["qwen2"]),
    "qwen3": Variant(sizes=FAMILY_SIZES["qwen3"]),
}
ONE, TP2, TP2_SP = Layout(), Layout(tp=2), Layout(tp=2, sp=True)
CASES = [
    Case("all", ONE),
    Case("all", ONE, FULL_RECOMPUTE),
    Case("some", ONE),
    Case("text alone", ONE, FULL_RECOMPUTE),
    Case("qwen2", ONE),
    Case("qwen2", TP2_SP),
    Case("qwen3", TP2),
    Case("qwen3", Layout(pp=2)),
    Case("all", TP2),
    Case("all", TP2_SP),
    Case("all", Layout(pp=2, first=1)),
    Case("some", TP2_SP, FULL_RECOMPUTE),
    Case("text alone", Layout(pp=2), FULL_RECOMPUTE),
    Case("all", Layout(tp=2, pp=2, sp=True)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The references."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in VARIANTS}
    for name, folder in folders.items():
        write_reference(folder, VARIANTS[name])
    return folders


@pytest.fixture(scope="module")
def results(folders) -> dict[str, list[dict[str, Any]]]:
    """For every case what each rank found."""
    found = {}
    for world_size in sorted({case.layout.world_size for case in CASES}):
        cases = [case for case in CASES if case.layout.world_size == world_size]
        jobs = [(str(folders[case.variant]), case, VARIANTS[case.variant]) for case in cases]
        ranks = run_distributed(compare_all, world_size, jobs)
        found.update({str(case): [rank[index] for rank in ranks] for index, case in enumerate(cases)})
    return found


def pytest_generate_tests(metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)


def test_outputs_are_those_of_peft(results, case):
    compared = [rank["outputs"] for rank in results[str(case)] if rank["outputs"]]
    assert len(compared) == case.layout.tp, "every tensor-parallel rank of the last stage has outputs"
    for outputs in compared:
        for name, difference in outputs.items():
            assert difference <= (LOGITS if name.startswith("logits") else EMBEDDINGS), (name, difference)


def test_gradients_are_those_of_peft(results, case):
    """Every adapter of every rank, connector and heads; and nothing else of the language model trains."""
    for rank, found in enumerate(results[str(case)]):
        worst = max(found["gradients"], key=found["gradients"].get)
        assert found["gradients"][worst] <= GRADIENTS, (rank, worst, found["gradients"][worst])
        assert found["others in training"] == []
    total = sum(found["adapters"] for found in results[str(case)])
    assert total == 2 * LAYERS * len(VARIANTS[case.variant].targets) * case.layout.tp
    assert VARIANTS["all"].targets == TARGETS and len(TARGETS) == 7


def test_dropout_keeps_replicas_equal_and_is_drawn_again_in_recomputation(folders):
    """Tensor-parallel ranks must drop the same of what they hold alike, or their replicas would drift apart."""
    cases = [Case("all", layout, transformer) for layout in (TP2, TP2_SP) for transformer in ({}, FULL_RECOMPUTE)]
    one, other = run_distributed(gradients_under_dropout, 2, str(folders["all"]), cases)
    expected = torch.load(folders["all"] / "expected.pt", weights_only=True)["gradients"]
    replicated = [key for key, whole in expected.items() if cut(key, whole, 0, 2).shape == whole.shape]
    assert len(replicated) == 7 * LAYERS
    for case, first, second in zip(cases, one, other, strict=True):
        for key in replicated:
            assert torch.equal(first[key], second[key]), (str(case), key)
    for rank in (one, other):
        for plain, recomputed in ((rank[0], rank[1]), (rank[2], rank[3])):
            for key, gradient in plain.items():
                torch.testing.assert_close(
                    recomputed[key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
                )
                assert (
                    gradient - cut(key, expected[key], int(rank is other), 2)
                ).abs().max() > 1e-2 * gradient.abs().max()
