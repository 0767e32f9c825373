"""Every kind of export is whole for transformers: of this version, and of the oldest that the README names.

For the latter, HACL_OLD_TRANSFORMERS_PYTHON is the path of a Python with `transformers==4.57.*`, torch, Pillow,
sentencepiece and protobuf; without it that one test is skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig, LlamaTokenizer

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.checkpoint.hf.round_trip_files import all_tensors
from tests.public_reports import open_export
from tests.public_reports.export_cases import SOURCES, long, write_exports
from tests.tiny import write_tiny_llava, write_tiny_original_llava
from tests.tool_runs import run_tool, to_hf, to_megatron

OLD = os.environ.get("HACL_OLD_TRANSFORMERS_PYTHON")
KINDS = [*SOURCES, "parts", "to and fro"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def opened(exports: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    return {kind: open_export.open_export(out) for kind, out in exports.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_computes_and_opens_again(opened, kind):
    """Catches flags that make an export unsavable, and whatever differs once transformers has saved it."""
    found = opened[kind]
    for what in ("ids", "logits", "pixels", "prompt"):
        assert np.array_equal(found[f"opened {what}"], found[f"again {what}"]), what
    assert np.isfinite(found["opened logits"]).all()


@pytest.mark.skipif(OLD is None, reason="HACL_OLD_TRANSFORMERS_PYTHON names no Python with an old transformers")
def test_the_oldest_transformers_computes_the_same(exports, opened, tmp_path):
    """Catches what only version 5 can read: `extra_special_tokens` as a list, a class of its own, sampling flags."""
    program = Path(open_export.__file__)
    folders = [str(exports[kind]) for kind in KINDS]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [OLD, str(program), str(tmp_path / "old.npz"), *folders], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    old = np.load(tmp_path / "old.npz")
    for kind in KINDS:
        for what, expected in opened[kind].items():
            found = old[f"{exports[kind].name}: {what}"]
            if what.endswith(("logits", "pixels")):
                # Pixels by Pillow in both; the tower's and the language model's arithmetic may differ by rounding.
                np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4, err_msg=f"{kind} {what}")
            else:
                assert np.array_equal(found, expected), (kind, what, found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_4_cannot_read_is_not_there(exports, kind):
    """Without a second environment. Catches the two spellings of version 5 that 4.x fails on, and no left padding."""
    settings = json.loads((exports[kind] / "tokenizer_config.json").read_text())
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["tokenizer_class"] in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast")
    assert settings["padding_side"] == "left" and settings["legacy"] is (kind == "own_pad")
    processor = AutoProcessor.from_pretrained(exports[kind])
    assert processor.tokenizer.padding_side == "left"
    name = json.loads((exports[kind] / "preprocessor_config.json").read_text())["image_processor_type"]
    assert not name.endswith(("Pil", "Fast"))


def test_an_index_tells_the_models_weights_from_the_heads(exports, tmp_path, capsys):
    """vLLM takes every *.safetensors of a folder without an index, and failed on the heads' `temperature`."""
    for kind in KINDS:
        index = json.loads((exports[kind] / "model.safetensors.index.json").read_text())
        found = {name for file in {*index["weight_map"].values()} for name in load_file(exports[kind] / file)}
        assert {*index["weight_map"]} == found and "hacl_heads.safetensors" not in index["weight_map"].values()
    capsys.readouterr()
    to_megatron(exports["hf"], tmp_path / "save")
    assert "is read, as transformers does" not in capsys.readouterr().out, "the index names no other file"


# ------------------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize("kind, tokens, rows", [
    ("original", {"<image>": 320, "<pad>": 321}, 384),
    ("own_pad", {"<pad>": 320, "<image>": 321}, 384),
    ("own_image", {"[PAD]": 320, "<image>": 321}, 384),
    ("long", {"<middle0>": 320, "<middle89>": 409, "<image>": 410, "<pad>": 411}, 448),
])  # fmt: skip
def test_each_token_keeps_its_id_and_has_a_row(exports, kind, tokens, rows):
    """Catches ids for `<image>` and `<pad>` that are assumed: the export then failed, after days of training. And a
    tokenizer that reads otherwise than in training, with `legacy` or without."""
    out, source = exports[kind], exports[kind].parent / f"of-{kind}" / kind
    processor, before = AutoProcessor.from_pretrained(out), load_tokenizer(str(source))
    vocabulary = processor.tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in tokens} == tokens
    assert before.backend.get_vocab().items() <= vocabulary.items()
    config = json.loads((out / "config.json").read_text())
    pad = next(token for token in tokens if "pad" in token.lower())
    assert (config["image_token_index"], config["pad_token_id"]) == (tokens["<image>"], tokens[pad])
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (tokens["<image>"], tokens[pad])
    assert config["text_config"]["vocab_size"] == rows
    (embedding,) = (value for name, value in all_tensors(out).items() if name.endswith("embed_tokens.weight"))
    assert len(embedding) == rows
    text = "A red circle on the left.</s>USER"
    assert processor.tokenizer(text)["input_ids"] == before.encode(text, bos=True)


