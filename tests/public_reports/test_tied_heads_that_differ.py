"""A `config.json` that ties LM head and embedding over files in which they differ: transformers is who decides.

Public reports: vllm#51063: a tied `config.json` over files whose heads differ.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, LlamaForCausalLM, LlavaForConditionalGeneration

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from tests.checkpoint.hf.round_trip_files import load_exactly
from tests.tiny import write_tiny_blip2, write_tiny_llava, write_tiny_original_llava
from tests.tool_runs import apart, run_tool, to_hf, to_megatron

SMALL = {"layers": 1, "vision_layers": 2}
OUTPUT, EMBEDDING = "language_model.output_layer.weight", "language_model.embedding.word_embeddings.weight"


def say_tied(folder: Path, *, top: bool | None, text: bool | None) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for level, value in ((content, top), (content.get("text_config", {}), text)):
        level.pop("tie_word_embeddings", None)
        if value is not None:
            level["tie_word_embeddings"] = value
    path.write_text(json.dumps(content))


def equal_head(folder: Path) -> None:
    """What older versions of transformers wrote beside a tied embedding."""
    tensors = load_file(folder / "model.safetensors")
    head, embedding = (
        next(name for name in tensors if name.endswith(part)) for part in ("lm_head.weight", "embed_tokens.weight")
    )
    tensors[head] = tensors[embedding].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights_of(reader: ShardedReader, name: str) -> torch.Tensor:
    return reader.read(name)[: reader.model_config.language.vocab_size]


@pytest.mark.parametrize("head", ["equal", "different"])
@pytest.mark.parametrize("top, text", [(True, None), (True, False), (None, True), (False, True), (False, None)])
@pytest.mark.parametrize("write, kind", [
    (write_tiny_llava, LlavaForConditionalGeneration), (write_tiny_blip2, Blip2ForConditionalGeneration),
], ids=["llava", "blip2"])  # fmt: skip
def test_the_head_is_the_one_transformers_has(tmp_path, capsys, write, kind, top, text, head):
    """Catches a head dropped for what either level says, BLIP-2's upper level heard where transformers does not, and a
    tie forgotten where the two are equal."""
    source = write(tmp_path / "in", **SMALL)
    say_tied(source, top=top, text=text)
    if head == "equal":
        equal_head(source)
    theirs = kind.from_pretrained(source)
    assert run_tool("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save") == 0
    reader = ShardedReader(locate_checkpoint(tmp_path / "save"))
    assert torch.equal(weights_of(reader, OUTPUT), theirs.get_output_embeddings().weight)
    assert torch.equal(weights_of(reader, EMBEDDING), theirs.get_input_embeddings().weight)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert reader.model_config.language.tie_word_embeddings is tied
    said = f"note: {source / 'config.json'} says tie_word_embeddings, but the weights hold an LM head that differs"
    heard = text or (top and kind is LlavaForConditionalGeneration)
    assert (said in capsys.readouterr().out) is bool(heard and head == "different")


def test_the_export_of_such_a_head_keeps_it(tmp_path):
    """Catches an export that says `tie_word_embeddings` again, at either level."""
    source = write_tiny_llava(tmp_path / "in", **SMALL)
    say_tied(source, top=True, text=True)
    expected = LlavaForConditionalGeneration.from_pretrained(source)
    out = to_hf(to_megatron(source, tmp_path / "save"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert not config["tie_word_embeddings"] and not config["text_config"]["tie_word_embeddings"]
    assert torch.equal(load_exactly(out).lm_head.weight, expected.lm_head.weight)


def convert_without_the_head(*command) -> int:
    with mock.patch("hacl_megatron.checkpoint.hf.config_read.has_own_head", lambda *_: False):
        return run_tool(*command)


def test_verify_of_the_original_layout_is_by_transformers_own_reading(tmp_path):
    """Catches a comparison with tensors that this trainer has named and chosen, which agrees with itself whatever it
    has dropped: here it is made to drop the head, as it once did."""
    source, tensors = write_tiny_original_llava(tmp_path / "in", **SMALL)
    say_tied(source, top=True, text=None)
    theirs = LlamaForCausalLM.from_pretrained(source)
    assert torch.equal(theirs.lm_head.weight, tensors["lm_head.weight"])
    save, printed = apart(to_megatron, source, tmp_path / "save", "--verify")
    assert torch.equal(weights_of(ShardedReader(locate_checkpoint(save)), OUTPUT), theirs.lm_head.weight)
    assert "verify: largest logit difference" in printed
    dropped = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "dropped", "--verify")
    status, printed = apart(convert_without_the_head, *dropped)
    assert status != 0 and "do not agree" in printed


def test_sizes_alone_are_read_without_weights(tmp_path):
    """A plan is made where no weights are yet: what config.json says then holds."""
    source = write_tiny_llava(tmp_path / "in", **SMALL, tie=True)
    (source / "model.safetensors").unlink()
    assert read_model_config(source).language.tie_word_embeddings
