"""LLaVA-NeXT and LLaVA-OneVision: Hugging Face -> our shards -> Hugging Face, bitwise, and what is refused."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionProcessor,
)

from hacl_megatron.checkpoint.convert.describe import Holdings, describe, differences
from hacl_megatron.checkpoint.hf.adapters.folder import open_adapted_sources, read_adapted_config
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.hf.config_write import to_config_json, why_not_layout
from hacl_megatron.checkpoint.hf.export import export_hf
from hacl_megatron.checkpoint.hf.import_weights import load_adapter
from hacl_megatron.checkpoint.hf.tiled_models import TILED_MODELS
from hacl_megatron.config.run import RunConfig, from_yaml, to_yaml
from hacl_megatron.config.tiles import TilesConfig
from tests.checkpoint.hf.adapter_files import write_adapter
from tests.checkpoint.hf.round_trip_files import (
    all_tensors,
    assert_same,
    carried_of,
    load_exactly,
    save_adapter,
    write_heads,
    write_parts,
)
from tests.checkpoint.hf.test_blip2 import edit
from tests.checkpoint.rank_modules import import_everywhere
from tests.tiny import LLAMA3_ROPE_SCALING, write_tiny_llava
from tests.tiny_tiles import (
    NEXT_PINPOINTS,
    ONEVISION_PINPOINTS,
    write_tiny_next,
    write_tiny_onevision,
    write_tiny_original_next,
)

MODELS = {
    "next": (write_tiny_next, {}, 1, 1),
    "next-llama-3": (write_tiny_next, {"rope_scaling": LLAMA3_ROPE_SCALING}, 2, 2),
    "next-mistral": (write_tiny_next, {"family": "mistral", "head_dim": 12}, 2, 1),
    "next-qwen2": (write_tiny_next, {"family": "qwen2"}, 1, 2),
    "onevision": (write_tiny_onevision, {}, 2, 1),
    "onevision-tied": (write_tiny_onevision, {"tie": True}, 2, 2),
}
"""Writer, sizes, and tensor- and pipeline-parallel sizes of the round trip."""
SIZES = [(300, 200), (60, 333), (48, 48), (400, 97)]


def as_the_hub_has_it(folder: Path) -> None:
    """transformers 4's names, with the newline at the top; and without what transformers 4.39 did not write."""
    tensors, names = load_file(folder / "model.safetensors"), (
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", ""),
    )  # fmt: skip
    older = {}
    for name, value in tensors.items():
        for new, old in names:
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        older[name.replace("vision_tower.", "vision_tower.vision_model.")] = value
    save_file(older, folder / "model.safetensors")
    assert "image_newline" in older and "language_model.model.norm.weight" in older


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_bitwise(tmp_path, name):
    """The newline, which stands in no module, the tower's last layer, tied embeddings; at several layouts."""
    write, sizes, tp_size, stages = MODELS[name]
    source = write(tmp_path / "in", **sizes)
    write_heads(source)
    config = read_model_config(source)
    pinpoints = tuple(map(tuple, NEXT_PINPOINTS if write is write_tiny_next else ONEVISION_PINPOINTS))
    expected = TilesConfig(pinpoints=pinpoints)
    if write is write_tiny_onevision:
        expected = replace(expected, max_tiles=3, only_alone=True)
    assert config.tiles == expected and config.visual_tokens == 36
    assert config.language.tie_word_embeddings == sizes.get("tie", False)
    imported = import_everywhere(source, config, tp_size=tp_size, stages=stages)
    assert not any(report.fresh for report in imported.reports.values())
    out = tmp_path / "out"
    carried = carried_of(source, config)
    export_hf(imported.provider, config, out, dtype=torch.float32, assets=source, carried=carried)
    assert_same(
        load_exactly(out, AutoModelForImageTextToText).state_dict(),
        load_exactly(source, AutoModelForImageTextToText).state_dict(),
    )
    assert read_model_config(out) == config
    as_the_hub_has_it(source)
    assert read_model_config(source) == config
    assert_same(import_everywhere(source, config).merged, import_everywhere(out, config).merged)


