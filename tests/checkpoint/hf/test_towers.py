"""Vision towers that transformers runs, SigLIP and CLIP: Hugging Face -> our shards -> Hugging Face, bitwise."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf
from hacl_megatron.config.architecture import ModelConfig
from tests.checkpoint.hf.round_trip_files import all_tensors, assert_same, carried_of, load_exactly, write_heads
from tests.checkpoint.hf.test_blip2 import edit, write_llama
from tests.checkpoint.hf.test_round_trip import older
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import (
    image_token_id,
    randomise,
    sentencepiece_model,
    tiny_llama_config,
    tiny_siglip_config,
    tiny_tokenizer,
    write_tiny_blip2,
    write_tiny_llava,
    write_tiny_original_llava,
)

try:  # transformers 5 keeps processors without torchvision under their own names
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as SiglipImageProcessor
except ImportError:
    from transformers import SiglipImageProcessor


def siglip_processor(image: int = 50) -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": image, "width": image})


def save_with_siglip_processor(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """A LLaVA of random weights whose processor hands every patch to the model."""
    save_llava(model, folder, siglip_processor(), strategy="full", additional_tokens=0)


def save_llava(
    model: LlavaForConditionalGeneration, folder: Path, processor: Any, *, strategy: str, additional_tokens: int
) -> None:
    """A LLaVA of random weights with this image processor, for patches of 8 pixels."""
    randomise(model, 0)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=image_token_id() + 1)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=processor, tokenizer=tiny_tokenizer(), patch_size=8,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=additional_tokens,
    ).save_pretrained(folder)  # fmt: skip


def write_siglip_llava(folder: Path, *, use_head: bool = True, select_layer: int = -2) -> Path:
    """A `LlavaForConditionalGeneration` whose tower is a SigLIP."""
    vision = tiny_siglip_config()
    vision.vision_use_head = use_head
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=tiny_llama_config(), image_token_index=image_token_id(),
            image_seq_length=36, vision_feature_layer=select_layer, vision_feature_select_strategy="full",
        )
    )  # fmt: skip
    save_with_siglip_processor(model, folder)
    shutil.copy(sentencepiece_model(image_token_id()), folder / "tokenizer.model")
    write_heads(folder)
    return folder


def on_hf(config: ModelConfig) -> ModelConfig:
    return replace(config, vision=config.vision.on("hf"))


# -------------------------------------------------------------------------------------------------------------- SigLIP


@pytest.mark.parametrize("tp_size, stages", [(1, 1), (2, 2)])
@pytest.mark.parametrize("options", [{}, {"use_head": False, "select_layer": -1}], ids=["head", "no-head-last"])
def test_llava_with_a_siglip_round_trips_bitwise(tmp_path, options, tp_size, stages):
    source = write_siglip_llava(tmp_path / "in", **options)
    config = read_model_config(source)
    assert config.visual_tokens == 36 and config.extra["image_aspect_ratio"] == "stretch"
    assert config.image.mean == (0.5, 0.5, 0.5)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    assert not imported.reports[0, 0].fresh
    ignored = {name.split(".")[1] for name in imported.reports[0, 0].ignored}
    assert ignored == ({"encoder", "post_layernorm", "head"} if not options else {"post_layernorm"})

    out = tmp_path / "out"
    carried = carried_of(source, config)
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, carried=carried)
    before, after = load_exactly(source), load_exactly(out)
    assert_same(after.state_dict(), before.state_dict())
    assert read_model_config(out) == config
    image = Image.effect_noise((80, 50), 90).convert("RGB")
    logits = []
    for folder, model in ((source, before), (out, after)):
        processor = AutoProcessor.from_pretrained(folder)
        batch = processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
        assert (batch["input_ids"] == 320).sum() == 36
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert torch.equal(*logits)


def test_names_of_transformers_4(tmp_path):
    source = write_siglip_llava(tmp_path / "in")
    config = read_model_config(source)
    expected = import_everywhere(source, config)
    tensors = load_file(source / "model.safetensors")
    save_file({older(name): value for name, value in tensors.items()}, source / "model.safetensors")
    assert "vision_tower.vision_model.head.probe" in load_file(source / "model.safetensors")
    assert_same(import_everywhere(source, config).merged, expected.merged)


def test_without_the_carried_layers_features_stay_the_same(tmp_path):
    """A model trained from random weights has neither SigLIP's head nor a layer behind the selected one."""
    source = write_siglip_llava(tmp_path / "in")
    config = read_model_config(source)
    report = export_hf(import_everywhere(source, config).provider, config, tmp_path / "out", dtype=torch.float32)
    assert any("2 of 3" in note for note in report.notes)
    pixels = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    features = []
    for folder in (source, tmp_path / "out"):
        with torch.no_grad():
            features.append(torch.stack(list(load_exactly(folder).get_image_features(pixels).pooler_output)))
    assert torch.equal(*features)


