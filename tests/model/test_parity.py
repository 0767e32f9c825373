"""The model against transformers' LLaVAs and BLIP-2, in fp32: logits, embeddings and gradients, at every layout."""

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.model.parity_cases import Layout, Variant, compare_all, write_reference
from tests.selection import selected
from tests.tiny import FAMILY_SIZES, LLAMA3_ROPE_SCALING

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS = {
    "plain": Variant(),
    "llama3 rope": Variant({"rope_scaling": LLAMA3_ROPE_SCALING}),
    "tied": Variant({"tie": True}),
    "yarn": Variant({"rope_scaling": YARN}),
    **{name: Variant(sizes) for name, sizes in FAMILY_SIZES.items()},
    "last vision layer": Variant({"select_layer": -1}, trains_vision=True),
    "odd clip": Variant({"vision_hidden": 21, "vision_heads": 3}, trains_vision=True),
    "siglip": Variant(trains_vision=True, family="siglip"),
    "dinov2": Variant(trains_vision=True, family="dinov2"),
    "registers": Variant({"registers": 3, "swiglu": True}, trains_vision=True, family="dinov2"),
    "blip2": Variant(family="blip2"),
    "blip2 trained": Variant(trains_vision=True, family="blip2", trains_qformer=True),
    "next": Variant(trains_vision=True, family="next"),
    "next mistral": Variant({"family": "mistral", "head_dim": 12}, family="next"),
    "next qwen2": Variant({"family": "qwen2"}, family="next"),
    "onevision": Variant(trains_vision=True, family="onevision"),
    "onevision tied": Variant({"tie": True}, family="onevision"),
}
ONE = Layout()
TP2, TP2_SP, PP2 = Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2, first=1)
SHARE, SHARE_SP = Layout(tp=2, shares=True), Layout(tp=2, sp=True, shares=True)
TP2_PP2, TP2_SP_PP2 = Layout(tp=2, pp=2, first=1), Layout(tp=2, pp=2, sp=True)
CASES = [
    *[(variant, ONE) for variant in VARIANTS],
    *[("plain", layout) for layout in (TP2, TP2_SP, PP2, TP2_PP2)],
    *[("tied", layout) for layout in (TP2_SP, PP2, TP2_SP_PP2)],
    ("last vision layer", TP2_SP),
    ("last vision layer", PP2),
    *[("last vision layer", layout) for layout in (SHARE, SHARE_SP)],
    ("plain", SHARE_SP),
    ("llama3 rope", TP2_PP2),
    *[(variant, layout) for variant in ("blip2", "blip2 trained") for layout in (TP2, TP2_SP, PP2)],
    *[(tower, TP2_SP) for tower in ("siglip", "dinov2")],
    *[("next", layout) for layout in (TP2, TP2_SP, PP2)],
    *[("onevision tied", layout) for layout in (TP2, TP2_SP, PP2)],
    *[("registers", layout) for layout in (TP2, PP2)],
    *[(family, layout) for family in ("qwen2", "qwen3") for layout in (TP2, TP2_SP, PP2)],
    *[(family, TP2_SP_PP2) for family in ("qwen2", "qwen3")],
]
# Measured with both in fp32, over all cases: 1e-5 for logits, 5e-7 for unit vectors, 2e-6 for gradients. transformers
# runs each segment alone, and tensor parallelism sums in other blocks.
LOGITS, EMBEDDINGS = 1e-4, 5e-6
GRADIENTS = 2e-5  # of each tensor's largest entry


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[tuple[str, Layout], list[dict[str, Any]]]:
    """For every selected case what each rank found."""
    wanted = selected(request, "case", CASES)
    folders = {
        name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in dict.fromkeys(name for name, _ in wanted)
    }
    for name, folder in folders.items():
        write_reference(folder, VARIANTS[name])
    found = {}
    for world_size in sorted({layout.world_size for _, layout in wanted}):
        cases = [case for case in wanted if case[1].world_size == world_size]
        jobs = [(str(folders[name]), layout) for name, layout in cases]
        ranks = run_distributed(compare_all, world_size, jobs)
        found.update({case: [rank[index] for rank in ranks] for index, case in enumerate(cases)})
    return found


def pytest_generate_tests(metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[f"{name}, {layout}" for name, layout in CASES])


def test_logits_and_embeddings_are_those_of_transformers(results, case):
    compared = [rank["outputs"] for rank in results[case] if rank["outputs"]]
    assert len(compared) == case[1].tp, "every tensor-parallel rank of the last stage has outputs"
    for outputs in compared:
        assert set(outputs) == {"logits 0", "image 0", "caption 0", "hallucinated 0", "logits 1"}
        assert all(outputs[key] <= LOGITS for key in ("logits 0", "logits 1")), outputs
        assert all(outputs[key] <= EMBEDDINGS for key in ("image 0", "caption 0", "hallucinated 0")), outputs


def test_gradients_are_those_of_transformers(results, case):
    """Connector, LLaMA, heads and (where it is trained) the vision tower, every parameter of every rank."""
    for rank, found in enumerate(results[case]):
        worst = max(found["gradients"], key=found["gradients"].get)
        assert found["gradients"][worst] <= GRADIENTS, (rank, worst, found["gradients"][worst])
    names = {name for found in results[case] for name in found["gradients"]}
    assert any(name.startswith("connector.") for name in names)
    with_newline = VARIANTS[case[0]].family in ("next", "onevision")
    assert any(name.startswith("connector.image_newline ") for name in names) == with_newline
    assert any(name.startswith("connector.qformer.") for name in names) == VARIANTS[case[0]].trains_qformer
    assert any(name.startswith("heads.temperature") for name in names)
    assert any(name.startswith("vision_tower.") for name in names) == VARIANTS[case[0]].trains_vision
    layers = {name for name in names if name.startswith("language_model.") and ".linear_qkv.weight" in name}
    assert len(layers) == 4, layers


def test_stages_hold_the_layers_they_were_given(results, case):
    layout = case[1]
    first = layout.first or 4 // layout.pp
    stages = [first] if layout.pp == 1 else [first, 4 - first]
    # megatron-core numbers ranks tensor-parallel first
    assert [found["layers"] for found in results[case]] == [layers for layers in stages for _ in range(layout.tp)]


def test_no_gradient_is_compared_with_nothing(results, case):
    """A gradient that is zero in transformers would hide a missing one here."""
    for found in results[case]:
        assert found["zero in transformers"] == []


def test_replicas_stay_bitwise_equal(results, case):
    """Connector, heads and towers of transformers are never reduced over tensor-parallel ranks: their gradients must
    not differ by a bit."""
    for name in {name for found in results[case] for name in found["replicated"]}:
        copies = [found["replicated"][name] for found in results[case] if name in found["replicated"]]
        assert len(copies) == case[1].tp and len(set(copies)) == 1, name


def test_initial_values_do_not_depend_on_the_layout(results):
    """Connector and heads of one seed, in every layout and on every rank."""
    parts = {name.split(".")[0] for name in results["plain", ONE][0]["initial"]}
    assert parts == {"connector", "heads"}
    assert {name.split(".")[0] for name in results["siglip", ONE][0]["initial"]} == {*parts, "vision_tower"}
    for case, ranks in results.items():
        expected = results[case[0], ONE][0]["initial"]
        values: dict[str, bytes] = {}
        for found in ranks:
            for name, value in found["initial"].items():
                assert expected[name] == value, (case, name)
            values.update(found["initial"])
        assert set(values) == set(expected), case
