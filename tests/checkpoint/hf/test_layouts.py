"""Models with parts of transformers: converted once, loaded, computed with and saved again at every layout."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from tests.checkpoint.convert.layout_cases import agreements, load_compute_save_all
from tests.checkpoint.hf import test_blip2
from tests.checkpoint.hf.round_trip_files import assert_same, load_exactly
from tests.distributed import run_distributed
from tests.model.parity_cases import Layout, Variant, write_reference
from tests.tool_runs import to_hf, to_megatron

VARIANTS = {"blip2": Variant(family="blip2"), "siglip": Variant(family="siglip")}
CASES = [("blip2", Layout()), ("blip2", Layout(tp=2)), ("blip2", Layout(pp=2)), ("siglip", Layout(tp=2, sp=True))]
LOAD = {"blip2": test_blip2.load_exactly, "siglip": load_exactly}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(model, layout) -> the folder of its reference, the checkpoint that was saved there, differences on each rank."""
    root = tmp_path_factory.mktemp("layouts")
    for name, variant in VARIANTS.items():
        write_reference(root / name, variant)
        to_megatron(root / name / "weights", root / name / "converted")
    found = {}
    for size in (1, 2):
        cases = [case for case in CASES if case[1].world_size == size]
        jobs = [(root / name, root / name / "converted", root / name / str(layout), layout) for name, layout in cases]
        ranks = run_distributed(load_compute_save_all, size, jobs)
        for position, (reference, _, save, layout) in enumerate(jobs):
            found[reference.name, layout] = (reference, save, [rank[position] for rank in ranks])
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_at_this_layout_it_computes_what_transformers_does(results, case):
    """Logits and the heads' embeddings at EOS; every value of every rank had to be loaded, for they were NaN."""
    differences = results[case][2]
    merged = {key: max(rank.get(key, 0.0) for rank in differences) for rank in differences for key in rank}
    assert {key.partition(" ")[0] for key in merged} == {"logits", "image", "caption", "hallucinated"}
    assert all(value <= 2e-4 for value in merged.values()), merged


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_at_this_layout_it_exports_bitwise(results, tmp_path, case):
    reference, save, _ = results[case]
    out, load = to_hf(save, tmp_path / "out"), LOAD[case[0]]
    assert_same(load(out).state_dict(), load(reference / "weights").state_dict())
    assert_same(load_file(out / HEADS_FILE), load_file(reference / "weights" / HEADS_FILE))


def test_verify_tells_right_from_wrong(results, tmp_path):
    reference = results["blip2", Layout()][0]
    other = test_blip2.write_tiny_blip2(tmp_path / "other", seed=0)
    change = "vision_model.encoder.layers.1.self_attn.qkv.weight"
    test_blip2.edit_tensors(other, lambda tensors: tensors[change][:8].mul_(1.5))
    jobs: list[tuple[Path, Path, bool]] = [
        (reference / "converted", reference / "weights", False),
        (reference / "converted", reference / "weights", True),
        (results["siglip", CASES[-1][1]][0] / "converted", results["siglip", CASES[-1][1]][0] / "weights", True),
        (reference / "converted", other, False),
    ]
    ((right, by_tensors, siglip, wrong),) = run_distributed(agreements, 1, jobs)
    assert right[0] and by_tensors[0] and siglip[0], (right, by_tensors, siglip)
    assert not wrong[0] and wrong[1] > 1e-3
