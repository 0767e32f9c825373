"""Tokenizers read alike however they are stored; oracle: sentencepiece itself, and the transformers 4 rules by hand."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer


def pieces(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> list[str]:
    return tokenizer.backend.convert_ids_to_tokens(tokenizer.encode(text, bos=bos))


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "non-legacy"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=request.param))


def test_dummy_space_stands_behind_special_tokens_only_if_legacy(tokenizer):
    tail = ["▁US", "ER"] if tokenizer.legacy else ["USER"]
    assert pieces(tokenizer, "a cat</s>USER") == ["<s>", "▁a", "▁cat", "</s>", *tail]
    assert pieces(tokenizer, "USER") == ["<s>", "▁US", "ER"]
    assert pieces(tokenizer, "\nWhat", bos=False) == ["▁", "<0x0A>", "What"]
    assert pieces(tokenizer, "") == ["<s>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, 0)
    assert "backend=" not in repr(tokenizer) and "files=" not in repr(tokenizer), "errors would print them"


def test_leading_spaces_are_kept_as_the_slow_tokenizer_keeps_them(tokenizer):
    # Metaspace alone would give "▁cat" for " cat": seen with transformers 5.23 and the fast tokenizer of 4.57.
    assert pieces(tokenizer, " cat") == ["<s>", "▁", "▁cat"]
    assert pieces(tokenizer, "  cat") == ["<s>", "▁", "▁", "▁cat"]
    behind = ["▁", "▁cat"] if tokenizer.legacy else ["▁cat"]
    assert pieces(tokenizer, "a</s> cat") == ["<s>", "▁a", "</s>", *behind]


PARTS = st.lists(
    st.sampled_from([" ", "  ", "▁", "a", " cat", "USER", ":", "\n", "é", "日本", "The", "</s>", "<s>"]), max_size=8
)


@given(parts=PARTS)
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_sentencepiece(tmp_path_factory, parts):
    """Legacy: SentencePiece on each stretch between special tokens. Else: its dummy space stands at the start alone."""
    text = "".join(parts)
    for legacy in (True, False):
        tokenizer, model = _cached(tmp_path_factory, legacy)
        expected = []
        for number, part in enumerate(re.split("(</s>|<s>)", text)):
            if part in ("</s>", "<s>"):
                expected.append(model.piece_to_id(part))
            elif part and (legacy or number == 0):
                expected += model.encode(part)
            elif part:  # "</s>" cuts the dummy space off: what stands behind a marker that is taken away again
                expected += model.encode("\x01" + part)[len(model.encode("\x01")) :]
        assert tokenizer.encode(text, bos=False) == expected, (legacy, text)


_tokenizers: dict[bool, tuple[Tokenizer, sentencepiece.SentencePieceProcessor]] = {}


def _cached(tmp_path_factory, legacy: bool):
    if legacy not in _tokenizers:
        folder = write_tokenizer(tmp_path_factory.mktemp("oracle"), legacy=legacy)
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
        _tokenizers[legacy] = load_tokenizer(folder), model
    return _tokenizers[legacy]


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_without_the_key_means_legacy(tmp_path, with_config):
    """As in transformers 4, with which the checkpoints were trained; transformers 5 would take legacy=False."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, legacy=None, with_config=with_config))
    assert pieces(tokenizer, "</s>USER") == ["<s>", "</s>", "▁US", "ER"]
    assert tokenizer.legacy


def test_what_is_saved_reads_like_what_was_loaded(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "copy"))
    again = load_tokenizer(str(tmp_path / "copy"))
    text = " a cat</s>USER: \n is it</s> What"
    assert again.encode(text, bos=True) == tokenizer.encode(text, bos=True)
    assert again.legacy == tokenizer.legacy
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]


def test_saving_spells_out_what_the_folder_left_open(tmp_path):
    folder = write_tokenizer(tmp_path / "source", legacy=None, chat_template="{{ messages }}")
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)  # a checkpoint is written hours after the source was read
    tokenizer.save(str(tmp_path / "copy"))
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert config["legacy"] is True and config["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_json_alone_reads_like_the_model(tmp_path, legacy):
    """transformers 5 saves tokenizer.json without `legacy`: what was meant still stands in its pre-tokenizer."""
    source = load_tokenizer(write_tokenizer(tmp_path / "source", legacy=legacy))
    source.backend.save_pretrained(tmp_path / "json")
    Path(tmp_path / "json" / "tokenizer.model").unlink(missing_ok=True)
    if not (tmp_path / "json" / "tokenizer.json").is_file():
        pytest.skip("the slow tokenizer of transformers 4 writes no tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "json"))
    text = " a cat</s>USER: \n is it</s> What"
    assert tokenizer.legacy == legacy
    assert tokenizer.encode(text, bos=True) == source.encode(text, bos=True)


def test_faults_are_one_line_value_errors(tmp_path):
    with pytest.raises(ValueError, match="No tokenizer folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(str(tmp_path / "empty"))
    folder = write_tokenizer(tmp_path / "broken", legacy=False)
    (tmp_path / "broken" / "tokenizer.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    for key in ("bos_token", "eos_token"):
        folder = write_tokenizer(tmp_path / key, legacy=False, **{key: None})
        with pytest.raises(ValueError, match=f"has no {key}"):
            load_tokenizer(folder)


def test_what_is_no_text_raises(tokenizer):
    with pytest.raises(UnicodeError):
        tokenizer.encode("broken \ud83d emoji", bos=True)
    with pytest.raises(TypeError, match="expected a string, found int"):
        tokenizer.encode(3, bos=True)
