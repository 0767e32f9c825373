"""BLIP-2 and MiniGPT-4: Hugging Face -> our shards -> Hugging Face, bitwise, and whole for generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    LlamaForCausalLM,
    OPTConfig,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf, export_projector
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, load_adapter, load_hf_weights
from tests.checkpoint.hf.round_trip_files import LAYOUTS, assert_same, write_heads
from tests.checkpoint.rank_modules import import_everywhere, module_of, rank_shapes
from tests.tiny import (
    LLAMA3_ROPE_SCALING,
    randomise,
    sentencepiece_model,
    tiny_blip2_config,
    tiny_blip_image_processor,
    tiny_llama_config,
    write_tiny_blip2,
)

IMAGE_TOKEN, QUERIES, HIDDEN = 320, 5, 48


def load_exactly(folder: Path) -> Blip2ForConditionalGeneration:
    model, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype="auto")
    problems = {key: value for key, value in info.items() if value and key != "conversion_errors"}
    assert not problems, problems
    return model.eval()


def edit(folder: Path, **changes: Any) -> None:
    """Change `config.json`; a dict is laid over the part of that name."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**(config.get(key) or {}), **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_llama(folder: Path) -> LlamaForCausalLM:
    """A LLaMA as Vicuna is: 320 rows for 320 SentencePiece pieces, none of them `<image>`."""
    config = tiny_llama_config()
    config.vocab_size, config.pad_token_id = IMAGE_TOKEN, 0
    model = LlamaForCausalLM(config)
    randomise(model, 3)
    model.save_pretrained(folder)
    shutil.copy(sentencepiece_model(IMAGE_TOKEN), folder / "tokenizer.model")
    facts = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return model


def write_blip2_of_opt(folder: Path) -> Blip2ForConditionalGeneration:
    """As Salesforce's are: another language model, and fields in config.json that no class knows any more."""
    opt = OPTConfig(vocab_size=60, hidden_size=16, ffn_dim=20, num_hidden_layers=1, num_attention_heads=2,
                    word_embed_proj_dim=16, max_position_embeddings=40)  # fmt: skip
    config = tiny_blip2_config()
    config = Blip2Config(
        vision_config=config.vision_config, qformer_config=config.qformer_config, text_config=opt, num_query_tokens=5
    )
    model = Blip2ForConditionalGeneration(config)
    randomise(model, 4)
    model.save_pretrained(folder)
    edit(folder, vision_config={"num_channels": 3, "projection_dim": 512, "dropout": 0.0, "torch_dtype": "float32"})
    tiny_blip_image_processor().save_pretrained(folder)
    # The text side of BLIP-2's first stage, which some files still hold.
    text_side = {
        "qformer.embeddings.position_ids": torch.arange(512)[None],
        "qformer.embeddings.word_embeddings.weight": torch.ones(50, 24),
        "qformer.encoder.layer.1.intermediate.dense.weight": torch.ones(42, 24),
        "qformer.encoder.layer.1.output.LayerNorm.bias": torch.ones(24),
    }
    edit_tensors(folder, lambda tensors: tensors.update(text_side))
    return model.eval()


# ------------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("tp_size, stages", LAYOUTS)
@pytest.mark.parametrize("model", [{}, {"tie": True, "rope_scaling": LLAMA3_ROPE_SCALING}], ids=["odd", "tied-llama3"])
def test_round_trip_is_bitwise(tmp_path, model, tp_size, stages):
    source = write_tiny_blip2(tmp_path / "in", **model, max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    heads = write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    assert not any(report.fresh or report.ignored for report in imported.reports.values())
    assert not any(torch.isnan(value).any() for value in imported.merged.values())

    out = tmp_path / "out"
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, max_shard_size="200KB")
    before, after = load_exactly(source), load_exactly(out)
    assert_same(after.state_dict(), before.state_dict())
    assert_same(load_file(out / HEADS_FILE), heads)
    assert read_model_config(out) == config
    for part in ("text_config", "vision_config", "qformer_config"):
        found, expected = (getattr(m.config, part).to_dict() for m in (after, before))
        differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
        assert differing <= {"dtype", "_name_or_path", "architectures"}, differing
    assert after.config.image_token_id == IMAGE_TOKEN and after.config.num_query_tokens == QUERIES
    assert after.generation_config.to_dict() == before.generation_config.to_dict()