@pytest.mark.parametrize("write", [write_tiny_next, write_tiny_onevision])
@pytest.mark.parametrize("kind", ["own", "other"])
def test_the_exports_processor_gives_as_many_image_tokens_as_the_model_takes(tmp_path, write, kind):
    """Also of LLaVA-OneVision's tiles before a CLIP, whose class token it counts, and LLaVA-NeXT's before a SigLIP."""
    source = write(tmp_path / "in")
    write_heads(source)
    config, out = read_model_config(source), tmp_path / "out"
    if kind == "other":
        pools = {} if config.tiles.only_alone else {"max_tiles": 3, "only_alone": True}
        config = replace(config, tiles=TilesConfig(pinpoints=config.tiles.pinpoints, **pools))
    provider = import_everywhere(source, config).provider
    export_hf(provider, config, out, dtype=torch.float32, assets=source, carried=carried_of(source, config))
    processor, model = processor_of(out), load_exactly(out, AutoModelForImageTextToText)
    for size in SIZES:
        picture = Image.effect_noise(size, 90).convert("RGB")
        batch = processor(images=picture, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
        rows = len(config.image_layout.rows(size, alone=True))
        assert (batch["input_ids"] == config.extra["image_token_index"]).sum() == rows > 36
        with torch.no_grad():
            model(**batch)  # refuses another number of tokens than it has features
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in SIZES[:2]]
    # A list of lists: transformers takes images of one list for the only ones of as many texts.
    batch = processor(images=[pictures], text=["<image> and <image>"], return_tensors="pt")
    rows = sum(len(config.image_layout.rows(size, alone=False)) for size in SIZES[:2])
    assert (batch["input_ids"] == config.extra["image_token_index"]).sum() == rows
    with torch.no_grad():
        model(**batch)


def processor_of(folder: Path) -> Any:
    """What `AutoProcessor` makes of a folder; where torchvision is missing, which its video processor needs, all but
    that."""
    settings = json.loads((folder / "processor_config.json").read_text())
    if settings["processor_class"] == "LlavaNextProcessor" or importlib.util.find_spec("torchvision"):
        return AutoProcessor.from_pretrained(folder)
    options = LlavaOnevisionProcessor.get_processor_dict(folder)[0]
    options.pop("processor_class")
    parts = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = {name: kind.from_pretrained(folder) for name, kind in parts.items()}
    return _WithoutVideos(**parts, **options)


class _WithoutVideos(LlavaOnevisionProcessor):
    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


def test_prompts_are_those_of_published_models(tmp_path):
    """A LLaVA-OneVision that was asked as Vicuna is would answer all the same, and worse."""
    configs = [
        read_model_config(write(tmp_path / name, **sizes))
        for name, write, sizes in (
            ("vicuna", write_tiny_next, {}), ("mistral", write_tiny_next, {"family": "mistral", "head_dim": 12}),
            ("qwen", write_tiny_next, {"family": "qwen2"}), ("onevision", write_tiny_onevision, {}),
        )
    ]  # fmt: skip
    large = replace(configs[0], language=replace(configs[0].language, vocab_size=128_320))
    found = [data_flags(config).version for config in (*configs, large)]
    assert found == ["v1", "mistral", "chatml", "chatml", "llama_3"]
    assert "conversation_template" not in to_config_json(configs[1], "hf", dtype="float32")


def test_inspection_tells_of_tiles(tmp_path):
    folders = write_tiny_next(tmp_path / "next"), write_tiny_onevision(tmp_path / "onevision")
    held = [Holdings(folder) for folder in folders]
    facts = [describe(one) for one in held]
    assert facts[0]["family"] == "Hugging Face LLaVA-NeXT (LlavaNextForConditionalGeneration)"
    assert facts[0]["images"] == "tiles of 48 pixels, in 5 grids of up to 4"
    assert "pooled to as many features as 3 have, one view of an image among several" in facts[1]["images"]
    assert any(line.startswith("tiles: TilesConfig") for line in differences(*held))


