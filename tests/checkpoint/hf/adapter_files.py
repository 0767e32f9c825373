"""Adapter folders as `peft` itself and LLaVA's `train.py` write them, and what transformers computes with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from hacl_megatron.batch import PackedBatch
from tests.checkpoint.hf.round_trip_files import write_parts
from tests.tiny import randomise

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
IN_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""As LLaVA's `find_all_linear_names` has them."""
FACTS = {
    "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "use_mm_proj": True,
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
}  # fmt: skip


def write_adapter(base: nn.Module, out: Path, seed: int, *, pickle: bool = False, **settings: Any) -> PeftModel:
    """Let peft wrap `base`, draw A, B and whatever is saved whole, and save; returns the wrapped model."""
    wrapped = get_peft_model(base, LoraConfig(**settings))
    parts = {name.replace(".", "-"): p for name, p in wrapped.named_parameters() if p.requires_grad}
    randomise(nn.ParameterDict(parts), seed)
    with torch.no_grad():
        for name, parameter in parts.items():
            parameter.mul_(0.3 if "lora_B" in name else 1.0)  # so that logits stay of order 1
    wrapped.save_pretrained(out, safe_serialization=not pickle)
    return wrapped


def draw_connector(seed: int) -> dict[str, Tensor]:
    """By the names of a `nn.Sequential`: 0.weight, 0.bias, 2.weight, 2.bias."""
    connector = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48))
    randomise(connector, seed)
    return {name: value.detach() for name, value in connector.state_dict().items()}


def write_llava_config(out: Path, llama: Path, clip: Path) -> None:
    """The config.json that LLaVA saves: its base's, and its own keys."""
    settings = json.loads((llama / "config.json").read_text())
    named = {"mm_vision_tower": str(clip), "_name_or_path": str(llama)}
    (out / "config.json").write_text(json.dumps({**settings, **FACTS, **named}))


def write_llava_lora(out: Path, llama: Path, clip: Path, *, seed: int = 3, **settings: Any) -> nn.Module:
    """A folder as `finetune_lora.sh` leaves it; returns the LLaMA with the LoRA merged in by peft."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 10, "target_modules": IN_LLAMA, "task_type": "CAUSAL_LM", **settings}
    wrapped = write_adapter(base, out, seed, pickle=True, **given)
    state = {f"base_model.model.model.mm_projector.{name}": value for name, value in draw_connector(seed).items()}
    torch.save(state, out / "non_lora_trainables.bin")
    torch.save({"argument": 1}, out / "training_args.bin")
    write_llava_config(out, llama, clip)
    return wrapped.merge_and_unload()


@torch.no_grad()
def llava_of(
    folder: Path, language: nn.Module | None = None, connector: dict[str, Tensor] | None = None
) -> LlavaForConditionalGeneration:
    """The LLaVA in `folder` with another language model, another connector."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if language is not None:
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.lm_head.load_state_dict(language.lm_head.state_dict())
    for name, value in (connector or {}).items():
        linear, _, kind = name.partition(".")
        names = {"0": "linear_1", "2": "linear_2"}
        getattr(model.model.multi_modal_projector.get_submodule(names[linear]), kind).copy_(value)
    return model


def write_all(folder: Path) -> Path:
    """`parts` (llava, llama, clip), and adapters over them: llava-lora, peft (everything linear), language, stage1."""
    llama, clip, _ = write_parts(folder / "parts", whole_clip=False)
    shutil.copy(folder / "parts" / "llava" / "tokenizer.model", llama)
    shutil.copy(folder / "parts" / "llava" / "tokenizer.json", llama)
    shutil.copy(folder / "parts" / "llava" / "tokenizer_config.json", llama)
    language = write_llava_lora(folder / "llava-lora", llama, clip)
    language.save_pretrained(folder / "llava-lora-merged")
    for name, settings in {
        "peft": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        "language": {"r": 3, "lora_alpha": 5, "target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"],
                     "use_rslora": True, "lora_dropout": 0.1},
    }.items():  # fmt: skip
        wrapped = write_adapter(llava_of(folder / "parts" / "llava"), folder / name, 5, **settings)
        wrapped.merge_and_unload().save_pretrained(folder / f"{name}-merged")
    (folder / "stage1").mkdir()
    state = {f"model.mm_projector.{name}": value for name, value in draw_connector(9).items()}
    torch.save(state, folder / "stage1" / "mm_projector.bin")
    write_llava_config(folder / "stage1", llama, clip)
    return folder


@torch.no_grad()
def logits_of(model: nn.Module, batch: PackedBatch, image_token: int) -> Tensor:
    """Of every text row of the two dialogues of `random_batch`, each run alone."""
    found = []
    for dialogue in range(2):
        start, stop = batch.cu_seqlens[dialogue : dialogue + 2].tolist()
        inside = (batch.image_rows >= start) & (batch.image_rows < stop)
        text = torch.ones(stop - start, dtype=torch.bool)
        text[batch.image_rows[inside] - start] = False
        ids = batch.token_ids[start:stop].clone()
        ids[~text] = image_token
        found.append(
            model(input_ids=ids[None], pixel_values=batch.pixel_values[dialogue][None], use_cache=False).logits[0][text]
        )
    return torch.cat(found)
