"""Dialogues as ShareGPT's and OpenAI's users write them are LLaVA's, turn for turn."""

import json
from pathlib import Path
from typing import Any

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, encode
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer

LLAVA = {
    "id": "a",
    "image": "a.jpg",
    "conversations": [
        {"from": "system", "value": "You are red."},
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a cat"},
    ],
}
TURNS = LLAVA["conversations"]
TEXTS = [turn["value"] for turn in TURNS]
PARTS = [
    [{"type": "text", "text": TEXTS[0]}],
    [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    TEXTS[2],
]
ROLES = ("system", "user", "assistant")


def record(key: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": "a", "image": "a.jpg", key: messages, **more}


def messages(contents: list[Any], *names: str) -> list[dict[str, Any]]:
    role, content = names
    return [{role: who, content: what} for who, what in zip(ROLES, contents, strict=True)]


FORMS = {
    "messages": record("messages", messages(TEXTS, "role", "content")),
    "messages of parts": record("messages", messages(PARTS, "role", "content")),
    "conversations of OpenAI's": record("conversations", messages(TEXTS, "role", "content")),
    "ShareGPT by OpenAI's names": record("conversations", messages(TEXTS, "from", "value")),
    "messages beside null": record("messages", messages(TEXTS, "role", "content"), conversations=None),
}


def manifest(path: Path, *records: dict[str, Any]) -> Manifest:
    path.write_text(json.dumps(records))
    return Manifest.read([str(path)], version="v1", cache_dir=str(path.parent / "cache"))


@pytest.mark.parametrize("form", FORMS)
def test_other_spellings_of_a_dialogue_are_llavas(tmp_path, form):
    """Read as a strange role or a missing key, a file of these would be refused whole."""
    whole, other = manifest(tmp_path / "a.json", LLAVA), manifest(tmp_path / "b.json", FORMS[form])
    assert other[0].conversations == whole[0].conversations == tuple((t["from"], t["value"]) for t in TURNS)
    assert other.digest == whole.digest and not list(other.remarks())


def test_a_system_record_is_trained_on_with_its_prompt(tmp_path):
    """It was left out as a bad sample."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", legacy=False))
    settings = EncodingSettings(version="v1", model_max_length=99, image_layout=ImageLayout(visual_tokens=2))
    encoded = encode(manifest(tmp_path / "a.json", LLAVA)[0], tokenizer, settings)
    text = tokenizer.decode([row for row in encoded.dialogue.tolist() if row >= 0])
    assert text.startswith("You are red. USER:") and "artificial" not in text and encoded.untrained is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record("messages", [{"role": "user"}]), r"messages\[0\].*expected an object with 'from' and 'value', or"),
        (record("messages", "a"), "key 'messages' is str"),
        (record("messages", [{"role": "user", "content": [{"type": "audio"}]}]), r"messages\[0\] part 0"),
        ({"id": "a"}, "key 'conversations' is missing .*'messages' with 'role' and 'content'"),
    ],
)
def test_what_is_no_message_is_refused_by_name(tmp_path, broken, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        manifest(tmp_path / "a.json", broken)
    assert "\n" not in str(caught.value)


def test_a_record_with_two_dialogues_says_which_is_read(tmp_path):
    both = record("messages", messages(TEXTS, "role", "content"), conversations=TURNS)
    assert ["key 'messages' is not read" in line for line in manifest(tmp_path / "a.json", both).remarks()] == [True]


def test_a_system_prompt_alone_is_no_dialogue(tmp_path):
    with pytest.raises(ValueError, match="the dialogue has no turns"):
        list(manifest(tmp_path / "a.json", {"id": "a", "conversations": TURNS[:1]}).remarks())
