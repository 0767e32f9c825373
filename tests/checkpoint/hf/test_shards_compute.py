"""Shards do what transformers' modules do: the fused layouts checked by their results, not by the table that made them.

Each rank's part is computed as megatron-core reads the fused tensors (`SelfAttention.get_query_key_value_tensors`,
`MLP.forward`), partial results are summed over ranks, and compared with transformers' layer in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import write_tiny_llava

HEAD, QUERY_HEADS, GROUPS = 8, 6, 2


@pytest.fixture(scope="module", params=[1, 2])
def model_and_ranks(request, tmp_path_factory):
    source = write_tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")
    imported = import_everywhere(source, read_model_config(source), tp_size=request.param, dtype=torch.float64)
    ranks = [imported.modules[0, rank] for rank in range(request.param)]
    return LlavaForConditionalGeneration.from_pretrained(source).double().eval(), ranks


def rows(width: int) -> torch.Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def test_language_attention_heads_of_each_rank(model_and_ranks):
    model, ranks = model_and_ranks
    attention, x = model.model.language_model.layers[2].self_attn, rows(48)
    expected = [
        projection(x).reshape(5, -1, HEAD) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    found = ([], [], [])
    for rank in ranks:
        fused = F.linear(x, rank.language_model.decoder.layers.get_submodule("2").self_attention.linear_qkv.weight)
        groups = GROUPS // len(ranks)
        mixed = fused.view(5, groups, -1)  # megatron-core: [tokens, groups, (q heads + 2) * head]
        for part, tensor in zip(found, mixed.split([QUERY_HEADS // GROUPS * HEAD, HEAD, HEAD], dim=-1), strict=True):
            part.append(tensor.reshape(5, -1, HEAD))
    for part, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=1), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_language_output_projection_sums_over_ranks(model_and_ranks):
    model, ranks = model_and_ranks
    heads = rows(48)
    expected = model.model.language_model.layers[1].self_attn.o_proj(heads)
    parts = heads.chunk(len(ranks), dim=-1)
    layers = [rank.language_model.decoder.layers.get_submodule("1") for rank in ranks]
    found = sum(
        F.linear(part, layer.self_attention.linear_proj.weight) for part, layer in zip(parts, layers, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_language_mlp_sums_over_ranks(model_and_ranks):
    model, ranks = model_and_ranks
    x = rows(48)
    found = 0
    for rank in ranks:
        mlp = rank.language_model.decoder.layers.get_submodule("3").mlp
        gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
        found = found + F.linear(F.silu(gate) * up, mlp.linear_fc2.weight)
    torch.testing.assert_close(found, model.model.language_model.layers[3].mlp(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_vision_layer_sums_over_ranks(model_and_ranks):
    model, ranks = model_and_ranks
    layer, x = model.model.vision_tower.encoder.layers[1], rows(32)
    mlp, heads = 0, ([], [], [])
    for rank in ranks:
        ours = rank.vision_tower.decoder.layers.get_submodule("1")
        hidden = F.linear(x, ours.mlp.linear_fc1.weight, ours.mlp.linear_fc1.bias)
        mlp = mlp + F.linear(hidden * torch.sigmoid(1.702 * hidden), ours.mlp.linear_fc2.weight)
        qkv = ours.self_attention.linear_qkv
        mixed = F.linear(x, qkv.weight, qkv.bias).view(5, 4 // len(ranks), 24)
        for part, tensor in zip(heads, mixed.split([8, 8, 8], dim=-1), strict=True):
            part.append(tensor)
    torch.testing.assert_close(mlp + ours.mlp.linear_fc2.bias, layer.mlp(x), rtol=0, atol=1e-12)
    attention = layer.self_attn
    for part, projection in zip(heads, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
        torch.testing.assert_close(torch.cat(part, dim=1).flatten(1), projection(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_vision_embeddings_and_connector(model_and_ranks):
    model, ranks = model_and_ranks
    tower, ours = model.model.vision_tower, ranks[-1].vision_tower
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    patches = F.conv2d(pixels, ours.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    embedded = torch.cat([ours.class_token.expand(2, 1, 32), patches], dim=1) + ours.position_embeddings.weight
    normed = F.layer_norm(embedded, (32,), ours.ln_pre.weight, ours.ln_pre.bias)
    torch.testing.assert_close(normed, tower.pre_layrnorm(tower.embeddings(pixels)), rtol=0, atol=1e-12)

    first, second = (ranks[-1].connector.get_submodule(index) for index in ("0", "2"))
    found = F.linear(F.gelu(F.linear(normed, first.weight, first.bias)), second.weight, second.bias)
    torch.testing.assert_close(found, model.model.multi_modal_projector(normed), rtol=0, atol=1e-12)


@torch.no_grad()
def test_vocabulary_of_each_rank(model_and_ranks):
    model, ranks = model_and_ranks
    logits = torch.cat([F.linear(rows(48), rank.language_model.output_layer.weight) for rank in ranks], dim=-1)
    torch.testing.assert_close(logits[:, :331], model.lm_head(rows(48)), rtol=0, atol=1e-12)
    assert logits.shape[1] == 336 and (logits[:, 331:] == 0).all()