def test_lora_of_peft_over_a_llava_next(tmp_path):
    """Its base's newline, of which nothing is said; catches names that only a LLaVA-1.5 has."""
    source, lora = write_tiny_next(tmp_path / "in"), tmp_path / "lora"
    model = load_exactly(source, AutoModelForImageTextToText)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    wrapped = write_adapter(model, lora, 5, r=3, lora_alpha=5, target_modules=targets)
    config = read_adapted_config(lora, source)
    sources = open_adapted_sources(lora, source, config)
    assert config == read_model_config(source) and "newline" not in str(sources.notes)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for name in ("model.language_model.layers.1.self_attn.v_proj.weight", "model.image_newline"):
        torch.testing.assert_close(sources.read(sources.table.canonical(name)), merged[name])


def test_run_config_yaml_holds_tiles(tmp_path):
    model = read_model_config(write_tiny_onevision(tmp_path / "in"))
    config = RunConfig(architecture=model, data=data_flags(model))
    assert from_yaml(to_yaml(config)).architecture == model
    for pinpoints, message in (([[48]], "found 1 values, expected 2"), ([[48, "x"]], "found .x., expected a whole")):
        values = yaml.safe_load(to_yaml(config))
        values["model"]["tiles"]["pinpoints"] = pinpoints
        with pytest.raises(ValueError, match=f"model.tiles.pinpoints: {message}"):
            from_yaml(yaml.safe_dump(values))


def test_defaults_of_the_classes(tmp_path):
    """What files leave out: transformers' own configuration says it."""
    for write, name in ((write_tiny_next, "llava_next"), (write_tiny_onevision, "llava_onevision")):
        folder = write(tmp_path / name)
        full, own = AutoConfig.for_model(name), json.loads((folder / "config.json").read_text())
        ours = TILED_MODELS[name]
        assert [*map(list, ours.pinpoints)] == [*map(list, full.image_grid_pinpoints)]
        assert (ours.image_token, ours.select_layer) == (full.image_token_index, full.vision_feature_layer)
        assert ours.select_strategy == full.vision_feature_select_strategy
        assert ours.language == full.text_config.model_type
        theirs = full.vision_config.to_dict()
        assert {key: theirs[key] for key in ours.vision} == ours.vision
        expected = read_model_config(folder)
        for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
            del own[key]
        (folder / "config.json").write_text(json.dumps(own))
        assert read_model_config(folder) == expected


