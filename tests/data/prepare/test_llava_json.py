"""The moving window reads what Python's json reads, wherever it cuts, and places every fault where json does."""

import json
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.data.encoding import UnusableSample, checked_dialogue
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.llava_json import _comma_before, decoded_records, read_records

texts = st.text(st.characters(exclude_categories=[]), max_size=8)  # lone surrogates too
turns = st.lists(st.fixed_dictionaries({"from": texts | st.integers(), "value": texts | st.none()}), max_size=3)
records = st.fixed_dictionaries(
    {"conversations": turns},
    optional={
        "id": texts | st.integers(),
        "image": texts.filter(len),
        "text": texts,
        "extra": st.floats(),
        "caption": texts,
    },
)


def read(path, window_bytes: int) -> list:
    return [record for record, _ in read_records(str(path), window_bytes=window_bytes)]


@given(
    items=st.lists(records, min_size=1, max_size=4),
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    escaped=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_window_reads_what_json_reads(tmp_path_factory, items, window, indent, escaped):
    folder = tmp_path_factory.mktemp("records")
    escaped = escaped or "\\ud" in json.dumps(items)  # a lone surrogate has no UTF-8
    text = json.dumps(items, ensure_ascii=escaped, indent=indent)
    (folder / "a.json").write_text(text, encoding="utf-8")
    (folder / "a.jsonl").write_text(
        "\n".join(json.dumps(item, ensure_ascii=escaped) for item in items), encoding="utf-8"
    )
    expected = json.loads(text)
    for name in ("a.json", "a.jsonl"):
        whole = [item for item, _, _ in decoded_records(str(folder / name), window_bytes=window)]
        assert json.dumps(whole) == json.dumps(expected)  # as text: NaN is no equal of itself
        found = read(folder / name, window)
        assert len(found) == len(items)
        for index, (record, item) in enumerate(zip(found, expected, strict=True)):
            assert record.turns == tuple((turn["from"], turn["value"]) for turn in item["conversations"])
            image = item.get("image")
            shown = None if image is not None and image.isspace() else image  # a blank name is none
            assert (record.images, record.text) == ((shown,) if shown else (), item.get("text"))
            assert record.name == str(item.get("id", item.get("image", f"record {index}")))
            assert record.first_answer_is_caption == ("caption" in item)


def test_a_fault_is_placed_where_json_places_it_at_any_window(tmp_path):
    rng = random.Random(0)
    items = [{"id": n, "text": "é" * n, "conversations": [{"from": "gpt", "value": "\n".join("ab")}]} for n in range(6)]
    whole = json.dumps(items, ensure_ascii=False, indent=1)
    path = tmp_path / "a.json"
    for _ in range(300):
        at = rng.randrange(1, len(whole))
        broken = whole[:at] if rng.random() < 0.5 else whole[:at] + rng.choice('x"{]\x01') + whole[at + 1 :]
        path.write_text(broken, encoding="utf-8", newline="")
        try:
            json.loads(broken)
            continue  # inside a string any letter will do
        except json.JSONDecodeError as error:
            known = error
        for window in (1, 7, 64, 1 << 20):
            with pytest.raises(ValueError, match=r"a\.json") as caught:
                read(path, window)
            message = str(caught.value)
            if "broken JSON" in message:  # else the record before the fault was found wrong first
                assert f"line {known.lineno}, column {known.colno} " in message, (broken, str(known))
            else:
                assert "key 'conversations'" in message or "expected an object" in message


def test_bytes_that_are_no_utf8_are_placed_at_any_window(tmp_path):
    data = json.dumps([{"conversations": [], "text": "é日本"}] * 5, ensure_ascii=False).encode()
    for name, content in (("a.json", data), ("a.jsonl", b'{"conversations": [], "text": "\xc3\xa9"}\n' * 3)):
        at = len(content) * 2 // 3
        (tmp_path / name).write_bytes(content[:at] + b"\xff" + content[at:])
        for window in (1, 5, 1 << 20):
            with pytest.raises(ValueError, match=rf"not UTF-8 \(byte {at}\)"):
                read(tmp_path / name, window)


def test_no_more_than_a_window_and_a_record_is_held(tmp_path):
    """A file without line breaks, much longer than the window: memory must not follow the file."""
    record = {"conversations": [{"from": "gpt", "value": "x" * 1000}]}
    (tmp_path / "a.json").write_text(json.dumps([record] * 4_000))
    tracemalloc.start()
    count = sum(1 for _ in read_records(str(tmp_path / "a.json"), window_bytes=1 << 14))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4_000 and peak < 400_000 < (tmp_path / "a.json").stat().st_size / 8


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("written", ["\\ud83d", b"\xed\xa0\xbd"], ids=["as an escape", "as bytes"])
def test_half_of_a_surrogate_pair_costs_its_record_alone(tmp_path, name, written):
    """As bytes it is no UTF-8, and refused the whole file; other bytes that are none still do, with their place."""
    record = b'{"id": "%d", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "%s"}]}'
    half = written if isinstance(written, bytes) else written.encode()
    some = [record % (number, half if number == 1 else b"A") for number in range(3)]
    path = tmp_path / name
    path.write_bytes(b"\n".join(some) if name.endswith("l") else b"[" + b",\n".join(some) + b"]")
    for window in (7, 1 << 20):
        found = [record for record, _ in read_records(str(path), window_bytes=window)]
        assert [record.turns[1][1] for record in found] == ["A", "\ud83d", "A"]
    samples = Manifest.read([str(path)], version="v1", cache_dir=str(tmp_path / "cache"))
    assert [sample.conversations[1][1] for sample in samples] == ["A", "\ud83d", "A"]
    path.write_bytes(path.read_bytes().replace(half, b"\xe9"))
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte \d+\)"):
        list(read_records(str(path)))


@pytest.mark.parametrize("depth", [50, 150, 900, 100_000])
@pytest.mark.parametrize("key", ["value", "image", "text", "id", "other"])
def test_deep_nesting_is_one_line_or_costs_its_record(tmp_path, key, depth):
    """900 levels went through the decoder and ran out of stack behind it: a traceback."""
    deep = "[" * depth + "]" * depth
    turns = f'[{{"from": "human", "value": {deep if key == "value" else json.dumps("Q")}}}]'
    more = "" if key == "value" else f'"{key}": {deep}, '
    path = tmp_path / "data.json"
    path.write_text(f'[{{{more}"conversations": {turns}}}]')
    if depth == 100_000 or key in ("image", "text", "id"):
        with pytest.raises(ValueError, match=r"data\.json") as error:
            Manifest.read([str(path)], version="v1", cache_dir=str(tmp_path / "cache"))
        assert "\n" not in str(error.value)
        return
    (sample,) = Manifest.read([str(path)], version="v1", cache_dir=str(tmp_path / "cache"))
    if key == "value":
        with pytest.raises(UnusableSample, match="no string but list"):
            checked_dialogue(sample)


@pytest.mark.parametrize("text", ['{"a": 1 , }', "[1,\n]", "[1, ]"])
def test_a_comma_before_a_bracket_is_found_from_either(text: str) -> None:
    """Python 3.13 names the comma's place, earlier ones the bracket's."""
    comma, bracket = text.rindex(","), len(text) - 1
    assert _comma_before(text, comma) == _comma_before(text, bracket) == comma
    assert _comma_before("[1, 2]", 2) is None and _comma_before("[1, 2]", 5) is None
