"""LLaMA tokenizers, loaded so that every transformers version gives the ids LLaVA-1.5 was trained on.

The only file that imports transformers' tokenizers. LLaVA-1.5 used the slow (SentencePiece) `LlamaTokenizer` of
transformers 4 (llava/train/train.py, `use_fast=False`). Three things differ elsewhere, and are evened out here:

* `legacy`. With `legacy=True` SentencePiece's dummy space is put before the text *and* behind every special token
  ("</s>USER" reads "</s> USER"); with `legacy=False` only before the text. A folder that does not say means True in
  transformers 4 and False in transformers 5; `load_tokenizer` always says what transformers 4 would have meant.
* Leading spaces. The slow tokenizer puts the dummy space before " cat" too (two spaces); Metaspace, which the fast
  ones and all of transformers 5 use, does not when a space already stands there. `Tokenizer.encode` adds it.
* Saving. transformers 5 writes neither `legacy` nor `tokenizer.model`, so its copy reads differently from its source,
  and transformers 4 cannot open it. `Tokenizer.save` writes the files that were loaded, byte for byte.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template

from hacl_megatron.config.checks.foreign_files import LARGEST_TOKENIZER, own_file, parse_json

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What a tokenizer's folder may hold, and what `Tokenizer.save` writes."""

TEXTS_AT_ONCE = 256
"""Counted in one call: the tokenizer's own records of a text take some ten times its bytes."""

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Begins what the assistant says, in a chat template that marks it."""

DUMMY_SPACE = "▁"
"""SentencePiece's mark for a space, which it also puts before a text."""