HUB = {
    "llava-v1.6-mistral-7b-hf": (
        {
            "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "model_type": "llava_next", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "text_config": {
                "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
                "torch_dtype": "bfloat16", "vocab_size": 32064,
            },
            "use_image_newline_parameter": True, "vision_feature_layer": -2,
            "vision_config": {
                "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_select_strategy": "default",
        },
        {
            "aspect_ratio_setting": "anyres", "crop_size": {"height": 336, "width": 336}, "do_center_crop": True,
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "LlavaNextImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        },
        (576, 1 + 4, 576 + 48 * 36 + 36),
    ),
    "llava-onevision-qwen2-0.5b-ov-hf": (
        {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "ignore_index": -100,
            "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
            "image_token_index": 151646, "model_type": "llava_onevision", "projector_hidden_act": "gelu",
            "text_config": {
                "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
                "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
                "num_key_value_heads": 2, "rope_theta": 1000000.0, "tie_word_embeddings": True,
                "torch_dtype": "bfloat16", "vocab_size": 152000,
            },
            "tie_word_embeddings": False, "use_image_newline_parameter": True, "video_token_index": 151647,
            "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1,
            "vision_config": {
                "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26,
                "patch_size": 14, "vision_use_head": False,
            },
            "vision_feature_select_strategy": "full",
        },
        {
            "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
            "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
            "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        (729, 1 + 2 * 3, 729 + 54 * 73 + 54),
    ),
}  # fmt: skip
"""config.json and preprocessor_config.json in the hub's spelling; V, and of a picture of 800 x 600 views and rows."""


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_has(tmp_path, name):
    """Files of transformers 4.39 and 4.45, which leave out what newer ones state, and have keys that are no more."""
    config, processor, (visual_tokens, num_views, num_rows) = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = read_model_config(tmp_path)
    rows = model.image_layout.rows((800, 600), alone=True)
    assert (model.visual_tokens, rows.num_views, len(rows)) == (visual_tokens, num_views, num_rows)
    assert model.language.num_layers in (24, 32) and model.num_vision_layers_built in (23, 26)
    again = to_config_json(model, "hf", dtype="bfloat16")
    for key in config.keys() - {"ignore_index", "use_image_newline_parameter", "text_config", "vision_config"}:
        assert again[key] == (config[key] or model.language.tie_word_embeddings), key


def test_a_grid_that_does_not_fit_is_refused_in_one_line(tmp_path):
    source = write_tiny_next(tmp_path / "in")
    for pinpoints, message in (
        ([[48, 96], [96, 50]], r"config.json: the model's tiles.pinpoints hold 96 x 50 pixels, a grid that the tower "
                               "does not divide; expected multiples of its 48 pixels"),
        ([[48, 1 << 40]], "expected at most 16,384 a side"),
        ([], r"image_grid_pinpoints is \[\]; expected a list of pairs of pixels"),
        ([[48, 96, 48]], "expected a list of pairs of pixels"),
        ([[48, "96"]], "expected a list of pairs of pixels"),
        ([[0, 96]], "does not divide"),
    ):  # fmt: skip
        edit(source, image_grid_pinpoints=pinpoints)
        processor = source / "processor_config.json"
        values = json.loads(processor.read_text())
        values["image_processor"]["image_grid_pinpoints"] = pinpoints
        processor.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            read_model_config(source)


def test_two_files_that_disagree_are_refused_in_one_line(tmp_path):
    source = write_tiny_next(tmp_path / "in")
    edit(source, image_grid_pinpoints=NEXT_PINPOINTS[:3])
    with pytest.raises(ValueError, match=r"image_grid_pinpoints is \[\[48, 96\].*the image processor beside it cuts"):
        read_model_config(source)
    edit(source, image_grid_pinpoints=NEXT_PINPOINTS, use_image_newline_parameter=False)
    with pytest.raises(ValueError, match="use_image_newline_parameter is False"):
        read_model_config(source)


def test_another_models_image_processor_is_refused_in_one_line(tmp_path):
    """A LLaVA-1.5 that would be shown tiles, and a LLaVA-NeXT that would not."""
    plain, tiled = write_tiny_llava(tmp_path / "plain"), write_tiny_next(tmp_path / "tiled")
    names = [folder / "processor_config.json" for folder in (plain, tiled)]
    one, other = (json.loads(name.read_text()) for name in names)
    one["image_processor"], other["image_processor"] = other["image_processor"], one["image_processor"]
    for name, values in zip(names, (one, other), strict=True):
        name.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="LlavaNextImageProcessor cuts pictures into tiles"):
        read_model_config(plain)
    with pytest.raises(ValueError, match="but a LLaVA-NeXT's is LlavaNextImageProcessor"):
        read_model_config(tiled)


@pytest.mark.parametrize("found", ["anyres", "anyres_max_", "anyres_max_0", "anyres_max_x", "pad", 9, None])
def test_vision_aspect_ratio_is_anyres_max_n(tmp_path, found):
    source = write_tiny_onevision(tmp_path / "in")
    edit(source, vision_aspect_ratio=found)
    with pytest.raises(ValueError, match=r"vision_aspect_ratio is .*; expected anyres_max_ and a number of tiles"):
        read_model_config(source)


def test_sizes_of_views_must_be_the_towers(tmp_path):
    source = write_tiny_next(tmp_path / "in")
    file = source / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["size"] = {"shortest_edge": 56}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="makes views of 56 pixels and crops them to 48"):
        read_model_config(source)


