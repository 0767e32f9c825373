"""One export of every kind: of both layouts, of parts, and of tokenizers that have their own ideas."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import LlamaTokenizer

from tests.checkpoint.hf.round_trip_files import write_parts
from tests.tiny import sentencepiece_model, write_tiny_blip2, write_tiny_llava, write_tiny_original_llava
from tests.tiny_tiles import write_tiny_next
from tests.tool_runs import run_tool, to_hf, to_megatron

VICUNA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
          "pad_token": "<unk>", "add_bos_token": True, "legacy": False, "padding_side": "right"}  # fmt: skip


def original(folder: Path) -> Path:
    return write_tiny_original_llava(folder / "original", layers=1, vision_layers=2)[0]


def own_pad(folder: Path) -> Path:
    """Its own `<pad>`, as the 321st row, in the older `added_tokens.json`; `legacy` left out, as in old folders."""
    source, _ = write_tiny_original_llava(folder / "own_pad", layers=1, vision_layers=2, vocab=321)
    shutil.copy(sentencepiece_model(320), source / "tokenizer.model")
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": 320}))
    settings = {key: value for key, value in VICUNA.items() if key != "legacy"}
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    return source


def own_image(folder: Path) -> Path:
    """`<image>` and a token to pad with stand in its tokenizer.json already, the other way round."""
    source = original(folder / "with")
    tokenizer = LlamaTokenizer.from_pretrained(source.rename(folder / "own_image"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "own_image")
    return folder / "own_image"


def long(folder: Path) -> Path:
    """More tokens than the model has rows, as CodeLlama's has."""
    source = original(folder / "with").rename(folder / "long")
    tokenizer = LlamaTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<middle{i}>" for i in range(90)])
    tokenizer.save_pretrained(source)
    return source


def hf(folder: Path) -> Path:
    return write_tiny_llava(folder / "hf", layers=1, vision_layers=2)


def blip2(folder: Path) -> Path:
    return write_tiny_blip2(folder / "blip2", layers=1, qformer_layers=1, vision_layers=2)


def llava_next(folder: Path) -> Path:
    return write_tiny_next(folder / "next", layers=1, vision_layers=2)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "hf": hf, "original": original, "own_pad": own_pad, "own_image": own_image, "long": long, "blip2": blip2,
    "next": llava_next,
}  # fmt: skip


def write_parts_with_tokenizer(folder: Path) -> tuple[Path, Path]:
    """A LLaMA with a tokenizer as Vicuna's, and a CLIP."""
    llama, clip, _ = write_parts(folder / "parts", whole_clip=False)
    shutil.copy(sentencepiece_model(320), llama / "tokenizer.model")
    (llama / "tokenizer_config.json").write_text(json.dumps(VICUNA))
    # As Vicuna's: sampling flags without do_sample.
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (llama / "generation_config.json").write_text(json.dumps(settings))
    return llama, clip


def write_exports(folder: Path) -> dict[str, Path]:
    """Name of the kind -> the export, in Hugging Face's layout."""
    exports = {}
    for name, write in SOURCES.items():
        exports[name] = to_hf(to_megatron(write(folder / f"of-{name}"), folder / f"save-{name}"), folder / name)
    llama, clip = write_parts_with_tokenizer(folder)
    start = ("convert_hf_to_megatron", "--language-model", llama, "--vision-tower", clip)
    assert run_tool(*start, "--save", folder / "save-parts") == 0
    exports["parts"] = to_hf(folder / "save-parts", folder / "parts-out")
    exports["to and fro"] = to_hf(to_megatron(exports["original"], folder / "save-fro"), folder / "fro")
    return exports