@pytest.mark.parametrize("whole", [False, True])
def test_a_llama_beside_a_siglip(tmp_path, whole):
    write_llama(tmp_path / "llama")
    vision = tiny_siglip_config()
    tower = SiglipVisionModel(vision)
    randomise(tower, 2)
    model = tower
    if whole:
        text = SiglipTextConfig(
            hidden_size=30, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
        )
        model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
        model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path / "siglip")
    siglip_processor().save_pretrained(tmp_path / "siglip")
    config = read_model_config(tmp_path / "llama", tmp_path / "siglip")
    assert config.vision.backend == "hf" and config.projector_type == "mlp2x_gelu"
    imported = import_everywhere(tmp_path / "llama", config, tp_size=2)
    report = imported.reports[0, 0]
    assert {name.partition(".")[0] for name in report.fresh} == {"connector", "heads"}
    for name, value in tower.state_dict().items():
        if not name.startswith(("encoder.layers.2.", "post_layernorm.", "head.")):
            assert torch.equal(imported.merged[f"vision_tower.model.{name}"], value), name
    assert any(reason == "the text side of CLIP or SigLIP" for reason in report.ignored.values()) == whole


def test_sizes_follow_the_tower_and_not_its_file(tmp_path):
    """Fields at their default may be left out, and unknown ones stand there: the same tower all the same."""
    source = write_siglip_llava(tmp_path / "in")
    config = read_model_config(source)
    edit(source, vision_config={"projection_dim": 512, "dropout": 0.0, "torch_dtype": "float32"})
    assert read_model_config(source) == config
    edit(source, vision_config={"layer_norm_eps": 1e-5})
    assert read_model_config(source).vision.hf["layer_norm_eps"] == 1e-5


# ---------------------------------------------------------------------------------------------------------------- CLIP


def test_clip_by_transformers_gives_the_same_folders(tmp_path):
    """Of a CLIP, the backend is no matter of the folder: both layouts come back bitwise."""
    source = write_tiny_llava(tmp_path / "in")
    write_heads(source)
    config = on_hf(read_model_config(source))
    imported = import_everywhere(source, config, tp_size=2)
    assert not any(report.fresh for report in imported.reports.values())
    carried = carried_of(source, config)
    export_hf(imported.provider, config, tmp_path / "out", dtype=torch.float32, assets=source, carried=carried)
    assert_same(load_exactly(tmp_path / "out").state_dict(), load_exactly(source).state_dict())
    assert read_model_config(tmp_path / "out") == read_model_config(source)

    original, tensors = write_tiny_original_llava(tmp_path / "original")
    write_heads(original)
    config = on_hf(read_model_config(original))
    imported, carried = import_everywhere(original, config), carried_of(original, config)
    out = tmp_path / "llava"
    export_hf(imported.provider, config, out, layout="llava", dtype=torch.float32, assets=original, carried=carried)
    assert_same(all_tensors(out), tensors)


# -------------------------------------------------------------------------------------------------------------- errors


def test_towers_that_do_not_fit_are_refused_by_name(tmp_path):
    source = write_siglip_llava(tmp_path / "in")
    provider, config = import_everywhere(source, read_model_config(source)).provider, read_model_config(source)
    with pytest.raises(ValueError, match="vision tower is a siglip_vision_model, which the original LLaVA layout"):
        export_hf(provider, config, tmp_path / "out", layout="llava")
    with pytest.raises(ValueError, match="megatron-core has CLIP's alone"):
        config.vision.on("megatron")
    edit(source, vision_config={"model_type": "vit_mae"})
    with pytest.raises(ValueError, match=r"model_type is 'vit_mae'; this trainer supports 'clip_vision_model'"):
        read_model_config(source)

    original, _ = write_tiny_original_llava(tmp_path / "original", vision_tower_inside=False)
    tower = tmp_path / "siglip"
    SiglipVisionModel(tiny_siglip_config()).save_pretrained(tower)
    edit(original, mm_hidden_size=30)
    with pytest.raises(ValueError, match=r"is a siglip_vision_model, but the original LLaVA layout in .* has CLIP's"):
        read_model_config(original, tower)

    # Another connector over BLIP-2's tower trains, but no model of transformers is like it.
    write_llama(tmp_path / "llama")
    config = read_model_config(tmp_path / "llama", write_tiny_blip2(tmp_path / "blip2"))
    config = replace(config, projector_type="mlp2x_gelu", qformer=None)
    assert config.visual_tokens == 37
    report = import_everywhere(tmp_path / "llama", config).reports[0, 0]
    assert "the Q-Former, which a connector mlp2x_gelu goes without" in report.ignored.values()
    with pytest.raises(ValueError, match="mlp2x_gelu over BLIP-2's vision tower, which is in no model of transformers"):
        export_hf(provider, config, tmp_path / "out")
