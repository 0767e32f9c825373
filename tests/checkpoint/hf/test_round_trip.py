"""Hugging Face -> our shards -> Hugging Face: bitwise for every tensor, both layouts, whatever the parallel sizes."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, open_sources
from tests.checkpoint.hf.round_trip_files import (
    HIDDEN,
    LAYOUTS,
    MODELS,
    all_tensors,
    assert_same,
    carried_of,
    load_exactly,
    write_heads,
)
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import (
    LLAMA3_ROPE_SCALING,
    write_tiny_llava,
)

# ------------------------------------------------------------------------------------------------------------ HF layout


@pytest.mark.parametrize("tp_size, stages", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_hf_layout_round_trip_is_bitwise(tmp_path, model, tp_size, stages):
    source = write_tiny_llava(tmp_path / "in", **MODELS[model])
    heads = write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    assert not any(report.fresh for report in imported.reports.values())
    assert not any(torch.isnan(value).any() for value in imported.merged.values())

    out = tmp_path / "out"
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, carried=carried_of(source, config))

    before, after = load_exactly(source), load_exactly(out)
    assert_same(after.state_dict(), before.state_dict())
    assert_same(load_file(out / HEADS_FILE), heads)
    assert read_model_config(out) == config
    for part in ("text_config", "vision_config"):
        found, expected = (getattr(m.config, part).to_dict() for m in (after, before))
        differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
        # Names only: what transformers derives or records about the file itself.
        assert differing <= {"dtype", "_name_or_path", "architectures"}, differing
    assert after.generation_config.to_dict() == before.generation_config.to_dict()


def test_every_tensor_of_the_file_is_used_or_ignored_with_a_reason(tmp_path):
    source = write_tiny_llava(tmp_path / "in")
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    report = imported.reports[0, 0]
    in_file = set(safe_open(source / "model.safetensors", "pt").keys())
    ignored = set(report.ignored)
    assert ignored == {name for name in in_file if "encoder.layers.3." in name or "post_layernorm" in name}
    assert all(report.ignored.values())
    sources = open_sources(source, config)
    assert {name for _, name in sources.found.values()} == in_file
    assert report.fresh == [name for name in report.fresh if name.startswith("heads.")] and len(report.fresh) == 5
    assert "heads.vision_projector.weight" in report.summary()


def test_exported_folder_computes_what_the_source_did(tmp_path):
    """Logits on image and text, through the exported processor: config, weights, tokenizer and processor at once."""
    source = write_tiny_llava(tmp_path / "in", rope_scaling=LLAMA3_ROPE_SCALING)
    config = read_model_config(source)
    out = tmp_path / "out"
    write_heads(source)
    imported = import_everywhere(source, config, tp_size=2)
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, carried=carried_of(source, config))
    image = Image.effect_noise((80, 50), 90).convert("RGB")
    logits = []
    for folder in (source, out):
        batch = AutoProcessor.from_pretrained(folder)(
            images=image, text="USER: <image>\nWhat? ASSISTANT: A red circle.", return_tensors="pt"
        )
        assert (batch["input_ids"] == 320).sum() == 36
        with torch.no_grad():
            logits.append(load_exactly(folder)(**batch).logits)
    assert torch.equal(*logits)


def test_padding_to_a_square_is_exported_as_the_llava_processor(tmp_path):
    source = write_tiny_llava(tmp_path / "in")
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    carried, out = carried_of(source, config), tmp_path / "out"
    export_hf(imported.provider, config, out, assets=source, carried=carried, image_aspect_ratio="pad")
    processor = AutoProcessor.from_pretrained(out).image_processor
    assert type(processor).__name__.startswith("LlavaImageProcessor") and processor.do_pad
    pixels = processor(Image.new("RGB", (96, 48), (255, 0, 0)), return_tensors="pt")["pixel_values"][0]
    # A 2:1 image fills the middle half; the rest is the mean colour, which normalises to about 0.
    assert pixels[:, :6].abs().max() < 0.02 and pixels[0, 20:28].min() > 1.5
    assert read_model_config(out).extra["image_aspect_ratio"] == "pad"


def test_shards_and_index(tmp_path):
    """A sharded source, and an export in shards of the asked size, that transformers loads."""
    source = write_tiny_llava(tmp_path / "in", max_shard_size="200KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2, stages=2)
    out = tmp_path / "out"
    carried = carried_of(source, config)
    report = export_hf(imported.provider, config, out, dtype=torch.float32, carried=carried, max_shard_size="100KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 4 and all(file.stat().st_size < 110_000 for file in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.num_bytes == sum(t.nbytes for t in all_tensors(out).values())
    assert_same(load_exactly(out).state_dict(), load_exactly(source).state_dict())


@pytest.mark.parametrize("stored, held", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtype_of_the_parameters_is_kept(tmp_path, stored, held):
    source = write_tiny_llava(tmp_path / "in", dtype=stored)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2, dtype=held)
    name = "language_model.decoder.final_layernorm.weight"
    expected = load_exactly(source).state_dict()["model.language_model.norm.weight"]
    assert imported.merged[name].dtype == held
    assert torch.equal(imported.merged[name], expected.to(held))
    assert config.extra["dtype"] == str(stored).removeprefix("torch.")


def test_vocabulary_padding_is_zero_and_whole_ranks_may_hold_nothing_else(tmp_path):
    """331 rows over two ranks of 352: the first holds them all, the second only padding."""
    source = write_tiny_llava(tmp_path / "in")
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2, padded_vocab_size=704)
    expected = load_exactly(source).state_dict()["lm_head.weight"]
    found = imported.merged["language_model.output_layer.weight"]
    assert torch.equal(found[:331], expected) and torch.equal(found[331:], torch.zeros(373, HIDDEN))


def test_without_the_carried_layers_image_features_stay_the_same(tmp_path):
    """A model trained from random weights has no layer behind the selected one; its export must load and agree."""
    source = write_tiny_llava(tmp_path / "in")
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    report = export_hf(imported.provider, config, tmp_path / "out", dtype=torch.float32)
    assert any("3 of 4" in note for note in report.notes)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    features = []
    for folder in (source, tmp_path / "out"):
        with torch.no_grad():
            features.append(torch.stack(list(load_exactly(folder).get_image_features(pixels).pooler_output)))
    assert torch.equal(*features)


# ------------------------------------------------------------------------------------------------- names of other ages


def older(name: str) -> str:
    """Names of the hub's llava-1.5-7b-hf."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def inner(name: str) -> str:
    """Module names of transformers 4.52 to 4.57."""
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "model.vision_tower.vision_model.")
    return name.replace("multi_modal_projector", "model.multi_modal_projector")


