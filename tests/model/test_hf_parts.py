"""Vision towers and Q-Former as this package builds them against the whole models of transformers, fp32 on the CPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.model.hf_parts import HFVisionTower, QFormerConnector
from hacl_megatron.model.init import cpu_generator
from tests.model.hf_architecture import architecture
from tests.tiny import randomise, tiny_blip2_config, tiny_dinov2_config, tiny_llava_config, tiny_siglip_config

# Sums in another order: transformers records hidden states, we stop at the layer. 1e-5 of values of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ODD = {"hidden_size": 35, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 51, "patch_size": 7}
TOWERS = {
    "clip": (CLIPVisionModel, tiny_llava_config().vision_config, (-2, -1, 1)),
    "siglip": (SiglipVisionModel, tiny_siglip_config(), (-2, -1, 3)),
    "blip2": (Blip2VisionModel, tiny_blip2_config().vision_config, (-1,)),
    "dinov2": (Dinov2Model, tiny_dinov2_config(), (-2, -1, 1)),
    "dinov2 swiglu": (Dinov2Model, tiny_dinov2_config(swiglu=True), (-2,)),
    "registers": (Dinov2WithRegistersModel, tiny_dinov2_config(registers=3), (-2, -1)),
    "odd siglip": (SiglipVisionModel, SiglipVisionConfig(**ODD, intermediate_size=37), (-2,)),
    "odd dinov2": (Dinov2Model, Dinov2Config(**ODD, mlp_ratio=3), (-2,)),
    "odd dinov2 swiglu": (Dinov2Model, Dinov2Config(**ODD, mlp_ratio=3, use_swiglu_ffn=True, qkv_bias=False), (-2,)),
}
OTHER_SIZES = {"dinov2": 50, "registers": 50}
"""Pixels that positions are interpolated to."""
CASES = [(name, layer) for name, (_, _, layers) in TOWERS.items() for layer in layers]


def model_of(name: str, select_layer: int) -> ModelConfig:
    config = tiny_blip2_config() if name == "blip2" else tiny_llava_config()
    config.vision_config = TOWERS[name][1]
    model = replace(architecture(config), vision_select_layer=select_layer)
    size = OTHER_SIZES.get(name, model.vision.image_size)
    return replace(model, vision=replace(model.vision, image_size=size))


def pixels(size: int, images: int = 3) -> torch.Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def copy_by_name(source: nn.Module, target: nn.Module) -> None:
    """Every parameter of `target` out of `source`, which may have more."""
    state = source.state_dict()
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    target.load_state_dict({name: state[name] for name in target.state_dict()})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "select_layer"), CASES)
def test_features_and_gradients_are_those_of_transformers(name, select_layer, recompute):
    """With `recompute` each layer's norms run twice."""
    model_class, config, _ = TOWERS[name]
    theirs = model_class(config).eval()
    randomise(theirs, 3)
    model = model_of(name, select_layer)
    ours = HFVisionTower(model, seed=1, dtype=torch.float32, recompute=recompute).train()
    copy_by_name(theirs, ours.model)
    calls = Counter()
    for place, module in ours.named_modules():
        if ".layer" in place and isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda *_, place=place: calls.update([place]))
    images = pixels(model.vision.image_size)
    output = theirs(pixel_values=images, output_hidden_states=True)
    expected = {  # LLaVA's `full` strategy; BLIP-2's image_embeds; LLaVA's `default`
        "siglip": lambda: output.hidden_states[select_layer],
        "odd siglip": lambda: output.hidden_states[select_layer],
        "blip2": lambda: output.last_hidden_state,
    }.get(name, lambda: output.hidden_states[select_layer][:, 1:])()
    found = ours(images)
    assert found.shape == (3, model.vision.num_features, model.vision.hidden_size)
    torch.testing.assert_close(found, expected, **TOLERANCE)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert set(calls.values()) == {1 + recompute}
    gradients = {key.removeprefix("vision_model."): p.grad for key, p in theirs.named_parameters()}
    assert len(list(ours.parameters())) > 10
    for key, parameter in ours.model.named_parameters():
        assert parameter.grad is not None, f"{key}: overlapped reduction would wait for it"
        largest = gradients[key].abs().max().clamp_min(1e-3)  # a key's bias shifts all scores: rounding alone
        assert (parameter.grad - gradients[key]).abs().max() <= 1e-5 * largest + 1e-6, key
    unbuilt = {key for key, grad in gradients.items() if grad is None or not grad.abs().any()}
    assert unbuilt.isdisjoint(key for key, _ in ours.model.named_parameters()), "what no feature passes through"


