"""Tokenizer, processor, chat template and generation settings of an exported folder, made from a checkpoint's.

To Hugging Face's layout `<image>` and a token to pad with are added to a tokenizer that has none; to the original
layout they are taken out again.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hacl_megatron.checkpoint.hf.assets.chat_templates import choose_templates, write_templates
from hacl_megatron.checkpoint.hf.assets.generation import generation_json
from hacl_megatron.checkpoint.hf.assets.tokenizer_files import (
    IMAGE,
    TokenizerFiles,
    copy_tokenizer,
    cut_tokenizer,
    num_own_tokens,
    settle,
)
from hacl_megatron.checkpoint.hf.config_write import (
    Layout,
    Vocabulary,
    processor_class,
    to_preprocessor_json,
    to_processor_json,
    to_video_processor_json,
    vocabulary_of_layout,
)
from hacl_megatron.checkpoint.hf.json_files import read_json, values_of_any_type, write_json
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.foreign_files import LARGEST_CONFIG, own_file
from hacl_megatron.config.families import language_family


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Of the `--version` that a run trained with."""

    version: str
    jinja: str
    """Images are `<image>` in it."""
    is_tokenizers: bool = False
    """Whether the tokenizer's own was trained with, in front of which `jinja` goes."""
    replaces: bool = False
    """Whether it is another than the model came with, so that the model's own gives way."""
    trained: bool = False
    """Whether a run has trained by it; the model's own then gives way unless it asks in the very same words."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a turn, besides EOS."""


@dataclass(kw_only=True)
class Assets:
    """What an export in `layout` takes from `folder`, read and checked before anything is written.

    Args:
        folder: of a checkpoint's `hf_assets`, or a model's own; without one the export has no tokenizer.
        tokenizer: folder of the tokenizer, where that is not `folder`.
        chat_template: for a folder whose own knows no images.

    Raises:
        ValueError: the tokenizer cannot be read, or is needed and missing.
    """

    folder: Path | None
    tokenizer: Path | None = None
    config: ModelConfig
    layout: Layout
    chat_template: ChatTemplate | None = None
    notes: list[str] = field(default_factory=list)
    """What a reader should know."""

    def __post_init__(self) -> None:
        self.tokenizer = self.tokenizer or self.folder
        with values_of_any_type((self.tokenizer or Path()) / "tokenizer_config.json"):
            self._read()

    def _read(self) -> None:
        self._files, length, found = None, None, None
        image = self.config.extra.get("image_token_index")
        if self.folder is not None and self.layout == "hf":
            self._files = TokenizerFiles.of(self.tokenizer, image)
            if self._files is None and image is None:
                raise ValueError(
                    f"{self.tokenizer}: no tokenizer there; expected tokenizer.json or tokenizer.model, to which "
                    "<image> is added: copy them from the language model's folder"
                )
            if self._files is None:
                self.notes.append("the checkpoint has no tokenizer, so the export has none")
            elif self._files.image_token is None:
                self.notes.append(f"no token of the tokenizer has the id {image}, by which config.json marks an image")
            elif image is None:
                found = self._files
        elif self.folder is not None and image is not None:
            length = num_own_tokens(self.tokenizer, (image, self.config.extra.get("pad_token_id")))
        self.vocabulary: Vocabulary = vocabulary_of_layout(
            self.config, self.layout, length if found is None else found.length,
            special=None if found is None else (found.image_token, found.pad_token),
        )  # fmt: skip

    def write(self, out: Path, *, image_aspect_ratio: str | None) -> None:
        """Write everything that an exported folder needs beside weights and `config.json`."""
        with values_of_any_type((self.tokenizer or Path()) / "tokenizer_config.json"):
            self._write(out, image_aspect_ratio)

    def _write(self, out: Path, image_aspect_ratio: str | None) -> None:
        config, extra = self.config, self.config.extra
        tokens = {}
        stored = self._stored("generation_config.json")
        for key, default in language_family(config.language.family).special_tokens.items():
            if key not in stored and extra.get(key, default) is not None:
                tokens[key] = extra.get(key, default)
        if self.vocabulary.pad_token is not None:
            tokens["pad_token_id"] = self.vocabulary.pad_token
        self._add_stop_tokens(stored, tokens)
        write_json(out / "generation_config.json", generation_json(stored, tokens, self.notes))
        if self.layout == "llava":
            self._write_original_tokenizer(out)
            return
        image_text = IMAGE
        if self._files is not None:
            self._files.write(out, processor_class(config))
            image_text = self._files.image_text
        own = self.chat_template
        if self.folder is not None:
            write_templates(
                out,
                choose_templates(
                    self.folder,
                    self.tokenizer,
                    of_whole_model=extra.get("layout") == "hf",
                    own=own and own.jinja.replace(IMAGE, image_text.replace("\\", "\\\\").replace("'", "\\'")),
                    own_name="" if own is None else f"--version {own.version}",
                    notes=self.notes,
                    replaces=own is not None and own.replaces,
                    trained=own is not None and own.trained,
                    is_tokenizers=own is not None and own.is_tokenizers,
                ),
            )
        write_json(
            out / "preprocessor_config.json", to_preprocessor_json(config, image_aspect_ratio=image_aspect_ratio)
        )
        write_json(out / "processor_config.json", to_processor_json(config, image_text))
        if (of_videos := to_video_processor_json(config)) is not None:
            write_json(out / "video_preprocessor_config.json", of_videos)

    def _add_stop_tokens(self, stored: dict, tokens: dict) -> None:
        """Lays an `eos_token_id` over `stored` that ends turns, too, as an instruct model's own has it."""
        if self.chat_template is None or self._files is None:
            return
        ids = [self._files.vocabulary[text] for text in self.chat_template.stop_tokens]
        known = tokens.get("eos_token_id", stored.get("eos_token_id"))
        known = known if isinstance(known, list) else [] if known is None else [known]
        if more := [id for id in ids if id not in known]:
            tokens["eos_token_id"] = [*known, *more]

    def _write_original_tokenizer(self, out: Path) -> None:
        if self.folder is None:
            return
        copy_tokenizer(self.tokenizer, out)
        settings = out / "tokenizer_config.json"
        if settings.is_file() and isinstance(read_json(settings).get("extra_special_tokens"), list):
            settle(out)  # LLaVA's code runs on transformers 4.37
        for name in ("chat_template.jinja", "chat_template.json"):
            if own_file(self.folder / name, LARGEST_CONFIG):
                shutil.copyfile(self.folder / name, out / name)
        if self.vocabulary.size < self.config.language.vocab_size:
            cut_tokenizer(out, self.vocabulary.size)

    def _stored(self, name: str) -> dict:
        if self.folder is None or not own_file(self.folder / name, LARGEST_CONFIG):  # what it says is written again
            return {}
        return read_json(self.folder / name)