def flattened(name: str) -> str:
    """Module names of transformers 5."""
    return inner(name).replace("vision_tower.vision_model", "vision_tower")


@pytest.mark.parametrize("rename", [older, inner, flattened])
def test_names_of_every_transformers_version(tmp_path, rename):
    source = write_tiny_llava(tmp_path / "in")
    config = read_model_config(source)
    expected = import_everywhere(source, config)
    tensors = load_file(source / "model.safetensors")
    renamed = {rename(name): value for name, value in tensors.items()}
    assert "vision_tower.embeddings.class_embedding" in tensors and len(renamed) == len(tensors)
    # Buffers that older files hold.
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    renamed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(renamed, source / "model.safetensors")
    found = import_everywhere(source, config)
    assert_same(found.merged, expected.merged)
    assert sum("buffer" in reason for reason in found.reports[0, 0].ignored.values()) == 2


def test_a_stored_tied_head_that_equals_the_embedding_is_not_read_again(tmp_path):
    """One that differs is another matter: `public_reports.test_tied_heads_that_differ`."""
    source = write_tiny_llava(tmp_path / "in", tie=True)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = embedding.clone()
    save_file(tensors, source / "model.safetensors")
    report = import_everywhere(source, read_model_config(source), stages=2)
    assert torch.equal(report.merged["language_model.output_layer.weight"][:331], embedding)
    assert "tied" in report.reports[0, 0].ignored["language_model.lm_head.weight"]


def test_more_ranks_than_query_groups(tmp_path):
    """megatron-core then cuts fused rows evenly, inside a group: 2 groups of (4 + 2) x 8 rows over 4 ranks of 24."""
    source = write_tiny_llava(tmp_path / "in", heads=8, groups=2, hidden=64)
    config = read_model_config(source)
    one, four = (import_everywhere(source, config, tp_size=size) for size in (1, 4))
    fused = [name for name in one.merged if "language_model" in name and "linear_qkv" in name]
    assert len(fused) == config.language.num_layers
    for name in fused:
        assert torch.equal(one.merged[name], four.merged[name])
