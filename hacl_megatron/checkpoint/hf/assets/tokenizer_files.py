"""A tokenizer's files for another folder: `<image>` and `<pad>` added or taken out, the rest as it is.

The files are edited as JSON, not saved by transformers: what its version 5 writes, 4.x cannot open, and it leaves out
`legacy`. In between the installed transformers reads them, and says which ids the tokens really have.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.hf.json_files import one_line, read_json, write_json
from hacl_megatron.config.checks.foreign_files import LARGEST_TOKENIZER, own_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
DEFINITIONS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these makes a tokenizer."""
IMAGE, PAD = "<image>", "<pad>"
SAMPLE = "A picture of 2 cats. USER: <image>\n What is it?</s>USER"
"""Must be read alike wherever a tokenizer is written to."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A folder's tokenizer, as an export in Hugging Face's layout has it.

    Raises:
        ValueError: no tokenizer can be read there.
    """

    folder: Path
    image_text: str
    """The token that marks an image."""
    image_token: int | None
    """Its id; None where config.json has one that no token of the tokenizer has."""
    pad_text: str | None
    pad_token: int | None
    length: int
    """Highest id + 1, with the two."""
    added: dict[int, Any]
    """Id -> transformers' AddedToken, of all tokens that are no pieces of the vocabulary."""
    vocabulary: dict[str, int]
    definition: str | None
    """`tokenizer.json` where the folder has none: without it transformers 5 takes the tokenizer of a LLaVA for another
    than LLaMA's, which puts no space before a text."""
    sample: list[int]
    """Ids of `SAMPLE`."""

    @classmethod
    def of(cls, folder: Path, image_token: int | None) -> "TokenizerFiles | None":
        """None where there are no files of a tokenizer.

        Args:
            image_token: id that config.json states; without one `<image>` and a token to pad with are added, where the
                tokenizer has none. One that pads with EOS or `<unk>`, as LLaVA does, has none.
        """
        if not any(own_file(folder / name, LARGEST_TOKENIZER) for name in DEFINITIONS):
            return None
        with tempfile.TemporaryDirectory() as copy:
            copy_tokenizer(folder, Path(copy))
            settle(Path(copy))
            tokenizer = load_tokenizer(Path(copy), named=folder)
        pad_text = tokenizer.pad_token
        if image_token is None:
            image_text, shared = IMAGE, (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, IMAGE, None)
            if pad_text in shared or pad_text not in tokenizer.get_vocab():
                pad_text = PAD
            tokenizer.add_tokens([image_text], special_tokens=True)
            tokenizer.add_special_tokens({"pad_token": pad_text})
            image_token = tokenizer.convert_tokens_to_ids(image_text)
        else:
            image_text = tokenizer.convert_ids_to_tokens(image_token) if image_token < _length(tokenizer) else None
            image_token, image_text = (None, IMAGE) if image_text is None else (image_token, image_text)
        vocabulary = tokenizer.get_vocab()
        return cls(
            folder=folder,
            image_text=image_text,
            image_token=image_token,
            pad_text=pad_text,
            pad_token=None if pad_text is None else vocabulary.get(pad_text),
            length=_length(tokenizer),
            added=dict(tokenizer.added_tokens_decoder),
            vocabulary=vocabulary,
            definition=None if own_file(folder / "tokenizer.json", LARGEST_TOKENIZER) else _definition(tokenizer),
            sample=tokenizer(SAMPLE)["input_ids"],
        )

    def write(self, out: Path, processor_class: str) -> None:
        """Write the files into `out`, which transformers then reads as it read these, padding on the left.

        Raises:
            ValueError: it does not: the tokens get other ids.
        """
        copy_tokenizer(self.folder, out)
        settle(out)
        if self.definition is not None:
            (out / "tokenizer.json").write_text(self.definition, encoding="utf-8")
        elif (out / "tokenizer.json").is_file():
            content = read_json(out / "tokenizer.json", LARGEST_TOKENIZER)
            listed = content.get("added_tokens") or []
            there = {token["id"] for token in listed}
            listed += [{"id": id, **_fields(token)} for id, token in self.added.items() if id not in there]
            content["added_tokens"] = sorted(listed, key=lambda token: token["id"])
            write_json(out / "tokenizer.json", content)
        settings = _read_if_there(out / "tokenizer_config.json")
        # All of them, in place of the older added_tokens.json.
        (out / "added_tokens.json").unlink(missing_ok=True)
        settings["added_tokens_decoder"] = {str(id): _fields(self.added[id]) for id in sorted(self.added)}
        settings |= {"pad_token": self.pad_text, "padding_side": "left", "processor_class": processor_class}
        settings.pop("chat_template", None)  # written for processor and tokenizer at once
        write_json(out / "tokenizer_config.json", settings)
        if names := _read_if_there(out / "special_tokens_map.json"):
            write_json(out / "special_tokens_map.json", {**names, "pad_token": self.pad_text})
        written = load_tokenizer(out, named=self.folder)
        if (found := written.get_vocab()) != self.vocabulary:
            token = next(text for text in (found | self.vocabulary) if found.get(text) != self.vocabulary.get(text))
            raise ValueError(
                f"{self.folder}: the tokenizer gives {token!r} the id {self.vocabulary.get(token)}, but reads "
                f"{found.get(token)} where its files say so; expected ids without gaps: mend tokenizer.json"
            )
        if (ids := written(SAMPLE)["input_ids"]) != self.sample:
            raise ValueError(
                f"{self.folder}: the tokenizer reads {SAMPLE!r} as {self.sample}, but as {ids} beside a config.json; "
                "expected one reading: save it with transformers such that the folder has a tokenizer.json"
            )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files; ValueError for one that is a link out of the folder, no file, or too large."""
    for name in TOKENIZER_FILES:
        if own_file(source / name, LARGEST_TOKENIZER):
            shutil.copyfile(source / name, target / name)


def settle(folder: Path) -> None:
    """Rewrite `tokenizer_config.json` such that transformers 4.x and 5 read the same out of it."""
    settings = _read_if_there(folder / "tokenizer_config.json")
    if not settings and not (folder / "tokenizer.model").is_file():
        return
    for key in ("backend", "is_local", "local_files_only"):  # how version 5 came by it
        settings.pop(key, None)
    if settings.get("add_prefix_space", True) is None:
        del settings["add_prefix_space"]
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.x wants an object there, and has another name for a list
        del settings["extra_special_tokens"]
        named = [settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
        listed = [*(settings.get("additional_special_tokens") or []), *extra]
        if others := [token for i, token in enumerate(listed) if token not in named and token not in listed[:i]]:
            settings["additional_special_tokens"] = others
    kind = settings.get("tokenizer_class")
    if kind == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.model" in _names(folder) if kind is None else str(kind).lower().startswith("llamatokenizer"):
        settings["tokenizer_class"] = kind or "LlamaTokenizer"
        if settings.get("legacy") is None:
            settings["legacy"] = _is_legacy(folder)
    write_json(folder / "tokenizer_config.json", settings)


def load_tokenizer(folder: Path, named: Path) -> Any:
    """transformers' tokenizer of a folder that holds nothing but its files: a `config.json` would make it guess.

    Raises:
        ValueError: it cannot be read; the message has `named` for the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.get_vocab()
    except Exception as error:  # transformers raises many kinds here
        raise ValueError(f"{named}: no tokenizer can be read there ({one_line(error)})") from None
    return tokenizer


