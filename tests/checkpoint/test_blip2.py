"""BLIP-2 and MiniGPT-4: Hugging Face -> our shards -> Hugging Face, bitwise for every tensor and whole for generation."""

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

from hacl_megatron.checkpoint.hf_config import read_model_config
from hacl_megatron.checkpoint.hf_export import export_hf, export_projector
from hacl_megatron.checkpoint.hf_import import HEADS_FILE, load_adapter, load_hf_weights, open_sources
from tests.checkpoint.rank_modules import import_everywhere, module_of, rank_shapes
from tests.checkpoint.test_hf_round_trip import LAYOUTS, assert_same, write_heads
from tests.tiny import (
    LLAMA3_ROPE_SCALING,
    randomise,
    tiny_blip2_config,
    tiny_blip_image_processor,
    tiny_llama_config,
    tiny_tokenizer,
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
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_llama(folder: Path, seed: int = 3) -> LlamaForCausalLM:
    """A LLaMA with a tokenizer that has neither `<image>` nor `<pad>`: 320 pieces, as many rows."""
    config = tiny_llama_config(vocab=331)
    config.vocab_size, config.pad_token_id = 320, None
    model = LlamaForCausalLM(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder / "with-image")
    shutil.copy(folder / "with-image" / "tokenizer.model", folder) if (
        folder / "with-image" / "tokenizer.model"
    ).is_file() else None
    return model


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
