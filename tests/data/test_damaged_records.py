"""Damaged records by the hundred: each costs its file or itself, with a reason, and nothing else.

Everything derives from seeds, so that a failure's number names its file again.
"""

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings, UnusableSample
from hacl_megatron.data.encoding import encode as encode_sample
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.templates import find_template, template_names
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.loader_runs import sample
from tests.data.tiny_tokenizer import CHAT, write_tokenizer

SEED = 2024
NUM_RECORDS = 500
SETTINGS = {
    version: EncodingSettings(version=version, model_max_length=64, image_layout=ImageLayout(visual_tokens=4))
    for version in template_names()
    if not find_template(version).needed_tokens
}
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**30, "", " ", "\ud83d", "\0", "</s><s><unk>", "<image>",
    "<image>\n<image>", "a" * 5000, "\u202e\u0000\ufeff", [], {}, [[]], ["a cat"], [1, "a"], {"from": "human"},
    {"from": "gpt", "value": None}, {"from": None, "value": "a"}, {"from": "system", "value": "a"},
)  # fmt: skip


def whole_records() -> list[dict]:
    turns = sample(0, "train")["conversations"]
    more = [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "yes"}]
    records = [
        sample(0, "train"),
        sample(1, "train", text="a red cat", **{"Hallucination caption": "a dog"}),
        sample(2, "train", **{"Hallucination caption": ["a dog", "a red dog"]}, conversations=turns + more),
        {"id": 3, "conversations": more},
        {"id": 4, "image": "0.jpg", "question": "what?", "chosen": "a cat", "rejected": ["a dog", "a cow"]},
        {
            "id": 5, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
            "images": ["0.jpg"], "chosen": [{"role": "assistant", "content": "a cat"}], "rejected": "a dog",
        },
    ]  # fmt: skip
    return json.loads(json.dumps(records))  # nothing shared


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in [(*path, key), *places(item, (*path, key))]]


def change_value(rng: random.Random, record: dict) -> None:
    """Replaces, removes, renames or doubles something inside the record."""
    *path, key = rng.choice(places(record))
    owner = record
    for step in path:
        owner = owner[step]
    what = rng.choice(["replace", "replace", "replace", "remove", "rename", "double"])
    if what == "replace":
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    elif what == "remove":
        del owner[key]
    elif what == "rename" and isinstance(owner, dict):
        owner[rng.choice(["", "Image", "from", "value", "caption", "text", "id"])] = owner.pop(key)
    elif isinstance(owner, list):
        owner.append(copy.deepcopy(owner[key]))


def damage_text(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.choice([1, 5, 1000])]
        elif what == 2:
            data[at:at] = rng.choice(
                [b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\0", b"\n", b"\xff", b"\xed\xa0\x80"]
            )
        else:
            data[at:at] = rng.choice([b"null,", b'{"id":1},', b"NaN", b"1e999", b"\\ud83d", b"[" * 50, b"9" * 50])
        if not data:
            break
    return bytes(data)


def check_file(path: Path, tokenizers: dict) -> dict[str, int]:
    """What became of a file: refused with a good message, or how its samples encode. Anything else raises."""
    found = {"file refused": 0, "sample refused": 0, "encoded": 0}
    for version, settings in SETTINGS.items():
        try:
            manifest = Manifest.read([str(path)], version=version)
        except ValueError as error:
            message = str(error)
            assert message.startswith(str(path)) and "\n" not in message, message
            assert re.search(r"record \d+ \(line \d+\)|line \d+|not JSON|not UTF-8|expected", message), message
            found["file refused"] += 1
            continue
        for item in manifest:
            try:
                encoded = encode_sample(item, tokenizers["t"], settings)
            except UnusableSample as error:
                assert str(error).strip() and "\n" not in str(error), str(error)
                found["sample refused"] += 1
                continue
            found["encoded"] += 1
            check_encoded(encoded, settings)
    return found


def check_encoded(encoded: EncodedSample, settings: EncodingSettings) -> None:
    """What the packer relies on."""
    assert len(encoded.dialogue) == len(encoded.labels) <= settings.model_max_length
    images = int((encoded.dialogue < 0).sum())
    assert images in (0, sum(map(len, encoded.images)))
    assert all(0 <= pair.image < len(encoded.images) for pair in encoded.pairs)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    return {"t": load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=True, chat_template=CHAT))}


@pytest.mark.timeout(300)
def test_damaged_records_cost_their_file_or_themselves_and_nothing_else(tmp_path, tokenizers):
    """Half are changed as JSON values, half as bytes; one damaged record among whole ones."""
    total: dict[str, int] = {}
    for index in range(NUM_RECORDS):
        rng = random.Random(f"{SEED}/{index}")
        records = whole_records()
        path = tmp_path / f"{index}.json{'l' if index % 3 == 0 else ''}"
        damaged = rng.randrange(len(records))
        if index % 2 == 0:
            change_value(rng, records[damaged])
        lines = [json.dumps(record) for record in records]
        text = "\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]"
        path.write_bytes(text.encode() if index % 2 == 0 else damage_text(rng, text))
        found = check_file(path, tokenizers)
        total = {key: total.get(key, 0) + value for key, value in found.items()}
        if index % 2 == 0:
            check_whereabouts(path, damaged, found)
    assert min(total.values()) > 50, total


def check_whereabouts(path: Path, damaged: int, found: dict[str, int]) -> None:
    """A refused file names the damaged record; a file that is read loses that sample alone."""
    for version in SETTINGS:
        try:
            Manifest.read([str(path)], version=version)
        except ValueError as error:
            assert f"record {damaged} (line {damaged + 1})" in str(error), error
    refused_as_ever = 2  # by the plain template: several turns (2), no image (3)
    if not found["file refused"]:
        assert found["sample refused"] <= refused_as_ever + len(SETTINGS), found  # and the damaged one, by each


DAMAGES: dict[str, Callable[[], str]] = {
    "nested too deep": lambda: "[" * 200_000,
    "nested too deep inside": lambda: '[{"id": ' + "[" * 200_000 + "]" * 200_000 + ', "conversations": []}]',
    "a number of too many digits": lambda: '[{"id": ' + "9" * 10_000 + ', "conversations": []}]',
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_python_itself_gives_up_on(tmp_path, kind, name, tokenizers):
    text = DAMAGES[kind]()
    (tmp_path / name).write_text(text if name == "a.json" else text[1:-1])
    found = check_file(tmp_path / name, tokenizers)
    assert found["file refused"] == len(SETTINGS), found


def test_the_undamaged_records_are_all_used(tokenizers, tmp_path):
    """What the damage is done to is sound, so that a refusal is the damage's doing."""
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(whole_records()))
    assert check_file(path, tokenizers) == {"file refused": 0, "sample refused": 2, "encoded": 28}