def test_exported_folder_generates_what_the_source_does_and_looks_at_the_image(tmp_path):
    """Through the exported processor: image and tokenizer settings, image token and weights at once."""
    source = write_tiny_blip2(tmp_path / "in", rope_scaling=LLAMA3_ROPE_SCALING)
    write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config, tp_size=2)
    out = tmp_path / "out"
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source)
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, Blip2Processor) and processor.num_query_tokens == QUERIES
    images = [Image.effect_noise((80, 50), 90).convert("RGB"), Image.new("RGB", (40, 60), (255, 0, 0))]
    texts = ["USER: What is it?", "A"]
    batch = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    assert (batch["input_ids"] == IMAGE_TOKEN).sum(1).tolist() == [QUERIES, QUERIES]
    pixels = torch.stack([
        torch.as_tensor(tiny_blip_image_processor()(image)["pixel_values"][0]) for image in images
    ])  # fmt: skip
    assert torch.equal(batch["pixel_values"], pixels)

    before, after = load_exactly(source), load_exactly(out)
    settings = {"max_new_tokens": 6, "do_sample": False}
    answers = after.generate(**batch, **settings)
    assert torch.equal(answers, before.generate(**batch, **settings))
    swapped = after.generate(**{**batch, "pixel_values": pixels.flip(0)}, **settings)
    assert (answers != swapped).any()
    # Greedy decoding by the forward pass alone, which scatters the query features itself.
    ids = batch["input_ids"][:1]
    for _ in range(6):
        logits = after(input_ids=ids, pixel_values=pixels[:1], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answers[:1], ids)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_other_ways_to_a_square_are_exported_too(tmp_path, aspect_ratio):
    source = write_tiny_blip2(tmp_path / "in")
    write_heads(source)
    config = read_model_config(source)
    out = tmp_path / "out"
    export_hf(import_everywhere(source, config).provider, config, out, assets=source, image_aspect_ratio=aspect_ratio)
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, Blip2Processor)
    stripe = Image.new("RGB", (96, 48), (0, 0, 0))
    stripe.paste((255, 0, 0), (0, 0, 12, 48))  # an eighth at the left: in the padded image alone
    pixels = torch.as_tensor(processor.image_processor(stripe)["pixel_values"][0])
    assert pixels.shape == (3, 48, 48)
    assert (pixels[0].max() > 1.5) == (aspect_ratio == "pad")
    assert read_model_config(out).extra["image_aspect_ratio"] == aspect_ratio


# ---------------------------------------------------------------------------------------------------- MiniGPT-4's start


