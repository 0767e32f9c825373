"""Qwen2, Qwen3 and Mistral go the whole way: converted from two folders, trained, with LoRA too, exported and reopened.

transformers' own models are the oracle: `--verify` compares their logits with ours on the way in and on the way out.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaForConditionalGeneration

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.config.families import language_family
from hacl_megatron.train import run
from tests.checkpoint.hf.round_trip_files import all_tensors
from tests.distributed import run_distributed
from tests.tiny import FAMILY_SIZES, randomise, tiny_image_processor, tiny_llava_config, tiny_tokenizer
from tests.tool_runs import run_tool, to_hf, to_megatron
from tests.training.runs import weights
from tests.training.test_registration import command

TRAINED = {
    "qwen2": "self_attention.linear_qkv.bias",
    "qwen3": "self_attention.k_layernorm.weight",
    "mistral": "self_attention.linear_qkv.weight",
}


def write_parts(folder: Path, family: str) -> tuple[Path, Path]:
    """Folders of a text model and of a CLIP, as transformers saves them."""
    config = tiny_llava_config(**FAMILY_SIZES[family])
    language = AutoModelForCausalLM.from_config(config.text_config)
    assert type(language).__name__.lower() == f"{family}forcausallm"
    tower = CLIPVisionModel(config.vision_config)
    for seed, model in enumerate((language, tower)):
        randomise(model, seed)
    language.save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "text")
    tower.save_pretrained(folder / "clip")
    tiny_image_processor().save_pretrained(folder / "clip")
    return folder / "text", folder / "clip"


def whole_way(folder: Path, family: str) -> None:
    text, clip = write_parts(folder, family)
    parts = ("--vision-tower", clip, "--language-model", text)
    converted = folder / "converted"
    assert run_tool("convert_hf_to_megatron", *parts, "--save", converted) == 0
    start = to_hf(converted, folder / "start", "--dtype", "float32", "--verify")
    before = all_tensors(start)
    for name, tensor in all_tensors(text).items():
        assert torch.equal(before[f"language_model.{name}"], tensor), name
    to_megatron(start, folder / "again", "--verify")
    if (original := language_family(family).llava_model_types) != ():
        back = to_hf(converted, folder / "original", "--dtype", "float32", "--format", "llava")
        written = all_tensors(back)
        assert all(torch.equal(written[name], tensor) for name, tensor in all_tensors(text).items())
        assert json.loads((back / "config.json").read_text())["model_type"] == original[0]
        assert read_model_config(back).language == read_model_config(start).language
    assert read_model_config(start).language == read_model_config(text, clip).language

    run(command(folder, converted, "plain"))
    run(command(folder, converted, "lora", "--lora-rank", "2", "--use-distributed-optimizer"))
    at_start = weights(converted)
    for save, trained in (("plain", TRAINED[family]), ("lora", "linear_qkv_lora.k_proj_B")):
        after = weights(folder / save)
        name = next(name for name in after if name.startswith("language_model.") and name.endswith(trained))
        assert not torch.equal(after[name], at_start.get(name, torch.zeros_like(after[name]))), name
        out = to_hf(folder / save, folder / f"{save}-hf", "--dtype", "float32", "--verify")
        _, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_a_family_goes_the_whole_way(tmp_path: Path, family: str) -> None:
    """Fails where one of a family's own tensors (biases, norms, wider heads) is dropped, or read as LLaMA's."""
    run_distributed(whole_way, 1, tmp_path, family)
