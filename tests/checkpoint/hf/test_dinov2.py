"""DINOv2 as a tower, with registers and SwiGLU or without: Hugging Face -> our shards -> Hugging Face, bitwise.

The tower has 9 x 9 positions (74 pixels in patches of 8), and its image processor makes 50 pixels of a shortest edge of
56: transformers interpolates the positions to 6 x 6.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.export import export_hf
from tests.checkpoint.hf.round_trip_files import assert_same, carried_of, load_exactly, write_heads
from tests.checkpoint.hf.test_blip2 import edit, write_llama
from tests.checkpoint.hf.test_towers import save_llava
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import (
    image_token_id,
    randomise,
    sentencepiece_model,
    tiny_dinov2_config,
    tiny_llama_config,
)
from tests.tool_runs import apart, to_hf, to_megatron

try:  # transformers 5 keeps processors without torchvision under their own names
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as BitImageProcessor
except ImportError:
    from transformers import BitImageProcessor

TOWERS = {
    "plain": {},
    "swiglu": {"swiglu": True},
    "registers": {"registers": 3},
    "registers and swiglu": {"registers": 3, "swiglu": True},
}


def processor() -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 50, "width": 50}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip


def write_dinov2_llava(folder: Path, *, select_layer: int = -2, **tower) -> Path:
    """A `LlavaForConditionalGeneration` whose tower is a DINOv2; `tower` as for `tiny_dinov2_config`."""
    registers = tower.get("registers", 0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny_dinov2_config(**tower), text_config=tiny_llama_config(),
            image_token_index=image_token_id(), image_seq_length=36 + registers, vision_feature_layer=select_layer,
            vision_feature_select_strategy="default",
        )
    )  # fmt: skip
    save_llava(model, folder, processor(), strategy="default", additional_tokens=1 + registers)
    shutil.copy(sentencepiece_model(image_token_id()), folder / "tokenizer.model")
    write_heads(folder)
    return folder


@pytest.mark.parametrize(("name", "tp_size", "stages"), [*((name, 1, 1) for name in TOWERS), ("swiglu", 2, 2)])
def test_llava_with_a_dinov2_round_trips_bitwise(tmp_path: Path, name: str, tp_size: int, stages: int):
    """Catches names of transformers' module in the files, where the hub has others, and registers that the model makes
    features of and its processor does not count."""
    source = write_dinov2_llava(tmp_path / "in", **TOWERS[name])
    names = load_file(source / "model.safetensors")
    assert "vision_tower.encoder.layer.0.attention.attention.query.weight" in names, "as on the hub"
    assert ("vision_tower.encoder.layer.0.mlp.weights_in.weight" in names) == ("swiglu" in name)
    config = read_model_config(source)
    rows = 36 + TOWERS[name].get("registers", 0)
    assert (config.visual_tokens, config.vision.sequence_length) == (rows, rows + 1)
    assert (config.vision.image_size, config.vision.hf["image_size"], config.image.shortest_edge) == (50, 74, 56)
    assert config.extra["image_aspect_ratio"] == "square"
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    assert not imported.reports[0, 0].fresh
    ignored = {name.removeprefix("vision_tower.").partition(".layer.2.")[0] for name in imported.reports[0, 0].ignored}
    assert ignored == {"encoder", "layernorm.weight", "layernorm.bias", "embeddings.mask_token"}

    out = tmp_path / "out"
    carried = carried_of(source, config)
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, carried=carried)
    assert_same(load_file(out / "model.safetensors"), names)
    before, after = load_exactly(source), load_exactly(out)
    assert_same(after.state_dict(), before.state_dict())
    assert read_model_config(out) == config
    assert json.loads((out / "config.json").read_text())["image_seq_length"] == rows
    image = Image.effect_noise((80, 57), 90).convert("RGB")
    logits = []
    for folder, model in ((source, before), (out, after)):
        batch = AutoProcessor.from_pretrained(folder)(
            images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
        )
        assert batch["pixel_values"].shape == (1, 3, 50, 50) and (batch["input_ids"] == 320).sum() == rows
        with torch.no_grad():
            logits.append(model(**batch).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", TOWERS)
def test_without_the_carried_layers_features_stay_the_same(tmp_path: Path, name: str):
    """A model trained from random weights has neither a mask token nor a layer behind the selected one."""
    source = write_dinov2_llava(tmp_path / "in", **TOWERS[name])
    config = read_model_config(source)
    report = export_hf(import_everywhere(source, config).provider, config, tmp_path / "out", dtype=torch.float32)
    assert any("2 of 3" in note for note in report.notes)
    pixels = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    features = []
    for folder in (source, tmp_path / "out"):
        with torch.no_grad():
            features.append(torch.stack(list(load_exactly(folder).get_image_features(pixels).pooler_output)))
    assert torch.equal(*features)


@pytest.mark.parametrize("registers", [None, 3])
@pytest.mark.parametrize("classifier", [False, True])
def test_a_llama_beside_a_dinov2(tmp_path: Path, registers: int | None, classifier: bool):
    """In the folder of the tower alone, or of transformers' classifier, whose names have a prefix. Catches the halves
    of a SwiGLU taken for one another, which a round trip does not see."""
    write_llama(tmp_path / "llama")
    classes = {None: Dinov2ForImageClassification, 3: Dinov2WithRegistersForImageClassification}
    model = classes[registers](tiny_dinov2_config(registers=registers, swiglu=registers is not None))
    randomise(model, 2)
    tower = getattr(model, model.base_model_prefix)
    (model if classifier else tower).save_pretrained(tmp_path / "tower")
    processor().save_pretrained(tmp_path / "tower")
    config = read_model_config(tmp_path / "llama", tmp_path / "tower")
    assert config.vision.backend == "hf" and config.projector_type == "mlp2x_gelu"
    imported = import_everywhere(tmp_path / "llama", config, tp_size=2)
    report = imported.reports[0, 0]
    assert {name.partition(".")[0] for name in report.fresh} == {"connector", "heads"}
    for name, value in tower.state_dict().items():
        if not name.startswith(("encoder.layer.2.", "layernorm.", "embeddings.mask_token")):
            assert torch.equal(imported.merged[f"vision_tower.model.{name}"], value), name
    assert ("DINOv2's classifier of images" in report.ignored.values()) == classifier


def test_verify_holds_on_both_ways(tmp_path: Path):
    """transformers' LLaVA is the oracle: it drops the class token alone, so registers must be features here too, and
    its processor makes the pixels. From a whole LLaVA, and from a LLaMA beside a tower's own folder."""
    source = write_dinov2_llava(tmp_path / "in", registers=3, swiglu=True)
    write_llama(tmp_path / "llama")
    tower = load_exactly(source).model.vision_tower
    tower.save_pretrained(tmp_path / "tower")
    processor().save_pretrained(tmp_path / "tower")
    _, printed = apart(_there_and_back, tmp_path)
    assert printed.count("largest pixel difference") == 3, printed


def _there_and_back(folder: Path) -> None:
    converted = to_megatron(folder / "in", folder / "converted", "--verify")
    to_hf(converted, folder / "back", "--dtype", "float32", "--verify")
    to_megatron(folder / "llama", folder / "parts", "--vision-tower", folder / "tower", "--verify")


def test_what_llava_cannot_have_of_it_is_refused_by_name(tmp_path: Path):
    source = write_dinov2_llava(tmp_path / "in")
    provider, config = import_everywhere(source, read_model_config(source)).provider, read_model_config(source)
    with pytest.raises(ValueError, match="vision tower is a dinov2, which the original LLaVA layout"):
        export_hf(provider, config, tmp_path / "out", layout="llava")
    with pytest.raises(ValueError, match="the vision tower is a dinov2; megatron-core has CLIP's alone"):
        config.vision.on("megatron")
    edit(source, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy is 'full'; this trainer supports 'default'"):
        read_model_config(source)