def test_a_llama_beside_a_blip2_gets_its_tower_and_qformer(tmp_path):
    """What MiniGPT-4 starts from: Vicuna, and BLIP-2 with a language model that nobody asks for."""
    llama, blip2 = write_llama(tmp_path / "llama"), write_blip2_of_opt(tmp_path / "blip2")
    config = read_model_config(tmp_path / "llama", tmp_path / "blip2")
    assert (config.projector_type, config.visual_tokens, config.vision_select_layer) == ("qformer", QUERIES, -1)
    assert config.extra["image_aspect_ratio"] == "stretch" and config.image.size == 48
    imported = import_everywhere(tmp_path / "llama", config, tp_size=2, stages=2)
    report = imported.reports[0, 0]
    assert report.fresh == ["connector.projection.weight", "connector.projection.bias"]
    reasons = {name: reason for name, reason in report.ignored.items() if name.startswith("qformer.")}
    assert len(reasons) == 4 and set(reasons.values()) == {
        "the Q-Former's text side", "buffer: positions are computed"
    }  # fmt: skip
    others = {name.partition(".")[0] for name in report.ignored.keys() - reasons.keys()}
    assert others == {"language_model", "language_projection"}
    for part, prefix in ((blip2.vision_model, "vision_tower.model."), (blip2.qformer, "connector.qformer.")):
        assert_same({name: imported.merged[prefix + name] for name in part.state_dict()}, part.state_dict())
    assert torch.equal(imported.merged["connector.query_tokens"], blip2.query_tokens)
    embedding = imported.merged["language_model.embedding.word_embeddings.weight"][:IMAGE_TOKEN]
    assert torch.equal(embedding, llama.model.embed_tokens.weight)

    generator = torch.Generator().manual_seed(0)
    fresh = {
        name: torch.randn(shape, generator=generator)
        for name, shape in rank_shapes(
            config, tp_size=1, layers=4, first_stage=True, last_stage=True, padded_vocab_size=320
        )
        if name.startswith(("connector.projection.", "heads."))
    }
    out = tmp_path / "out"
    report = export_hf({**imported.merged, **fresh}.__getitem__, config, out, dtype=torch.float32,
                       assets=tmp_path / "llama")  # fmt: skip
    assert any("vocabulary rows added" in note for note in report.notes)
    model, processor = load_exactly(out), AutoProcessor.from_pretrained(out)
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    assert torch.equal(model.language_projection.weight, fresh["connector.projection.weight"])
    batch = processor(images=Image.new("RGB", (40, 60), (255, 0, 0)), text="A", return_tensors="pt")
    features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    theirs = blip2.get_image_features(pixel_values=batch["pixel_values"]).qformer_outputs.last_hidden_state
    torch.testing.assert_close(features, torch.nn.functional.linear(theirs, *map(fresh.get, list(fresh)[:2])))
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def write_llama_proj(path: Path, whole_run: bool) -> dict[str, Tensor]:
    """MiniGPT-4's own checkpoint: as published, or as its runner saves it."""
    generator = torch.Generator().manual_seed(5)
    tensors = {"weight": torch.randn(HIDDEN, 24, generator=generator), "bias": torch.randn(HIDDEN, generator=generator)}
    content: dict[str, Any] = {"model": {f"llama_proj.{name}": value for name, value in tensors.items()}}
    if whole_run:
        content |= {"optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-5}]},
                    "config": {"run": {"task": "image_text_pretrain"}}, "scaler": None, "epoch": 3}  # fmt: skip
    torch.save(content, path)
    return tensors


@pytest.mark.parametrize("whole_run", [False, True])
def test_llama_proj_is_laid_over_the_projection(tmp_path, whole_run):
    source = write_tiny_blip2(tmp_path / "in")
    config = read_model_config(source)
    expected = write_llama_proj(tmp_path / "llama_proj.pth", whole_run)
    imported = import_everywhere(source, config, adapter=tmp_path / "llama_proj.pth")
    shapes = rank_shapes(config, tp_size=1, layers=4, first_stage=True, last_stage=True, padded_vocab_size=336)
    module = module_of(shapes, torch.float32)
    load_adapter(module, tmp_path / "llama_proj.pth", config)
    filled = {name: value for name, value in module.named_parameters() if not torch.isnan(value).any()}
    assert_same(filled, {f"connector.projection.{name}": value for name, value in expected.items()})
    for name, value in expected.items():
        assert torch.equal(imported.merged[f"connector.projection.{name}"], value)


def test_llama_proj_alone_round_trips(tmp_path):
    source = write_tiny_blip2(tmp_path / "in")
    heads = write_heads(source)
    config = read_model_config(source)
    imported = import_everywhere(source, config)
    export_projector(imported.provider, config, tmp_path / "out", dtype=torch.float32)
    content = torch.load(tmp_path / "out" / "llama_proj.pth", weights_only=True)
    expected = load_exactly(source).language_projection.state_dict()
    assert content.keys() == {"model"}  # what MiniGPT-4 loads: ckpt["model"], by name
    assert_same(content["model"], {f"llama_proj.{name}": value for name, value in expected.items()})
    assert_same(load_file(tmp_path / "out" / HEADS_FILE), heads)


# -------------------------------------------------------------------------------------------------------------- errors


