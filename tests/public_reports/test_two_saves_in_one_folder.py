"""A folder that holds more weights than one save left: what transformers reads of it is what is converted.

Public reports: diffusers#14719: an old index beside newer weights.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.import_weights import open_sources
from tests.tiny import write_tiny_llava
from tests.tool_runs import apart, to_megatron

SMALL = {"layers": 1, "vision_layers": 2}
SHARDED = {**SMALL, "max_shard_size": "100KB"}
HEAD = "text.lm_head.weight"


def write_bin(folder: Path, tensors: dict[str, Tensor], *, shards: bool) -> None:
    """As `save_pretrained` of 4.x left them without safetensors."""
    if not shards:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, some in parts.items():
        torch.save({name: tensors[name] for name in some}, folder / file)
    weight_map = {name: file for file, some in parts.items() for name in some}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def one_file_over_shards(folder: Path) -> None:
    write_tiny_llava(folder, **SHARDED, seed=1)
    shards = {path: path.read_bytes() for path in folder.glob("model-*")}
    write_tiny_llava(folder, **SMALL, seed=2)
    for path, content in shards.items():  # transformers has removed them, a copy of a download has not
        path.write_bytes(content)
    assert (folder / "model.safetensors.index.json").is_file() and len(shards) > 1


def saved_over_shards(folder: Path) -> None:
    write_tiny_llava(folder, **SHARDED, seed=1)
    write_tiny_llava(folder, **SMALL, seed=2)
    assert (folder / "model.safetensors.index.json").is_file() and not list(folder.glob("model-*"))


def shards_saved_over_one_file(folder: Path) -> None:
    write_tiny_llava(folder, **SMALL, seed=1)
    write_tiny_llava(folder, **SHARDED, seed=2)
    assert (folder / "model.safetensors").is_file()


def one_bin_over_shards(folder: Path) -> None:
    write_tiny_llava(folder, **SMALL, seed=1)
    write_bin(folder, load_file(folder / "model.safetensors"), shards=True)
    write_tiny_llava(folder, **SMALL, seed=2)
    write_bin(folder, load_file(folder / "model.safetensors"), shards=False)
    (folder / "model.safetensors").unlink()


def shards_of_safetensors_over_one_bin(folder: Path) -> None:
    write_tiny_llava(folder, **SMALL, seed=1)
    write_bin(folder, load_file(folder / "model.safetensors"), shards=False)
    (folder / "model.safetensors").unlink()
    write_tiny_llava(folder, **SHARDED, seed=2)


@pytest.mark.parametrize("leave", [
    one_file_over_shards, saved_over_shards, shards_saved_over_one_file, one_bin_over_shards,
    shards_of_safetensors_over_one_bin,
])  # fmt: skip
def test_the_files_are_those_that_transformers_reads(tmp_path, leave):
    """Catches an index that wins over the one file beside it, a folder refused for shards that are gone, and silence
    about the weights that are not read."""
    folder = tmp_path / "in"
    leave(folder)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    sources = open_sources(folder, read_model_config(folder))
    assert torch.equal(sources.read(HEAD), theirs.lm_head.weight)
    assert torch.equal(sources.read("text.norm.weight"), theirs.model.language_model.norm.weight)
    assert torch.equal(sources.read("projector.2.bias"), theirs.model.multi_modal_projector.linear_2.bias)
    two = leave is not shards_of_safetensors_over_one_bin
    assert len(sources.notes) == two
    if two:
        one = "pytorch_model.bin" if leave is one_bin_over_shards else "model.safetensors"
        (note,) = sources.notes
        assert note.startswith(f"{folder / one} is read") and f"{one}.index.json" in note


def test_their_logits_are_the_conversions_and_it_says_what_it_read(tmp_path):
    one_file_over_shards(tmp_path / "in")
    _, out = apart(to_megatron, tmp_path / "in", tmp_path / "save", "--verify")
    assert "verify: largest logit difference" in out
    assert f"note: {tmp_path / 'in' / 'model.safetensors'} is read, as transformers does" in out
