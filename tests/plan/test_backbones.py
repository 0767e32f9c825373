"""examples/backbones: published rates, sizes as the published folders state them, and plans; MiniGPT-4's sizes too.

A dry run of them at 1,024 ranks is in `test_dry_run`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hacl_megatron.assemble.start_from import resolve
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE
from hacl_megatron.config.run import from_yaml, parse_run_config, to_yaml
from hacl_megatron.platform.hardware import GIB
from tests.plan.example_plans import REPOSITORY, plan_of

FOLDER = REPOSITORY / "examples" / "backbones"
ALWAYS = dict(
    num_train_epochs=1, lr_decay_style="cosine", lr_warmup_fraction=0.03, weight_decay=0.0, bf16=True,
    model_max_length=2048, freeze_ViT=True, contrastive_weight=0.0,
)  # fmt: skip
STAGE_1 = dict(lr=1e-3, global_batch_size=256, micro_batch_size=16, version="plain", freeze_LM=True)
STAGE_2 = dict(lr=1e-5, global_batch_size=64, micro_batch_size=8, freeze_LM=False, group_by_modality_length=True)
PUBLISHED = {
    "pretrain_qwen2_5_7b": {**STAGE_1, "image_aspect_ratio": "stretch"},
    "qwen2_5_7b": {**STAGE_2, "version": "chatml", "image_aspect_ratio": "stretch"},
    "pretrain_llama3_1_8b": {**STAGE_1, "image_aspect_ratio": "square"},
    "llama3_1_8b": {**STAGE_2, "version": "llama_3", "image_aspect_ratio": "pad"},
}
PARAMETERS = {"qwen2_5_7b": 7_615_616_512, "llama3_1_8b": 8_030_261_248}
"""Of the language models, as Qwen and Meta publish them."""

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
"""config.json of Qwen/Qwen2.5-7B-Instruct."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
"""config.json of meta-llama/Llama-3.1-8B-Instruct."""
SIGLIP = {
    "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip", "torch_dtype": "float32",
    "text_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_text_model", "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
"""config.json of google/siglip-so400m-patch14-384, and its processor's."""
SIGLIP_IMAGES = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor", "image_std": [0.5, 0.5, 0.5], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384},
}  # fmt: skip
CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
"""config.json of openai/clip-vit-large-patch14-336, as far as its tower goes, and its processor's."""
CLIP_IMAGES = {
    "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 336,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
VICUNA = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
"""config.json of lmsys/vicuna-7b-v1.5."""
BLIP_2 = {
    "architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2", "num_query_tokens": 32,
    "qformer_config": {"model_type": "blip_2_qformer", "vocab_size": 30523},
    "text_config": {"model_type": "t5"}, "vision_config": {"model_type": "blip_2_vision_model"},
}  # fmt: skip
"""config.json of Salesforce/blip2-flan-t5-xxl, which leaves the other sizes to the classes' defaults."""
BLIP_2_IMAGES = {**CLIP_IMAGES, "size": {"height": 224, "width": 224}}
del BLIP_2_IMAGES["crop_size"], BLIP_2_IMAGES["do_center_crop"]
PARTS = {
    "qwen2_5_7b": (QWEN, SIGLIP, SIGLIP_IMAGES), "llama3_1_8b": (LLAMA, CLIP, CLIP_IMAGES),
    "minigpt4": (VICUNA, BLIP_2, BLIP_2_IMAGES),
}  # fmt: skip
STAGES = {
    **{name: (f"backbones/pretrain_{name}.yaml", f"backbones/{name}.yaml") for name in PARAMETERS},
    "minigpt4": ("minigpt4/pretrain_7b.yaml", "minigpt4/finetune_7b.yaml"),
}


def example(name: str) -> Any:
    return from_yaml((FOLDER / f"{name}.yaml").read_text(), name)


def test_every_file_is_held_against_what_was_published() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyper_parameters_are_the_published_ones_and_the_run_fits(name: str) -> None:
    """Catches a rate, a batch or a template that is another's, and a plan that counts another model."""
    config = example(name)
    groups = (config.model, config.data, config.objective, config.optimizer, config.training)
    flags = {key: value for group in groups for key, value in vars(group).items()}
    expected = {**ALWAYS, **PUBLISHED[name]}
    assert {key: flags[key] for key in expected} == expected
    plan = plan_of(config, 8)
    assert plan.fits
    assert sum(plan.parts["language_model"]) == PARAMETERS[name.removeprefix("pretrain_")]


def test_the_readme_has_the_plans_numbers() -> None:
    """Catches a table that was not made anew when a file or the planner changed."""
    plans = [plan_of(example(name), 8) for name in PUBLISHED]
    lines = (FOLDER / "README.md").read_text().splitlines()
    for title, found in (
        ("GiB a GPU", [f"{plan.memory / GIB:.1f}" for plan in plans]),
        ("hours", [f"{plan.seconds / 3600:.1f}" for plan in plans]),
    ):
        assert f"| {title} | {' | '.join(found)} |" in lines


@pytest.mark.parametrize("name", PARTS)
def test_model_sections_are_what_the_weights_say(name: str, tmp_path: Path) -> None:
    """Catches a file whose own weights are refused as another model's, in stage 1 as Hugging Face has them (a tower's
    configuration states more fields than anybody writes down), in stage 2 as a checkpoint has them."""
    language, tower, images = PARTS[name]
    for part, files in (("text", {"config": language}), ("tower", {"config": tower, "preprocessor_config": images})):
        (tmp_path / part).mkdir()
        for file, values in files.items():
            (tmp_path / part / f"{file}.json").write_text(json.dumps(values))
    first, second = (REPOSITORY / "examples" / file for file in STAGES[name])
    parts = ["--pretrained-checkpoint", str(tmp_path / "text"), "--vision-tower", str(tmp_path / "tower")]
    fresh = ["--load", str(tmp_path / "none")]
    resolved = resolve(parse_run_config(["--config", str(first), *parts, *fresh]))

    saved = tmp_path / "stage-1" / "iter_0000001"
    saved.mkdir(parents=True)
    (saved / RUN_CONFIG_FILE).write_text(to_yaml(resolved))
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("1")
    start = ["--pretrained-checkpoint", str(saved.parent), *fresh]
    resolve(parse_run_config(["--config", str(second), *start]))

    other = yaml.safe_load(second.read_text())
    vision = other["model"]["vision"]
    vision["ffn-hidden-size"] += 1
    if "hf" in vision:
        vision["hf"]["intermediate_size"] += 1
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"the YAML's model.vision is"):
        resolve(parse_run_config(["--config", str(tmp_path / "other.yaml"), *start]))


@pytest.mark.parametrize("image", [None, {"size": 384}])
def test_images_are_as_the_tower_has_them_where_nobody_says(tmp_path: Path, image: dict | None) -> None:
    """Catches CLIP's mean and deviation before a SigLIP."""
    file = REPOSITORY / "examples" / "backbones" / "qwen2_5_7b.yaml"
    values = yaml.safe_load(file.read_text())
    said = parse_run_config(["--config", str(file)]).architecture.image
    assert said.mean == said.std == (0.5, 0.5, 0.5)
    values["model"] = {key: value for key, value in values["model"].items() if key != "image"}
    values["model"] |= {} if image is None else {"image": image}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert parse_run_config(["--config", str(tmp_path / "run.yaml")]).architecture.image == said