def test_a_tokenizer_with_its_own_pad_comes_back_in_the_original_layout(exports, tmp_path):
    """Catches a way back that cuts rows of other tokens than `<image>` and the one to pad with."""
    back = to_hf(to_megatron(exports["long"], tmp_path / "save"), tmp_path / "back", "--format", "llava")
    tokenizer = LlamaTokenizer.from_pretrained(back)
    assert len(tokenizer) == 410 and tokenizer.convert_tokens_to_ids("<middle89>") == 409
    (embedding,) = (value for name, value in all_tensors(back).items() if name.endswith("embed_tokens.weight"))
    assert len(embedding) == 410


def test_an_image_token_of_another_name(tmp_path):
    """Catches an export whose processor looks for `<image>` where the source's token is called otherwise."""
    source = write_tiny_llava(tmp_path / "in", layers=1, vision_layers=2)
    for path in source.glob("*.json"):
        path.write_text(path.read_text().replace("<image>", "[IMG]"))
    processor = AutoProcessor.from_pretrained(to_hf(to_megatron(source, tmp_path / "save"), tmp_path / "out"))
    assert (processor.image_token, processor.image_token_id) == ("[IMG]", 320)
    prompt = processor.apply_chat_template(open_export.QUESTION, add_generation_prompt=True)
    assert "USER: [IMG] \nA red" in prompt
    ids = processor(text=prompt, images=[np.zeros((40, 40, 3), dtype=np.uint8)])["input_ids"][0]
    assert ids.count(320) == 36


# ------------------------------------------------------------------------------------------------- what else was lost


def test_sampling_flags_without_sampling_are_left_out_and_said(exports, tmp_path, capsys):
    """Vicuna's generation config: transformers 4.x refuses to save a model that has it."""
    settings = json.loads((exports["parts"] / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 321}
    to_hf(exports["parts"].parent / "save-parts", tmp_path / "again")
    assert "(temperature 0.9: do_sample is not true; top_p 0.6" in capsys.readouterr().out
    source = write_tiny_llava(tmp_path / "in", layers=1, vision_layers=2)
    kept = {"do_sample": True, "temperature": 0.2, "top_p": 0.7, "num_beams": 2, "length_penalty": 1.3}
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, **kept}))
    out = to_hf(to_megatron(source, tmp_path / "save"), tmp_path / "out")
    found = GenerationConfig.from_pretrained(out)
    found.validate(strict=True)
    assert {key: getattr(found, key) for key in kept} == kept


def test_several_views_with_flat_merging_are_refused_on_the_way_in(tmp_path, capsys):
    """It converted, and nothing could read the result's run_config.yaml."""
    source, _ = write_tiny_original_llava(tmp_path / "in")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_aspect_ratio": "anyres"}))
    with pytest.raises(
        ValueError, match=r"config.json: image_aspect_ratio is 'anyres'.*'flat'; .*'spatial_unpad' only"
    ):
        read_model_config(source)
    capsys.readouterr()
    assert run_tool("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "save").exists()


def test_a_logit_of_an_export_is_a_logit_of_its_source(exports):
    """The rows that were added change nothing of the others; catches rows that moved."""
    long, plain = (all_tensors(exports[kind]) for kind in ("long", "original"))
    name = next(name for name in plain if name.endswith("embed_tokens.weight"))
    assert torch.equal(long[name][:320], plain[name][:320])


def test_a_token_without_a_row_costs_its_sample(tmp_path):
    """Catches ids beyond the embedding: an index error of some rank, or another rank's row."""
    tokenizer = load_tokenizer(str(long(tmp_path)))
    settings = EncodingSettings(
        version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=4), num_rows=320
    )

    def sample(answer: str, caption: str | None = None) -> Sample:
        turns = (("human", "<image>\nWhat?"), ("gpt", answer))
        return Sample(
            sample_id=0, name="", images=("x.png",), conversations=turns, caption=caption, hallucinated_captions=(),
            source="",
        )  # fmt: skip

    assert encode(sample("A red circle."), tokenizer, settings).dialogue.max() < 320
    for unusable in (sample("A <middle7> circle."), sample("A circle.", caption="A <middle7>.")):
        with pytest.raises(UnusableSample, match=r"'<middle7>' token 327, for which the model's 320 rows have none"):
            encode(unusable, tokenizer, settings)