def refused(folder: Path, **options: Any) -> str:
    """The message of the import's one-line ValueError; nothing has been changed then."""
    config = read_model_config(folder, options.pop("tower", None))
    shapes = rank_shapes(config, tp_size=1, layers=4, first_stage=True, last_stage=True, padded_vocab_size=336)
    module = module_of(shapes, torch.float32)
    with pytest.raises(ValueError) as caught:
        load_hf_weights(
            module, folder, config, tp_rank=0, tp_size=1, layer_offset=0, padded_vocab_size=336, **options
        )  # fmt: skip
    assert all(torch.isnan(parameter).all() for parameter in module.parameters())
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYER = "qformer.encoder.layer.2.crossattention.attention.key.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_tiny_blip2(tmp_path_factory.mktemp("blip2") / "in")


@pytest.fixture
def source(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "in"))


def test_tensors_that_are_missing_unknown_or_of_another_shape(source):
    tensors = load_file(source / "model.safetensors")

    def written(change: dict[str, Tensor | None]) -> str:
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        return refused(source)

    assert f"{LAYER} [24, 30] is missing; nearest found: qformer.encoder.layer.0" in written({LAYER: None})
    message = written({LAYER: None, LAYER.replace("key", "keys"): tensors[LAYER]})
    assert f"{LAYER.replace('key', 'keys')} is unknown" in message and f"nearest expected: {LAYER}" in message
    assert f"{LAYER} is [24, 29], config.json makes it [24, 30]" in written({LAYER: tensors[LAYER][:, :-1].clone()})
    assert "query_tokens is [1, 4, 24]" in written({"query_tokens": tensors["query_tokens"][:, 1:].clone()})
    name = "vision_model.encoder.layers.2.self_attn.qkv.bias"
    assert f"{name} [90] is missing" in written({name: None})
    assert "vision_model.encoder.layers.3.mlp.fc1.bias is unknown" in written(
        {"vision_model.encoder.layers.3.mlp.fc1.bias": torch.ones(50)}
    )
    assert "language_projection.bias [48] is missing" in written({"language_projection.bias": None})


def test_a_blip2_with_another_language_model_goes_beside_a_llama(tmp_path):
    write_blip2_of_opt(tmp_path / "blip2")
    write_llama(tmp_path / "llama")
    with pytest.raises(
        ValueError,
        match="model is 'opt'; expected a LLaMA, Mistral, Qwen2 or Qwen3: give this folder as",
    ):
        read_model_config(tmp_path / "blip2")
    edit_tensors(tmp_path / "blip2", lambda tensors: tensors.pop("query_tokens"))
    message = refused(tmp_path / "llama", tower=tmp_path / "blip2")
    assert "tensor query_tokens [1, 5, 24] is missing" in message


def test_adapters_of_another_connector_are_refused(source, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"llama_proj.weight": torch.ones(HIDDEN, 24)}}, path)
    assert "holds llama_proj.weight, which is no qformer connector" in refused(source, adapter=path)
    torch.save({"model": {"Qformer.bert.x": torch.ones(3)}}, path)
    assert "Qformer.bert.x is no part of a connector qformer; expected names such as llama_proj.weight" in refused(
        source, adapter=path
    )
    torch.save({"model": {"llama_proj.weight": torch.ones(HIDDEN, 23), "llama_proj.bias": torch.ones(HIDDEN)}}, path)
    assert "llama_proj.weight is [48, 23]" in refused(source, adapter=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_query_tokens": 0}, "num_query_tokens is 0"),
        ({"vision_config": {"hidden_size": "wide"}}, "its blip_2_vision_model cannot be read"),
        ({"vision_config": {"patch_size": [8, 8]}}, "must be one number each"),
        ({"qformer_config": {"hidden_size": "wide"}}, "its blip_2_qformer cannot be read"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "instructblip"}, "found model_type 'instructblip'"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(source, changes, message):
    edit(source, **{"quantization_config": None, **changes})
    with pytest.raises(ValueError) as caught:
        read_model_config(source)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_the_original_layout_has_no_place_for_a_qformer(source, tmp_path):
    write_heads(source)
    config = read_model_config(source)
    provider = import_everywhere(source, config).provider
    with pytest.raises(ValueError, match="the connector is a Q-Former, which the original LLaVA layout has no place"):
        export_hf(provider, config, tmp_path / "out", layout="llava")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="holds its vision tower"):
        read_model_config(source, source)
