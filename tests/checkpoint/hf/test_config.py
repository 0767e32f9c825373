"""config.json -> ModelConfig -> config.json, against what transformers makes of the same files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.config_write import to_config_json, vocabulary_of_layout
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.towers import CLIP
from tests.tiny import LLAMA3_ROPE_SCALING, tiny_llava_config, tiny_processor, write_tiny_original_llava


def write_config(folder: Path, content: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def hf_folder(folder: Path, **sizes: object) -> Path:
    tiny_llava_config(**sizes).save_pretrained(folder)
    return folder


def edited(folder: Path, part: str | None, **changes: object) -> Path:
    content = json.loads((folder / "config.json").read_text())
    (content[part] if part else content).update(changes)
    return write_config(folder, content)


def test_sizes_of_the_tiny_model(tmp_path):
    config = read_model_config(hf_folder(tmp_path, tie=True, rope_scaling=LLAMA3_ROPE_SCALING, select_layer=-1))
    language, vision = config.language, config.vision
    assert (language.num_layers, language.hidden_size, language.ffn_hidden_size) == (4, 48, 88)
    assert (language.num_attention_heads, language.num_query_groups, language.head_dim) == (6, 2, 8)
    assert (language.vocab_size, language.tie_word_embeddings, language.norm_epsilon) == (331, True, 1e-5)
    assert (language.rotary_base, language.max_position_embeddings) == (10000.0, 512)
    assert language.rope_scaling == LLAMA3_ROPE_SCALING
    assert (vision.num_layers, vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads) == (4, 32, 64, 4)
    assert (vision.image_size, vision.patch_size, vision.num_patches, vision.activation) == (48, 8, 36, "quick_gelu")
    assert (config.projector_type, config.vision_select_layer, config.num_vision_layers_built) == ("mlp2x_gelu", -1, 4)
    assert config.extra["image_token_index"] == 320 and config.extra["pad_token_id"] == 321
    assert yaml.safe_load(yaml.safe_dump(config.extra)) == config.extra  # run_config.yaml holds it


def test_defaults_that_the_published_file_leaves_out(tmp_path):
    """llava-1.5-7b-hf states seven of LLaMA's values; the rest are LlamaConfig's defaults."""
    text = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
            "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064}  # fmt: skip
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
              "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
              "vocab_size": 32000}  # fmt: skip
    write_config(tmp_path, {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": text,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": vision, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
    })  # fmt: skip
    config = read_model_config(tmp_path)
    language = config.language
    assert (language.hidden_size, language.num_layers, language.ffn_hidden_size) == (4096, 32, 11008)
    assert (language.num_attention_heads, language.num_query_groups, language.kv_channels) == (32, 32, None)
    assert (config.vision.num_patches, config.num_vision_layers_built, config.projection_size) == (576, 23, 1024)
    assert (config.extra["pad_token_id"], config.extra["dtype"]) == (32001, "float16")
    assert vocabulary_of_layout(config, "hf") == (32064, 32000, 32001)
    assert vocabulary_of_layout(config, "llava") == (32000, None, 0)


@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4", "both", "oldest"])
def test_rope_scaling_in_every_spelling(tmp_path, spelling):
    scaling = LLAMA3_ROPE_SCALING
    rope = {
        "transformers 5": {"rope_parameters": {"rope_theta": 5e5, **scaling}},
        "transformers 4": {"rope_theta": 5e5, "rope_scaling": scaling},
        "both": {"rope_theta": 5e5, "rope_scaling": scaling, "rope_parameters": {"rope_theta": 5e5, **scaling}},
        "oldest": {"rope_theta": 5e5, "rope_scaling": {**scaling, "rope_type": None, "type": "llama3"}},
    }[spelling]
    content = json.loads((hf_folder(tmp_path) / "config.json").read_text())
    content["text_config"].pop("rope_parameters", None)
    content["text_config"].update(rope)
    language = read_model_config(write_config(tmp_path, content)).language
    assert (language.rotary_base, language.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE_SCALING])
def test_written_config_means_the_same_to_transformers(tmp_path, scaling):
    folder = hf_folder(tmp_path / "in", rope_scaling=scaling, tie=True, select_layer=2)
    config = read_model_config(folder)
    out = write_config(tmp_path / "out", to_config_json(config, "hf", dtype="float32"))
    before, after = (LlavaConfig.from_pretrained(path).to_dict() for path in (folder, out))
    for part in ("text_config", "vision_config"):
        one, two = before.pop(part), after.pop(part)
        keys = (one.keys() | two.keys()) - {"architectures", "_name_or_path", "dtype"}
        assert {key for key in keys if one.get(key) != two.get(key)} == set()
    keys = (before.keys() | after.keys()) - {"_name_or_path", "dtype", "pad_token_id", "architectures"}
    assert {key for key in keys if before.get(key) != after.get(key)} == set()
    assert read_model_config(out) == replace(config, extra={**config.extra, "dtype": "float32"})


def test_head_dim_that_does_not_follow_from_the_width(tmp_path):
    config = read_model_config(edited(hf_folder(tmp_path), "text_config", head_dim=16))
    assert config.language.kv_channels == config.language.head_dim == 16
    assert to_config_json(config, "hf", dtype="float32")["text_config"]["head_dim"] == 16


@pytest.mark.parametrize("family, window", [("mistral", 4096), ("qwen2", None), ("qwen3", None)])
def test_what_a_family_says_where_its_file_is_silent(tmp_path, family, window):
    """Catches LLaMA's defaults for all: 32 query groups, ids 1 and 2 for BOS and EOS, heads of hidden / heads."""
    content = json.loads((hf_folder(tmp_path, heads=32, hidden=64) / "config.json").read_text())
    text = {key: content["text_config"][key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    folder = write_config(tmp_path, {**content, "text_config": {**text, "model_type": family}, "image_token_index": 5})
    config, parsed = read_model_config(folder), LlavaConfig.from_pretrained(folder).text_config
    language = config.language
    head_dim = getattr(parsed, "head_dim", None) or 64 // parsed.num_attention_heads
    assert (language.family, language.head_dim, language.sliding_window) == (family, head_dim, window)
    assert language.num_query_groups == parsed.num_key_value_heads and language.norm_epsilon == parsed.rms_norm_eps
    assert (language.vocab_size, language.rotary_base) == (parsed.vocab_size, parsed.rope_parameters["rope_theta"])
    back = to_config_json(config, "hf", dtype="float32")["text_config"]
    assert (back["bos_token_id"], back["eos_token_id"]) == (parsed.bos_token_id, parsed.eos_token_id)
    again = LlavaConfig.from_pretrained(write_config(tmp_path / "out", to_config_json(config, "hf", dtype="float32")))
    found, expected = again.text_config.to_dict(), parsed.to_dict()
    differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    assert differing <= {"architectures", "dtype", "_name_or_path"}, differing


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_token_that_is_none_stays_none(tmp_path, family):
    """Catches BOS 1 and EOS 2 in the export of a model whose file says null: the family's defaults are for files that
    are silent."""
    folder = hf_folder(tmp_path / "null", family=family)
    silent = hf_folder(tmp_path / "silent", family=family)
    edited(folder, "text_config", bos_token_id=None, eos_token_id=None)
    content = json.loads((silent / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id"):
        content["text_config"].pop(key, None)
    write_config(silent, content)
    for source in (folder, silent):
        theirs = LlavaConfig.from_pretrained(source).text_config
        written = to_config_json(read_model_config(source), "hf", dtype="float32")
        found = LlavaConfig.from_dict(written).text_config
        assert (found.bos_token_id, found.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert LlavaConfig.from_pretrained(folder).text_config.bos_token_id is None


def test_processor_settings_in_both_files(tmp_path):
    folder = hf_folder(tmp_path)
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)
    assert (folder / "processor_config.json").is_file() and not (folder / "preprocessor_config.json").exists()
    assert read_model_config(folder).image.mean == (0.1, 0.2, 0.3)
    processor.image_processor.image_std = [0.4, 0.5, 0.6]
    processor.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").unlink()
    assert read_model_config(folder).image.std == (0.4, 0.5, 0.6)
    processor.image_processor.crop_size = {"height": 40, "width": 40}
    processor.image_processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="images of 40 pixels, but the tower takes 48"):
        read_model_config(folder)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"mlp_bias": True}, "mlp_bias is True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("text_config", {"model_type": "gemma"}, "text_config.model_type is 'gemma'"),
        ("text_config", {"model_type": "qwen2_moe"}, "text_config.model_type is 'qwen2_moe'"),
        ("text_config", {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ("text_config", {"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ("text_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("text_config", {"num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ("text_config", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type is 'longrope'"),
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "factor of the linear rope scaling is '2'",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "llama3 rope scaling lacks low_freq",
        ),
        ("text_config", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("text_config", {"hidden_size": "wide"}, "LlamaConfig cannot be read"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "siglip_vision_model"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("vision_config", {"num_channels": 1}, "takes 1 channels"),
        ("vision_config", {"patch_size": 7}, "image_size 48 must be a multiple of patch_size 7"),
        (None, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        (None, {"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        (None, {"vision_feature_layer": [-2, -5]}, "features from one layer only"),
        (None, {"vision_feature_layer": -5}, "selected vision layer is -5, but the tower has 4"),
        (None, {"vision_feature_layer": 0}, "selected vision layer is 0"),
        (None, {"image_token_index": 331}, "image_token_index is 331, but the vocabulary has 331 rows; expected an id"),
        (None, {"image_token_index": -200}, "image_token_index is -200, but the vocabulary has 331 rows"),
        (None, {"image_token_index": "<image>"}, "image_token_index is '<image>'"),
        (None, {"model_type": "qwen2_vl"}, "found model_type 'qwen2_vl'"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(tmp_path, part, changes, message):
    folder = edited(hf_folder(tmp_path), part, **changes)
    with pytest.raises(ValueError) as caught:
        read_model_config(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_folder_without_or_with_a_broken_config(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava", ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_model_config(tmp_path)


# ------------------------------------------------------------------------------------------------------ original layout


def original_config(folder: Path, **changes: object) -> Path:
    """What the published llava-v1.5-7b says, as far as it matters."""
    return write_config(folder, {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 4096, "hidden_act": "silu",
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16",
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "use_mm_proj": True,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "image_aspect_ratio": "pad", **changes,
    })  # fmt: skip


def test_original_layout_with_a_tower_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_model_config(original_config(tmp_path / "llava"))
    assert (config.vision.num_layers, config.vision.image_size, config.image.size) == (24, 336, 336)
    assert config.extra["image_aspect_ratio"] == "pad" and config.extra["layout"] == "llava"
    back = to_config_json(config, "llava", dtype="float16")
    assert back["mm_vision_tower"] == "openai/clip-vit-large-patch14-336" and back["vocab_size"] == 32000
    # and as the hub's conversion of the same model has it
    hf = to_config_json(config, "hf", dtype="float16")
    assert (hf["text_config"]["vocab_size"], hf["image_token_index"], hf["pad_token_id"]) == (32064, 32000, 32001)
    parsed = LlavaConfig(**{key: value for key, value in hf.items() if key not in ("model_type", "architectures")})
    assert isinstance(parsed.text_config, LlamaConfig) and isinstance(parsed.vision_config, CLIPVisionConfig)
    assert parsed.image_seq_length == 576


def test_original_layout_finds_its_tower(tmp_path, monkeypatch):
    folder, _ = write_tiny_original_llava(tmp_path / "llava")
    tower = tmp_path / "llava-clip"
    expected = read_model_config(folder)
    assert expected.vision.hidden_size == 32 and expected.extra["vision_tower_folder"] == str(tower)
    monkeypatch.chdir(tmp_path)
    assert read_model_config(edited(folder, None, mm_vision_tower="llava-clip")).vision == expected.vision
    assert read_model_config(edited(folder, None, mm_vision_tower="../llava-clip")).vision == expected.vision
    unknown = edited(folder, None, mm_vision_tower="someone/tower")
    with pytest.raises(ValueError, match=r"someone/tower.*give the folder of the CLIP tower"):
        read_model_config(unknown)
    assert read_model_config(unknown, vision_tower=tower).vision == expected.vision
    with pytest.raises(ValueError, match=r"no config.json there"):
        read_model_config(unknown, vision_tower=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mm_hidden_size is 1024, but the tower's is 32"):
        read_model_config(edited(folder, None, mm_hidden_size=1024), vision_tower=tower)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mm_projector_type": "identity"}, "mm_projector_type is 'identity'"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type is 'mlp0x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
    ],
)
def test_original_layout_refuses_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        read_model_config(original_config(tmp_path / "llava", **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_projector_type_is_linear_as_in_llava(tmp_path):
    folder = original_config(tmp_path / "llava")
    content = json.loads((folder / "config.json").read_text())
    del content["mm_projector_type"]
    assert read_model_config(write_config(folder, content)).projector_type == "linear"


def test_llama_alone_asks_for_a_tower(tmp_path):
    tiny_llava_config().text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a LLaMA without a vision tower; give the folder of one beside it"):
        read_model_config(tmp_path)


# ----------------------------------------------------------------------------------------------------------- vocabulary


def with_vocabulary(rows: int, **extra: int) -> ModelConfig:
    from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, VisionConfig

    language = LanguageConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=rows
    )
    vision = VisionConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, image_size=8, patch_size=4
    )
    return ModelConfig(language=language, vision=vision, image=ImageConfig(size=8), extra=extra)


@pytest.mark.parametrize(
    "rows, extra, num_tokens, hf, llava",
    [
        (32000, {"pad_token_id": 0}, 32000, (32064, 32000, 32001), (32000, None, 0)),
        (32000, {"pad_token_id": 0}, 31990, (32000, 31990, 31991), (32000, None, 0)),  # spare rows are used
        (31999, {}, 31999, (32064, 31999, 32000), (31999, None, None)),
        (32064, {"image_token_index": 32000, "pad_token_id": 32001}, None, (32064, 32000, 32001), (32000, None, 0)),
        (
            128320,
            {"image_token_index": 128257, "pad_token_id": 128256},
            None,
            (128320, 128257, 128256),
            (128256, None, 0),
        ),
        (32064, {"image_token_index": 7, "pad_token_id": 0}, None, (32064, 7, 0), (32064, None, 0)),  # within: kept
        (331, {"image_token_index": 320}, None, (331, 320, None), (320, None, 0)),
    ],
)
def test_rows_and_special_tokens_of_each_layout(rows, extra, num_tokens, hf, llava):
    config = with_vocabulary(rows, **extra)
    assert tuple(vocabulary_of_layout(config, "hf", num_tokens)) == hf
    assert tuple(vocabulary_of_layout(config, "llava")) == llava


@pytest.mark.parametrize("rows, image, pad, pieces, llava", [
    (331, 320, 321, 320, (320, None, 0)),
    (331, 319, 321, 320, (331, None, 321)),  # <image> is a piece of the tokenizer
    (331, 321, 300, 320, (321, None, 0)),  # <pad> is one
    (331, 3, 321, 320, (331, None, 321)),
    (50, 3, 48, 40, (50, None, 48)),
])  # fmt: skip
def test_no_row_of_the_tokenizers_own_pieces_is_cut(rows, image, pad, pieces, llava):
    """Catches a cut from wherever `<image>` or `<pad>` lies among the last 64 rows, with the pieces behind it."""
    config = with_vocabulary(rows, image_token_index=image, pad_token_id=pad)
    assert tuple(vocabulary_of_layout(config, "llava", pieces)) == llava


def test_known_towers_have_every_size():
    for values in CLIP.published.values():
        config = CLIPVisionConfig(**values)
        assert config.image_size % config.patch_size == 0 and config.hidden_size // config.num_attention_heads == 64