def cut_tokenizer(folder: Path, size: int) -> None:
    """Take the added tokens from id `size` on out of a tokenizer's files; padding falls back to `<unk>` as in LLaVA."""
    gone: set[str] = set()
    content = read_json(folder / "tokenizer.json", LARGEST_TOKENIZER) if "tokenizer.json" in _names(folder) else {}
    if content.get("added_tokens"):
        gone |= {token["content"] for token in content["added_tokens"] if token["id"] >= size}
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        content["padding"] = None
        write_json(folder / "tokenizer.json", content)
    if added := _read_if_there(folder / "added_tokens.json"):
        gone |= {text for text, id in added.items() if id >= size}
        if kept := {text: id for text, id in added.items() if text not in gone}:
            write_json(folder / "added_tokens.json", kept)
        else:
            (folder / "added_tokens.json").unlink()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (settings := _read_if_there(folder / name)):
            continue
        if decoder := settings.get("added_tokens_decoder"):
            gone |= {token["content"] for id, token in decoder.items() if int(id) >= size}
            settings["added_tokens_decoder"] = {id: token for id, token in decoder.items() if int(id) < size}
        for key in ("image_token", "processor_class", "extra_special_tokens"):
            settings.pop(key, None)
        if listed := settings.pop("additional_special_tokens", None):
            kept = [one for one in listed if (one["content"] if isinstance(one, dict) else one) not in gone]
            settings |= {"additional_special_tokens": kept} if kept else {}
        settings["pad_token"] = settings.get("unk_token")
        write_json(folder / name, settings)


def num_own_tokens(folder: Path, others: tuple[int | None, ...]) -> int | None:
    """Highest id + 1 of a `tokenizer.json`, pieces and added tokens without `others`; None where there is none."""
    if not own_file(folder / "tokenizer.json", LARGEST_TOKENIZER):
        return None
    content = read_json(folder / "tokenizer.json", LARGEST_TOKENIZER)
    try:
        pieces = (content.get("model") or {}).get("vocab")
        pieces = list(pieces.values()) if isinstance(pieces, dict) else list(range(len(pieces or ())))
        added = [token["id"] for token in content.get("added_tokens") or ()]
        own = [*pieces, *(id for id in added if id not in others)]
        return max(own) + 1 if own else None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: no tokenizer ({one_line(error)})") from None


def _is_legacy(folder: Path) -> bool:
    """`legacy` as transformers 4 understands a LLaMA tokenizer that does not say: by tokenizer.json, else True."""
    if "tokenizer.json" not in _names(folder):
        return True
    content = read_json(folder / "tokenizer.json", LARGEST_TOKENIZER)
    return "Prepend" in str(content.get("normalizer")) or "always" in str(content.get("pre_tokenizer"))


def _definition(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str(pretty=True)


def _fields(token: Any) -> dict[str, Any]:
    """An AddedToken as tokenizer files spell it."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _length(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
