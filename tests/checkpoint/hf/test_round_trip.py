"""Hugging Face -> our shards -> Hugging Face: bitwise for every tensor, both layouts, whatever the parallel sizes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaForConditionalGeneration,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf, export_projector
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, open_sources
from tests.checkpoint.rank_modules import ImportedModel, import_everywhere
from tests.tiny import (
    LLAMA3_ROPE_SCALING,
    randomise,
    tiny_image_processor,
    tiny_llava_config,
    write_tiny_llava,
    write_tiny_original_llava,
)

HIDDEN = 48
MODELS = {
    "odd": {},
    "tied-llama3": {"tie": True, "rope_scaling": LLAMA3_ROPE_SCALING, "select_layer": -1},
    "first-layers": {"select_layer": 1, "vision_layers": 3},
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def write_heads(folder: Path, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"vision_projector.weight": (HIDDEN // 4, HIDDEN), "vision_projector.bias": (HIDDEN // 4,),
              "text_projector.weight": (HIDDEN // 4, HIDDEN), "text_projector.bias": (HIDDEN // 4,),
              "temperature": (1,)}  # fmt: skip
    heads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(heads, folder / HEADS_FILE)
    return heads


def carried_of(folder: Path, config) -> dict[str, Tensor]:
    sources = open_sources(folder, config)
    return {name: sources.read(name) for name in sources.table.carried if name in sources.found}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file of a folder, by the name in the file."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def load_exactly(folder: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype="auto")
    problems = {key: value for key, value in info.items() if value and key != "conversion_errors"}
    assert not problems, problems
    return model.eval()


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


def test_a_stored_tied_head_is_ignored_as_transformers_does(tmp_path):
    source = write_tiny_llava(tmp_path / "in", tie=True)
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.lm_head.weight"] = torch.zeros(331, HIDDEN)
    save_file(tensors, source / "model.safetensors")
    report = import_everywhere(source, read_model_config(source), stages=2)
    embedding = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(report.merged["language_model.output_layer.weight"][:331], embedding)
    assert "tied" in report.reports[0, 0].ignored["language_model.lm_head.weight"]


# ------------------------------------------------------------------------------------------------------ original layout


@pytest.mark.parametrize("tp_size, stages", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"projector_type": "mlp2x_gelu"},
        {"projector_type": "linear", "pickle": True, "tie": True},
        {"projector_type": "mlp3x_gelu", "select_layer": -1, "rope_scaling": LLAMA3_ROPE_SCALING},
    ],
    ids=["mlp2x", "linear-bin-tied", "mlp3x-llama3"],
)
def test_original_layout_round_trip_is_bitwise(tmp_path, options, tp_size, stages):
    source, tensors = write_tiny_original_llava(tmp_path / "in", **options)
    heads = write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    out = tmp_path / "out"
    carried = carried_of(source, config)
    export_hf(imported.provider, config, out, layout="llava", dtype=torch.float32, assets=source, carried=carried)
    assert_same(all_tensors(out), tensors)
    assert_same(load_file(out / HEADS_FILE), heads)
    assert read_model_config(out) == config
    text = "A red circle on the left."
    found, expected = (LlamaTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (out, source))
    assert found == expected
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing <= {"rope_scaling", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"}, differing


def test_original_layout_with_the_tower_in_its_own_folder(tmp_path):
    source, tensors = write_tiny_original_llava(tmp_path / "in", vision_tower_inside=False)
    config = read_model_config(source)
    inside, tensors_inside = write_tiny_original_llava(tmp_path / "inside")
    assert_same(tensors, tensors_inside)
    apart, whole = (import_everywhere(folder, read_model_config(folder)) for folder in (source, inside))
    assert_same(apart.merged, whole.merged)

    write_heads(source)
    imported = import_everywhere(source, config)
    carried = carried_of(source, config)
    named = tmp_path / "named"
    export_hf(imported.provider, config, named, layout="llava", dtype=torch.float32, carried=carried, tower="named")
    assert_same(all_tensors(named), {name: value for name, value in tensors.items() if "vision_tower" not in name})
    folder = tmp_path / "folder"
    export_hf(imported.provider, config, folder, layout="llava", dtype=torch.float32, carried=carried, tower="folder")
    again = import_everywhere(folder, read_model_config(folder))
    assert_same(again.merged, imported.merged)
    from transformers import CLIPVisionModel

    _, info = CLIPVisionModel.from_pretrained(folder / "vision_tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_llava_projector_keeps_hf_out(tmp_path):
    source, _ = write_tiny_original_llava(tmp_path / "in", projector_type="mlp3x_gelu")
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    with pytest.raises(ValueError, match=r"mlp3x_gelu.*mlp2x_gelu only.*original layout"):
        export_hf(imported.provider, config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


# ------------------------------------------------------------------------------------------------------ between layouts


def test_from_the_original_layout_to_hf_and_back(tmp_path):
    """320 rows get <image> and <pad> behind them, up to 384; the way back cuts them off exactly."""
    source, tensors = write_tiny_original_llava(tmp_path / "in", rope_scaling=LLAMA3_ROPE_SCALING)
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2)
    carried = carried_of(source, config)
    hf = tmp_path / "hf"
    report = export_hf(imported.provider, config, hf, dtype=torch.float32, assets=source, carried=carried)
    assert report.notes == ["64 vocabulary rows added (mean of the others)"]
    model = load_exactly(hf)
    assert (model.config.text_config.vocab_size, model.config.image_token_id) == (384, 320)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        rows = next(value for key, value in all_tensors(hf).items() if key.endswith(name))
        torch.testing.assert_close(rows[320:], rows[:320].mean(dim=0).expand(64, -1), rtol=0, atol=1e-6)
    processor = AutoProcessor.from_pretrained(hf)
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (320, 321)

    # The language part equals transformers' own LLaMA with the original tensors.
    llama = LlamaForCausalLM(tiny_llava_config(vocab=320, rope_scaling=LLAMA3_ROPE_SCALING).text_config).eval()
    llama.load_state_dict(
        {name: value for name, value in tensors.items() if "mm_projector" not in name and "vision" not in name}
    )
    ids = processor.tokenizer("A red circle on the left.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :320], llama(input_ids=ids).logits)

    back_config = read_model_config(hf)
    back = import_everywhere(hf, back_config)
    out = tmp_path / "out"
    carried = carried_of(hf, back_config)
    export_hf(
        back.provider, back_config, out, layout="llava", dtype=torch.float32, assets=hf, carried=carried, tower="inside"
    )
    assert_same(all_tensors(out), tensors)
    tokenizer = LlamaTokenizer.from_pretrained(out)
    assert len(tokenizer) == 320 and tokenizer("<image>")["input_ids"] != [1, 320]
    assert read_model_config(source).language == config.language


# ------------------------------------------------------------------------------------------------------ two-part start


def write_parts(folder: Path, *, whole_clip: bool) -> tuple[Path, Path, LlavaForConditionalGeneration]:
    """A LLaMA folder and a CLIP folder, with the parts of the tiny LLaVA."""
    folder.mkdir()
    source = write_tiny_llava(folder / "llava")
    llava = load_exactly(source)
    llama = LlamaForCausalLM(llava.config.text_config)
    llama.model.load_state_dict(llava.model.language_model.state_dict())
    llama.lm_head.load_state_dict(llava.lm_head.state_dict())
    llama.save_pretrained(folder / "llama")
    if whole_clip:
        text = CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
        clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=llava.config.vision_config.to_dict()))
        randomise(clip, 3)
        clip.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
        clip.save_pretrained(folder / "clip")
    else:
        llava.model.vision_tower.save_pretrained(folder / "clip")
    tiny_image_processor().save_pretrained(folder / "clip")
    return folder / "llama", folder / "clip", llava


@pytest.mark.parametrize("whole_clip", [False, True])
def test_two_part_start_leaves_connector_and_heads_fresh(tmp_path, whole_clip):
    llama, clip, _ = write_parts(tmp_path / "parts", whole_clip=whole_clip)
    config = read_model_config(llama, vision_tower=clip)
    whole = import_everywhere(tmp_path / "parts" / "llava", read_model_config(tmp_path / "parts" / "llava"), tp_size=2)
    imported = import_everywhere(llama, config, tp_size=2)
    report = imported.reports[0, 0]
    assert {name.partition(".")[0] for name in report.fresh} == {"connector", "heads"}
    assert_same(
        imported.merged, {name: value for name, value in whole.merged.items() if not name.startswith("connector.")}
    )
    assert any(reason == "the text side of CLIP or SigLIP" for reason in report.ignored.values()) == whole_clip


def save_adapter(path: Path, prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (HIDDEN, 32), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({prefix + name: value for name, value in tensors.items()}, path)
    return tensors


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("start", ["llava", "llama"])
def test_adapter_is_laid_over_the_connector(tmp_path, prefix, start):
    write_parts(tmp_path / "parts", whole_clip=False)
    adapter = save_adapter(tmp_path / "mm_projector.bin", prefix)
    folder = tmp_path / "parts" / start
    config = read_model_config(folder, vision_tower=tmp_path / "parts" / "clip" if start == "llama" else None)
    imported = import_everywhere(folder, config, adapter=tmp_path / "mm_projector.bin")
    for name, value in adapter.items():
        assert torch.equal(imported.merged[f"connector.{name}"], value)
    assert str(tmp_path / "mm_projector.bin") in imported.reports[0, 0].summary()


def test_projector_alone_round_trips_as_an_adapter(tmp_path):
    source = write_tiny_llava(tmp_path / "in")
    heads = write_heads(source)
    config = read_model_config(source)
    imported: ImportedModel = import_everywhere(source, config)
    export_projector(imported.provider, config, tmp_path / "out", dtype=torch.float32)
    stored = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    expected = load_exactly(source).model.multi_modal_projector.state_dict()
    names = {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    }
    assert_same(stored, {f"model.mm_projector.{ours}": expected[theirs] for ours, theirs in names.items()})
    assert_same(load_file(tmp_path / "out" / HEADS_FILE), heads)

    other = write_tiny_llava(tmp_path / "other", seed=9)
    again = import_everywhere(other, read_model_config(other), adapter=tmp_path / "out" / "mm_projector.bin")
    for name in names:
        assert torch.equal(again.merged[f"connector.{name}"], imported.merged[f"connector.{name}"])


def test_more_ranks_than_query_groups(tmp_path):
    """megatron-core then cuts fused rows evenly, inside a group: 2 groups of (4 + 2) x 8 rows over 4 ranks of 24."""
    source = write_tiny_llava(tmp_path / "in", heads=8, groups=2, hidden=64)
    config = read_model_config(source)
    one, four = (import_everywhere(source, config, tp_size=size) for size in (1, 4))
    fused = [name for name in one.merged if "language_model" in name and "linear_qkv" in name]
    assert len(fused) == config.language.num_layers
    for name in fused:
        assert torch.equal(one.merged[name], four.merged[name])