def test_tiles_of_no_model_have_no_export(tmp_path):
    config = read_model_config(write_tiny_next(tmp_path / "in"))
    mixed = replace(config, tiles=replace(config.tiles, max_tiles=4))
    assert "as in no model of transformers" in why_not_layout(mixed, "hf")
    with pytest.raises(ValueError, match="as in no model of transformers"):
        to_config_json(mixed, "hf", dtype="float32")
    assert why_not_layout(config, "llava") is None
    pooled = read_model_config(write_tiny_onevision(tmp_path / "onevision"))
    assert "LLaVA-OneVision, which the original LLaVA layout has no place for" in why_not_layout(pooled, "llava")


# ----------------------------------------------------------------------------------------------------- original layout


def test_the_original_layout_round_trips_and_goes_to_transformers(tmp_path):
    """Its pairs are (width, height): a small square gets a tall grid, as there. Catches pairs that stay as they are."""
    source, tensors = write_tiny_original_next(tmp_path / "in")
    write_heads(source)
    config = read_model_config(source)
    assert config.tiles.pinpoints == tuple((height, width) for width, height in NEXT_PINPOINTS)
    assert config.image_layout.cut(40, 40).grid == (2, 1)
    assert data_flags(config).image_aspect_ratio == "stretch"
    imported = import_everywhere(source, config, tp_size=2, stages=2)
    carried = carried_of(source, config)
    for layout in ("llava", "hf"):
        out, options = tmp_path / layout, {"dtype": torch.float32, "assets": source, "carried": carried}
        export_hf(imported.provider, config, out, layout=layout, **options)
        found = read_model_config(out)
        assert found.tiles == config.tiles
        again = import_everywhere(out, found).merged
        for name, value in imported.merged.items():
            assert torch.equal(again[name][: len(value)], value[: len(again[name])]), name
    assert_same(all_tensors(tmp_path / "llava"), tensors)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "llava"))
    for key in ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints"):
        assert before[key] == after[key]
    load_exactly(tmp_path / "hf", AutoModelForImageTextToText)


@pytest.mark.parametrize("merge", ["flat", "spatial", None])
def test_views_that_are_merged_otherwise_are_refused(tmp_path, merge):
    source, _ = write_tiny_original_next(tmp_path / "in")
    edit(source, mm_patch_merge_type=merge)
    with pytest.raises(ValueError, match=r"anyres' and mm_patch_merge_type .*by 'spatial_unpad' only"):
        read_model_config(source)
    edit(source, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="pad")
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'spatial_unpad'"):
        read_model_config(source)


def test_a_connector_without_a_newline_leaves_the_models_own(tmp_path):
    """LLaVA's stage 1 saves mm_projector alone."""
    source, tensors = write_tiny_original_next(tmp_path / "in")
    config, adapter = read_model_config(source), tmp_path / "mm_projector.bin"
    new = save_adapter(adapter, "model.mm_projector.")
    imported = import_everywhere(source, config, adapter=adapter)
    assert torch.equal(imported.merged["connector.0.weight"], new["0.weight"])
    assert torch.equal(imported.merged["connector.image_newline"], tensors["model.image_newline"])
    assert any("has no image_newline: the model's own stays" in note for note in imported.reports[0, 0].notes)
    assert "has no image_newline" in load_adapter(imported.modules[0, 0], adapter, config)[0]


def test_two_parts_have_a_fresh_newline(tmp_path):
    """As the rest of the connector; `image_newline` alone may be fresh too."""
    llama, clip, _ = write_parts(tmp_path / "parts", whole_clip=False)
    config = replace(read_model_config(llama, clip), tiles=TilesConfig(pinpoints=((48, 96),)))
    report = import_everywhere(llama, config).reports[0, 0]
    assert "connector.image_newline" in report.fresh and "connector.0.weight" in report.fresh
    save_adapter(tmp_path / "mm_projector.bin", "model.mm_projector.")
    report = import_everywhere(llama, config, adapter=tmp_path / "mm_projector.bin").reports[0, 0]
    assert "connector.image_newline" in report.fresh and "connector.0.weight" not in report.fresh