@dataclass(kw_only=True)
class Tokenizer:
    """A LLaMA tokenizer and the facts about it that the conversation templates rely on."""

    bos_id: int | None
    """None for a tokenizer that has none, as Qwen's: nothing then stands in front of a text."""
    eos_id: int
    unk_id: int | None
    eos_token: str
    """EOS as it is written in a text: `</s>`."""
    vocab_size: int
    """Highest token id + 1, added tokens included; the embedding needs at least so many rows."""
    legacy: bool
    """Whether a text behind a special token reads as it does on its own (`legacy` of LlamaTokenizer); measured."""
    round_surplus: int = 0
    """Tokens by which the beginning of a round, `USER:`, is longer on its own than behind EOS; measured. 0 where the
    tokenizer is `legacy`, else 1 in Vicuna's vocabulary ("▁US", "ER" against "USER"), 0 where "▁USER" is one piece."""
    files: dict[str, bytes] = field(repr=False)
    """The files it was read from, so that a checkpoint can carry them when the folder is long gone."""
    backend: Any = field(repr=False)
    found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What conversation templates found out about it, to find it out once."""
    _needs_space: re.Pattern[str] | None = field(default=None, repr=False)
    """Where Metaspace leaves out the dummy space that SentencePiece puts; None where nothing is left out."""

    @property
    def pad_id(self) -> int:
        """LLaVA pads with `<unk>` (llava/train/train.py); EOS where a tokenizer has none."""
        return self.eos_id if self.unk_id is None else self.unk_id

    @property
    def eats_dummy_space(self) -> bool:
        """Whether a text behind a special token lacks the dummy space that it has on its own, and a blank brings it."""

        def behind(text: str) -> list[int]:
            return self.backend(f"{self.eos_token}{text}", add_special_tokens=False).input_ids[1:]

        alone = self.encode("\nA", bos=False)
        return behind("\nA") != alone and behind(" \nA") == alone

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids of `text`, behind BOS if asked, never followed by EOS; special tokens in the text are parsed.

        Raises TypeError or UnicodeError for what is not a text (not a string, lone surrogates).
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a string, found {type(text).__name__}")
        text.encode("utf-8")  # lone surrogates: here, not as a different exception in each tokenizer
        if self._needs_space is not None:
            text = self._needs_space.sub(r"\1 ", text)
        ids = self.backend(text, add_special_tokens=False).input_ids if text else []
        return [self.bos_id, *ids] if bos and self.bos_id is not None else list(ids)

    def token_id(self, text: str) -> int | None:
        """Id of the one token that is written `text`; None where there is none."""
        found = self.backend.convert_tokens_to_ids(text)
        return found if found is not None and self.backend.convert_ids_to_tokens(found) == text else None

    def tokens_within(self, text: str, stretches: Sequence[tuple[int, int]]) -> list[bool]:
        """Of each token of `encode(text, bos=False)`, whether it has a character of the [begin, end) in `stretches`.

        Raises ValueError for a tokenizer that does not know where in a text its tokens are.
        """
        if not getattr(self.backend, "is_fast", False):
            raise ValueError(
                "the tokenizer is one of transformers' slow ones, which do not say where in a text a token stands; "
                "expected a folder with tokenizer.json: save it once with AutoTokenizer's fast class"
            )
        added: list[int] = []
        if self._needs_space is not None:
            added = [match.end() for match in self._needs_space.finditer(text)]
            text = self._needs_space.sub(r"\1 ", text)
        moved = [tuple(at + sum(place <= at for place in added) for at in one) for one in stretches]
        places = self.backend(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [any(begin < last and max(end, begin + 1) > first for first, last in moved) for begin, end in places]

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """A dialogue in the tokenizer's own chat template: its text, and the [begin, end) of its characters that the
        template marks by `{% generation %}`; none where it has no such marks.

        In transformers' own sandbox. Raises ValueError where there is no template, else what Jinja does where it fails.
        """
        rendered, marked = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=GENERATION_MARK.search(self.chat_template) is not None,
            add_generation_prompt=add_generation_prompt,
            **self.backend.special_tokens_map,
            **variables,
        )
        return rendered[0], list(marked[0]) if marked else []

    @property
    def chat_template(self) -> str:
        """The tokenizer's own, in Jinja. Raises ValueError where it has none."""
        try:
            return self.backend.get_chat_template()
        except ValueError:
            found = self.backend.chat_template
            names = f"several ({', '.join(found)}), none of them `default`" if isinstance(found, dict) else "none"
            raise ValueError(
                f"--version chat is the tokenizer's own chat template, found {names}; expected chat_template.jinja, or "
                "chat_template in tokenizer_config.json: add it, or give another --version"
            ) from None

    def count(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """(`len(encode(text, bos=False))`, how many of its ids are `<unk>`) of each text.

        Texts go to a fast tokenizer some hundred at a time, outside the interpreter's lock: threads run side by side.
        """
        fast = getattr(self.backend, "is_fast", False)
        counts: list[tuple[int, int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            if self._needs_space is not None:
                some = [self._needs_space.sub(r"\1 ", text) for text in some]
            if fast:
                rows = [row.ids for row in self.backend.backend_tokenizer.encode_batch(some, add_special_tokens=False)]
            else:
                rows = [self.encode(text, bos=False) for text in texts[start : start + TEXTS_AT_ONCE]]
            counts += [(len(ids), 0 if self.unk_id is None else ids.count(self.unk_id)) for ids in rows]
        return counts

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def save(self, folder: str) -> None:
        """Writes the tokenizer's own files into `folder` (made if missing)."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)


def load_tokenizer(path: str) -> Tokenizer:
    """Reads the tokenizer of a local folder. No network, no remote code.

    Raises ValueError when the folder is missing, holds no tokenizer, or its tokenizer has no EOS, or a BOS
    that is no token of it; or where one
    of its files is no regular one, leaves the folder as a link, is too large, or is no object of JSON.
    """
    if not os.path.isdir(path):
        raise ValueError(
            f"No tokenizer folder at {path!r}: give --tokenizer (or --pretrained-checkpoint) a local folder that "
            "holds tokenizer.model or tokenizer.json"
        )
    files = {}
    for name in TOKENIZER_FILES:
        if own_file(Path(path, name), LARGEST_TOKENIZER):
            files[name] = Path(path, name).read_bytes()
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        raise ValueError(
            f"{path!r} holds neither tokenizer.model nor tokenizer.json: copy them from the language model's folder, "
            "or name another folder with --tokenizer"
        )
    try:
        config = _settings(files)
        backend = _load_backend(path, files, config)
        if isinstance(backend, bool):  # what transformers 4 returns for a broken tokenizer.model
            raise RuntimeError("tokenizer.model is no SentencePiece model")
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, RuntimeError, ... for broken files
        raise ValueError(
            f"The tokenizer in {path!r} cannot be read ({type(error).__name__}: {_first_line(error)}): copy its files "
            "again from the language model's folder"
        ) from error
    if _is_llama(files, config):
        # Spelled out, so that a copy means the same in every transformers version.
        spelled_out = {"tokenizer_class": "LlamaTokenizer", **config, "legacy": _is_legacy(files, config)}
        if spelled_out != config:
            files["tokenizer_config.json"] = json.dumps(spelled_out, indent=2, ensure_ascii=False).encode()
    backend.model_max_length = int(1e30)  # lengths are checked after the image is expanded, and not by a warning
    return _measure(backend, path, files)


def _settings(files: dict[str, bytes]) -> dict[str, Any]:
    """`tokenizer_config.json`; of the other JSON files it is seen to that transformers may read them."""
    config: dict[str, Any] = {}
    for name, content in files.items():
        if name.endswith(".json"):
            try:
                found = parse_json(content)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if not isinstance(found, dict):
                raise ValueError(f"{name}: expected an object, found a {type(found).__name__}")
            config = found if name == "tokenizer_config.json" else config
    return config


def _load_backend(path: str, files: dict[str, bytes], config: dict[str, Any]) -> Any:
    options = {"local_files_only": True, "trust_remote_code": False}
    if _is_llama(files, config):
        # The slow class (of transformers 4) is what LLaVA trained with; it reads tokenizer.model alone.
        kind = LlamaTokenizer if "tokenizer.model" in files else LlamaTokenizerFast
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # advice about `legacy`, which is settled here
        try:
            return kind.from_pretrained(path, legacy=_is_legacy(files, config), **options)
        finally:
            transformers_logging.set_verbosity(level)
    return AutoTokenizer.from_pretrained(path, use_fast="tokenizer.model" not in files, **options)


def _is_llama(files: dict[str, bytes], config: dict[str, Any]) -> bool:
    """Whether it is LLaMA-1/2's SentencePiece tokenizer (LLaMA-3's is a byte-level BPE of another class)."""
    name = config.get("tokenizer_class")
    return "tokenizer.model" in files if name is None else name.lower() in ("llamatokenizer", "llamatokenizerfast")


def _is_legacy(files: dict[str, bytes], config: dict[str, Any]) -> bool:
    """`legacy` as transformers 4 understands the folder: as written; else by tokenizer.json; else True."""
    if config.get("legacy") is not None:
        return bool(config["legacy"])
    if "tokenizer.json" not in files:
        return True
    definition = json.loads(files["tokenizer.json"])
    return "Prepend" in json.dumps(definition.get("normalizer")) or "always" in json.dumps(
        definition.get("pre_tokenizer")
    )


def _measure(backend: Any, path: str, files: dict[str, bytes]) -> Tokenizer:
    vocabulary = backend.get_vocab()
    special = {}
    for key in ("bos_token", "eos_token"):
        token = getattr(backend, key)
        if token is None and key == "bos_token" and "tokenizer.model" not in files:  # as Qwen's
            continue
        if token is None or token not in vocabulary:
            raise ValueError(
                f"The tokenizer in {path!r} has no {key} (found {token!r}): texts start with BOS and end with EOS, "
                f"so set {key} in its tokenizer_config.json to a token of its vocabulary"
            )
        special[key] = str(token)

    def ids(text: str) -> list[int]:
        return backend(text, add_special_tokens=False).input_ids

    # Measured instead of read from `backend.legacy`, which not every class has and which says what was asked for.
    alone, behind_eos = ids("USER"), ids(special["eos_token"] + "USER")[1:]
    legacy = alone == behind_eos
    round_surplus = len(ids("USER:")) - len(ids(special["eos_token"] + "USER:")[1:])
    needs_space = None
    if ids(" a") == ids("a"):
        # Longest first, as the tokenizer itself matches added tokens.
        added = sorted(backend.get_added_vocab(), key=len, reverse=True) if legacy else []
        starts = "|".join(["^", *map(re.escape, added)])
        needs_space = re.compile(f"({starts})(?=[ {DUMMY_SPACE}])")
    return Tokenizer(
        bos_id=vocabulary[special["bos_token"]] if "bos_token" in special else None,
        eos_id=vocabulary[special["eos_token"]],
        # GPT-2's kind has one token for all of them, and no other ever stands for what is unknown.
        unk_id=None if backend.unk_token in (None, *special.values()) else vocabulary.get(backend.unk_token),
        eos_token=special["eos_token"],
        vocab_size=max(vocabulary.values()) + 1,
        legacy=legacy,
        round_surplus=round_surplus,
        files=files,
        backend=backend,
        _needs_space=needs_space,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
