"""Tokenizer, processor and generation settings of an exported folder, made from those that a checkpoint carries.

Within one layout the tokenizer's files are copied. From the original layout to HF's, `<image>` and `<pad>` are added to
it; the other way they are taken out again.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.hf.config_write import Layout, Vocabulary, to_preprocessor_json, to_processor_json
from hacl_megatron.checkpoint.hf.json_files import one_line, read_json
from hacl_megatron.config.architecture import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def count_tokens(assets: Path | None, config: ModelConfig, layout: Layout) -> int | None:
    """Id that the carried tokenizer has for `<image>` or would give it; None where the model's config states it.

    To the original layout, the pieces of the tokenizer itself, without added ones; None where its file does not say.
    """
    if layout == "llava" and "image_token_index" in config.extra:
        pieces = _read_if_there(assets, "tokenizer.json").get("model", {}).get("vocab")
        return max(pieces.values()) + 1 if isinstance(pieces, dict) and pieces else None
    if assets is None or layout != "hf" or "image_token_index" in config.extra:
        return None
    tokenizer = _load_tokenizer(assets)
    return tokenizer.get_vocab().get("<image>", len(tokenizer))


def write_assets(
    out: Path,
    assets: Path | None,
    config: ModelConfig,
    layout: Layout,
    vocabulary: Vocabulary,
    *,
    image_aspect_ratio: str | None,
) -> None:
    """Write everything that an exported folder needs beside weights and `config.json`.

    Args:
        assets: folder that holds the tokenizer's files; without one the export has no tokenizer.
    """
    stored = _read_if_there(assets, "generation_config.json")
    generation = {
        "bos_token_id": config.extra.get("bos_token_id", 1),
        "eos_token_id": config.extra.get("eos_token_id", 2),
        **{key: value for key, value in stored.items() if key not in ("_from_model_config", "transformers_version")},
        **({"pad_token_id": vocabulary.pad_token} if vocabulary.pad_token is not None else {}),
    }
    write_json(out / "generation_config.json", generation)
    if assets is not None:
        _write_tokenizer(out, assets, config, layout, vocabulary)
    if layout == "hf":
        write_json(
            out / "preprocessor_config.json", to_preprocessor_json(config, image_aspect_ratio=image_aspect_ratio)
        )
        write_json(out / "processor_config.json", to_processor_json(config))


def _write_tokenizer(out: Path, assets: Path, config: ModelConfig, layout: Layout, vocabulary: Vocabulary) -> None:
    came_with_image = "image_token_index" in config.extra
    if layout == "hf" and not came_with_image:
        tokenizer = _load_tokenizer(assets)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        found = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
        if found != [vocabulary.image_token, vocabulary.pad_token]:
            raise ValueError(
                f"{assets}: the tokenizer gives <image> and <pad> the ids {found}, but the model's rows leave "
                f"{[vocabulary.image_token, vocabulary.pad_token]} for them"
            )
        tokenizer.save_pretrained(out)
        if (assets / "tokenizer.model").is_file():
            shutil.copy(assets / "tokenizer.model", out)
        return
    for name in TOKENIZER_FILES:
        if (assets / name).is_file():
            shutil.copy(assets / name, out)
    if layout == "llava" and vocabulary.size < config.language.vocab_size:
        _cut_tokenizer(out, vocabulary.size)


def _cut_tokenizer(folder: Path, size: int) -> None:
    """Take the added tokens from id `size` on out of a tokenizer's files; padding falls back to `<unk>` as in LLaVA."""
    if (content := _read_if_there(folder, "tokenizer.json")) and content.get("added_tokens"):
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        content["padding"] = None
        write_json(folder / "tokenizer.json", content)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (content := _read_if_there(folder, name)):
            continue
        decoder = content.get("added_tokens_decoder")
        if decoder:
            content["added_tokens_decoder"] = {key: value for key, value in decoder.items() if int(key) < size}
        for key in ("image_token", "processor_class", "extra_special_tokens", "additional_special_tokens"):
            content.pop(key, None)
        content["pad_token"] = content.get("unk_token")
        write_json(folder / name, content)


def _load_tokenizer(assets: Path) -> Any:
    """The tokenizer from its own files alone: a `config.json` of a type unknown to transformers makes it guess."""
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in TOKENIZER_FILES:
                if (assets / name).is_file():
                    shutil.copy(assets / name, folder)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise ValueError(f"{assets}: no tokenizer can be read there ({one_line(error)})") from None


def _read_if_there(folder: Path | None, name: str) -> dict[str, Any]:
    return read_json(folder / name) if folder is not None and (folder / name).is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
