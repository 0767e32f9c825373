"""Our adapters against `peft` on transformers' LLaVA, in fp32: logits, embeddings and gradients, at every layout."""

from typing import Any

import pytest

from hacl_megatron.config.lora import TARGETS
from tests.distributed import run_distributed
from tests.model.lora_cases import FULL_RECOMPUTE, LAYERS, Case, Variant, compare_all, write_reference
from tests.model.parity_cases import Layout
from tests.model.test_parity import EMBEDDINGS, GRADIENTS, LOGITS

VARIANTS = {
    "all": Variant(),
    "some": Variant(targets=("q_proj", "v_proj", "up_proj", "down_proj")),
    "text alone": Variant(text_alone=True),
}
ONE, TP2, TP2_SP = Layout(), Layout(tp=2), Layout(tp=2, sp=True)
CASES = [
    Case("all", ONE),
    Case("all", ONE, FULL_RECOMPUTE),
    Case("some", ONE),
    Case("text alone", ONE),
    Case("text alone", ONE, FULL_RECOMPUTE),
    Case("all", TP2),
    Case("all", TP2_SP),
    Case("all", Layout(pp=2, first=1)),
    Case("some", TP2_SP, FULL_RECOMPUTE),
    Case("text alone", Layout(pp=2), FULL_RECOMPUTE),
    Case("all", Layout(tp=2, pp=2, sp=True)),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """For every case what each rank found."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in VARIANTS}
    for name, folder in folders.items():
        write_reference(folder, VARIANTS[name])
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
