"""What the assembled model promises beyond its numbers: dtypes, shapes without pairs or images, and freezing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hacl_megatron.batch import SegmentLengths
from tests.distributed import run_distributed
from tests.model.parity_batches import make_batches
from tests.model.parity_cases import Layout, Variant, build, load, run_schedule, wrap, write_reference

FROZEN = {
    "connector and heads": dict(language_model=True, vision_tower=True),
    "all but the vision tower": dict(language_model=False, vision_tower=True),
    "everything": dict(language_model=False, vision_tower=False),
}


def observe(folder: str) -> dict[str, Any]:
    """Runs of the tiny model on one CPU process; gradients as (name -> largest entry, or None without one)."""
    from hacl_megatron.platform.processes import start_platform

    device, weights = start_platform("cpu"), Path(folder) / "weights"
    mixed, text = make_batches()
    seen: dict[str, Any] = {"text only": {}, "mixed": {}}

    def gradients(module) -> dict[str, float | None]:
        return {
            name: None if p.grad is None else float(p.grad.abs().max())
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    for trains, frozen in FROZEN.items():
        module, architecture, groups = build(weights, Layout(), device)
        load(module, weights, architecture, Layout(), groups)
        module.freeze(**frozen)
        for name, batch in (("text only", text), ("mixed", mixed)):
            module.zero_grad()
            out = module(batch, SegmentLengths.of(batch))
            parts = (out.image_embeddings, out.caption_embeddings, out.hallucinated_embeddings)
            loss = out.logits.square().sum() + sum(part.sum() for part in parts) + out.temperature.sum()
            loss.backward()
            seen[name][trains] = gradients(module)
            shapes = {"logits": out.logits.shape, "parts": [tuple(part.shape) for part in parts]}
            seen[f"shapes, {name}"] = {**shapes, "temperature": tuple(out.temperature.shape)}
    norms = torch.cat([part.norm(dim=-1) for part in parts])
    seen["norms"] = norms.detach().tolist()

    module, architecture, groups = build(weights, Layout(), device, dtype=torch.bfloat16)
    load(module, weights, architecture, Layout(), groups)
    seen["bf16 dtypes"] = {name: p.dtype for name, p in module.named_parameters()}
    seen["bf16 temperature"] = module.heads.temperature.item()
    outputs = run_schedule(wrap(module, groups), [mixed, text])
    seen["bf16 output dtypes"] = {key: value.dtype for key, value in outputs[0].items()}
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    seen["bf16 error"] = {
        key: float((outputs[0][key][..., : value.shape[-1]].float() - value).norm() / value.norm())
        for key, value in expected[0].items()
    }
    seen["bf16 gradients"] = {
        name: (p.main_grad.dtype, bool(p.main_grad.isfinite().all()), float(p.main_grad.abs().max()))
        for name, p in module.named_parameters()
    }
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    write_reference(folder, Variant())
    return run_distributed(observe, 1, str(folder))[0]


@pytest.mark.parametrize("trains", FROZEN)
def test_text_alone_gives_every_trained_parameter_a_gradient(seen, trains):
    """Zero, not None: with overlapped reduction a parameter that stays silent would stop the run."""
    gradients = seen["text only"][trains]
    assert {name: g for name, g in gradients.items() if g is None} == {}
    silent = ("connector.", "heads.vision_projector", "heads.text_projector", "vision_tower.")
    for name, largest in gradients.items():
        if name.startswith(silent):
            assert largest == 0.0, name
        elif name.startswith("language_model."):
            assert largest > 0.0, name
    assert any(name.startswith("vision_tower.") for name in gradients) == (trains == "everything")


def silent_parameters(folders: list[str]) -> list[dict[str, float | None]]:
    """Gradients of models with parts of transformers, everything trained, for text alone."""
    from hacl_megatron.platform.processes import start_platform

    device, found = start_platform("cpu"), []
    for folder in folders:
        module, architecture, _ = build(Path(folder) / "weights", Layout(), device)
        text = make_batches(visual=architecture.visual_tokens)[1]
        output = module(text, SegmentLengths.of(text))
        output.logits.square().sum().backward()
        found.append(
            {
                name: None if p.grad is None else float(p.grad.abs().max())
                for name, p in module.named_parameters()
                if name.startswith(("vision_tower.", "connector."))
            }
        )
    return found


def test_text_alone_gives_the_parts_of_transformers_gradients(tmp_path):
    """As above: zero, not None."""
    folders = {family: tmp_path / family for family in ("blip2", "siglip")}
    for family, folder in folders.items():
        write_reference(folder, Variant(family=family))
    (found,) = run_distributed(silent_parameters, 1, [str(folder) for folder in folders.values()])
    for gradients in found:
        assert len(gradients) > 30 and set(gradients.values()) == {0.0}, gradients


@pytest.mark.parametrize("trains", FROZEN)
def test_frozen_parts_take_no_gradient_and_the_others_do(seen, trains):
    gradients = seen["mixed"][trains]
    assert all(largest for largest in gradients.values()), {n: g for n, g in gradients.items() if not g}
    parts = {name.split(".")[0] for name in gradients}
    expected = {"connector", "heads"}
    if not FROZEN[trains]["language_model"]:
        expected.add("language_model")
    if not FROZEN[trains]["vision_tower"]:
        expected.add("vision_tower")
    assert parts == expected


def test_shapes_with_and_without_pairs(seen):
    assert seen["shapes, text only"] == {"logits": (17, 384), "parts": [(0, 12)] * 3, "temperature": (1,)}
    assert seen["shapes, mixed"] == {"logits": (103, 384), "parts": [(2, 12), (2, 12), (1, 12)], "temperature": (1,)}


def test_embeddings_have_unit_length(seen):
    assert seen["norms"] == pytest.approx([1.0] * 5, abs=1e-6)


def test_bf16_leaves_the_temperature_in_fp32(seen):
    dtypes = seen["bf16 dtypes"]
    assert dtypes.pop("heads.temperature") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}, {n for n, d in dtypes.items() if d != torch.bfloat16}
    assert seen["bf16 temperature"] == pytest.approx(0.07, abs=1e-8), "0.07 is 0.0698 in bfloat16"


def test_bf16_outputs(seen):
    outputs = seen["bf16 output dtypes"]
    assert outputs.pop("logits") == torch.bfloat16
    assert set(outputs.values()) == {torch.float32}, "similarities and their softmax run in fp32"
    # 8 bits of mantissa through 4 layers; transformers in fp32 is the reference
    assert all(error < 0.05 for error in seen["bf16 error"].values()), seen["bf16 error"]
    assert all(error > 1e-4 for error in seen["bf16 error"].values()), "that was not bfloat16"


def test_bf16_gradients_are_collected_in_fp32(seen):
    for name, (dtype, finite, largest) in seen["bf16 gradients"].items():
        assert dtype == torch.float32 and finite and largest > 0, name