def blip2() -> tuple[Blip2ForConditionalGeneration, ModelConfig]:
    config = tiny_blip2_config()
    theirs = Blip2ForConditionalGeneration(config).eval()
    randomise(theirs, 4)
    return theirs, architecture(config)


def connector_of(theirs: Blip2ForConditionalGeneration, model: ModelConfig) -> QFormerConnector:
    ours = QFormerConnector(
        model.qformer, model.language.hidden_size, seed=1, generator=cpu_generator(2), dtype=torch.float32
    )
    copy_by_name(theirs.qformer, ours.qformer)
    copy_by_name(theirs.language_projection, ours.projection)
    with torch.no_grad():
        ours.query_tokens.copy_(theirs.query_tokens)
    return ours


def test_projected_queries_are_those_of_blip2():
    """In train mode: 0.1 of dropout in the Q-Former's configuration must not act."""
    theirs, model = blip2()
    assert model.qformer.hf["hidden_dropout_prob"] == 0.1
    tower = HFVisionTower(model, seed=1, dtype=torch.float32).train()
    copy_by_name(theirs.vision_model, tower.model)
    ours = connector_of(theirs, model).train()
    images = pixels(48)
    expected = theirs.get_image_features(images, return_dict=True).pooler_output
    features = tower(images)
    found = ours(features)
    assert found.shape == (3, model.visual_tokens, model.language.hidden_size)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(ours(ours.query_states(features), from_queries=True), found, rtol=0, atol=0)
    changed = features.clone()
    changed[:, 0] += 1
    assert not torch.allclose(ours(changed), found), "queries attend to the class token too"


def test_freezing_leaves_the_projection():
    theirs, model = blip2()
    connector = connector_of(theirs, model)
    assert connector.qformer_is_trained
    connector.freeze_qformer()
    trained = [name for name, parameter in connector.named_parameters() if parameter.requires_grad]
    assert trained == ["projection.weight", "projection.bias"] and not connector.qformer_is_trained


def test_initial_values_come_from_the_seed_alone():
    model = model_of("blip2", -1)

    def build(seed: int) -> dict[str, torch.Tensor]:
        tower = HFVisionTower(model, seed=seed, dtype=torch.float32)
        connector = QFormerConnector(model.qformer, 48, seed=seed, generator=cpu_generator(seed), dtype=torch.float32)
        return {**tower.state_dict(), **connector.state_dict()}

    torch.manual_seed(1)
    first = build(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = build(5), build(6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    matrices = [name for name, value in first.items() if value.dim() > 1]
    assert len(matrices) > 20 and not any(torch.equal(first[name], other[name]) for name in matrices)
    queries = first["query_tokens"][0]
    assert queries.std() == pytest.approx(0.02, rel=0.2) and len(queries.unique(dim=0)) == len(queries)


def test_bf16_is_that_of_transformers():
    theirs, model = blip2()
    tower = HFVisionTower(model, seed=1, dtype=torch.bfloat16)
    connector = connector_of(theirs, model).bfloat16()
    copy_by_name(theirs.vision_model, tower.model)
    assert {p.dtype for p in (*tower.parameters(), *connector.parameters())} == {torch.bfloat16}
    found = connector(tower(pixels(48)))
    expected = theirs.get_image_features(pixels(48), return_dict=True).pooler_output
    assert found.dtype == torch.bfloat16
    error = float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())
    assert 1e-4 < error < 0.05, error  # 8 bits of mantissa through 6 layers
