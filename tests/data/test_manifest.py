"""LLaVA JSON in, samples out; and every fault named with file, record and key."""

import json
import pickle
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest, Pair, Sample
from hacl_megatron.data.prepare.llava_json import read_records
from hacl_megatron.data.prepare.records.keys import HALLUCINATED_KEY as HALLUCINATED

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": " A cat.\n"}]


def write(tmp_path, records, name="data.json") -> str:
    path = tmp_path / name
    text = (
        "\n".join(map(json.dumps, records))
        if name.lower().endswith((".jsonl", ".ndjson"))
        else json.dumps(records, indent=1)
    )
    path.write_text(text, encoding="utf-8")
    return str(path)


def record(**keys):
    return {"id": "7", "image": "a/7.jpg", "conversations": TURNS, **keys}


def test_a_llava_record(tmp_path):
    path = write(tmp_path, [record()])
    manifest = Manifest.read([path], version="v1")
    assert len(manifest) == 1
    sample = manifest[0]
    assert (sample.sample_id, sample.name, sample.image, sample.source) == (0, "7", "a/7.jpg", path)
    assert sample.conversations == (("human", "<image>\nWhat is it?"), ("gpt", " A cat.\n"))
    assert sample.caption is None and sample.hallucinated_captions == ()


@pytest.mark.parametrize(
    ("keys", "version", "caption"),
    [
        ({}, "v1", None),
        ({}, "plain", "A cat."),
        ({"text": "A red cat."}, "v1", "A red cat."),
        ({"text": "A red cat."}, "plain", "A red cat."),
        ({"text": " "}, "plain", None),
        ({"text": ""}, "plain", None),
        ({"text": None}, "plain", "A cat."),
        ({"caption": "not this"}, "v1", "A cat."),
        ({"caption": None}, "v1", "A cat."),
        ({"Hallucination caption": "A dog."}, "v1", "A cat."),
        ({"Hallucination caption": "A dog.", "text": "<image>\nA red cat. "}, "v1", "A red cat."),
        ({"conversations": TURNS[:1], "caption": ""}, "v1", None),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": None}]}, "plain", None),
    ],
)
def test_which_text_is_the_caption(tmp_path, keys, version, caption):
    assert Manifest.read([write(tmp_path, [record(**keys)])], version=version)[0].caption == caption


@pytest.mark.parametrize(
    ("value", "expected"),
    [("A dog.", ("A dog.",)), ([" A dog.", "", "Two cats."], ("A dog.", "Two cats.")), ("", ()), ([], ()), (None, ())],
)
def test_hallucinated_captions_are_a_string_or_a_list(tmp_path, value, expected):
    path = write(tmp_path, [record(**{"Hallucination caption": value})])
    assert Manifest.read([path], version="v1")[0].hallucinated_captions == expected


def test_json_and_json_lines_hold_the_same_samples(tmp_path):
    records = [record(id=n, text=f"é 日本 😀 {n}") for n in range(5)] + [{"conversations": TURNS}]
    for ensure_ascii in (True, False):
        (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, ensure_ascii=ensure_ascii), encoding="utf-8")
        lines = "\n\n".join(json.dumps(r, ensure_ascii=ensure_ascii) for r in records) + "\n"
        (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
        paths = [str(tmp_path / "a.json"), str(tmp_path / "a.jsonl")]
        manifest = Manifest.read(paths, version="v1")
        assert len(manifest) == 12 and manifest.samples_per_file == (6, 6)
        assert [s.sample_id for s in manifest] == list(range(12))
        assert [s.caption for s in manifest][:6] == [s.caption for s in manifest][6:]
        assert manifest[3].caption == "é 日本 😀 3" and manifest[3].name == "3"
        assert manifest[0].source == paths[0] and manifest[11].source == paths[1]
        assert manifest[5].image is None and manifest[5].name == "record 5"


def test_a_lone_surrogate_is_that_samples_fault_alone(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": "1", "conversations": [{"from": "human", "value": "\\ud83d"}]}]')
    assert Manifest.read([str(tmp_path / "a.json")], version="v1")[0].conversations == (("human", "\ud83d"),)


def test_a_manifest_travels_to_worker_processes(tmp_path):
    manifest = Manifest.read([write(tmp_path, [record(id=n) for n in range(3)])], version="v1")
    assert list(pickle.loads(pickle.dumps(manifest))) == list(manifest)
    with pytest.raises(IndexError):
        manifest[3]
    assert len(Manifest.read([], version="v1")) == 0


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"image": ["a.jpg", 3]}, r"key 'image\[1\]' is int 3; expected a file name"),
        ({"image": ["a.jpg", None]}, r"key 'image\[1\]' is NoneType null; expected a file name"),
        ({"image": ["a.jpg", " "]}, r"key 'image\[1\]' is str \" \"; expected a file name"),
        (
            {"images": [["a.jpg", "b.jpg"]], "image": None},
            r"key 'images' is list \[\[.*; expected a file name, or a list",
        ),
        ({"images": ["a.jpg", ["b.jpg"]], "image": None}, r"key 'images\[1\]' is list \[\"b.jpg\"\]; expected a file"),
        (
            {"image": ["a.jpg", "b.jpg"], "text": ["A cat."]},
            r"key 'text' is list .*; expected 2 captions, one an image",
        ),
        ({"image": ["a.jpg", "b.jpg"], "text": ["A cat.", 1]}, r"key 'text\[1\]' is int 1; expected a string"),
        (
            {"image": ["a.jpg", "b.jpg"], "text": ["A cat.", "B"], "Hallucination caption": "A dog."},
            r"key 'Hallucination caption' is str .*; expected 2 lists of strings, one an image",
        ),
        (
            {"image": ["a.jpg", "b.jpg"], "text": ["A cat.", "B"], "Hallucination caption": [["A dog."], [3]]},
            r"key 'Hallucination caption\[1\]' is list \[3\]; expected a string or a list of strings",
        ),
        ({"image": 3}, r"key 'image' is int 3; expected a file name"),
        ({"image": [3]}, r"key 'image' is list \[3\]; expected a file name"),
        ({"id": {}}, r"key 'id' is dict {}; expected a string or a number"),
        ({"conversations": "hello"}, r"key 'conversations' is str \"hello\"; expected a list of turns"),
        ({"conversations": ["hello"]}, r"key 'conversations\[0\]' is str \"hello\"; expected an object with 'from'"),
        ({"conversations": [TURNS[0], {"from": "gpt"}]}, r"key 'conversations\[1\]' is dict .* 'value'"),
        ({"text": ["a", "b"]}, r"key 'text' is list \[\"a\", \"b\"\]; expected a string, the caption"),
        ({"Hallucination caption": [1]}, r"key 'Hallucination caption' is list \[1\]; expected a string or a list"),
        ({"Hallucination caption": 0}, r"key 'Hallucination caption' is int 0"),
    ],
)
def test_wrong_types_name_file_record_and_key(tmp_path, keys, complaint):
    for name, where in (("a.json", r"a\.json, record 1 \(line \d+\): "), ("a.jsonl", r"a\.jsonl, record 1 \(line 2\)")):
        with pytest.raises(ValueError, match=where + ".*" + complaint) as caught:
            Manifest.read([write(tmp_path, [record(), record(**keys)], name)], version="v1")
        assert "\n" not in str(caught.value)


def test_missing_conversations_and_records_that_are_no_objects(tmp_path):
    with pytest.raises(ValueError, match=r"record 0 \(line 2\): key 'conversations' is missing \(found 'id', 'text'\)"):
        Manifest.read([write(tmp_path, [{"id": 1, "text": "x"}])], version="v1")
    with pytest.raises(ValueError, match=r"record 1 .*found list \[1\]; expected an object"):
        Manifest.read([write(tmp_path, [record(), [1]])], version="v1")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b'[{"id": 1, "conversations": []},\n {"id": 2, "conv', r"broken JSON in line 2, column 12"),
        ("a.json", b'[{"id": 1, "conversations": []}\n', r"broken JSON in line 2, column 1 \(expected ',' or '\]'"),
        ("a.json", b'[{"id": 1, "conversations": []} {}]', r"line 1, column 33 \(expected ','"),
        ("a.json", b'[{"conversations": []}]\n[]', r"line 2, column 1 \(text behind the list\)"),
        ("a.json", b'[{"conversations": []},\n]', r"broken JSON in line 2, column 1"),
        ("a.json", b'{"id": 1}', r"found one JSON object with the keys 'id', expected a list .* \.jsonl"),
        ("a.json", b'{"id": 1}\n{"id": 2}', r"one JSON object behind another.*\.jsonl or \.ndjson: rename the file"),
        ("a.json", b'{"data": [{"conversations": []}], "data": []}', r"a list under 'data' and under 'data'"),
        ("a.json", b'{"data": [{"conversations": []}]', r"line 1, column 33 .*cut off"),
        ("a.json", b'{"data": [{"conversations": []}]} 3', r"text behind the list"),
        ("a.json", b'[{"conversations": []},\n\n]', r"a comma in line 1 with nothing behind it\); remove the comma"),
        ("a.json", b'[{"conversations": []},\n{"conversations": [],\n}]', r"a comma in line 2 .*; remove the comma"),
        ("a.json", b'[{"conversations": [1,]}]', r"a comma in line 1 .*; remove the comma"),
        ("a.json", b'[{"conversations": []},\n{"id" 2}]', r"line 2, column 7 .*; repair the file there"),
        ("a.json", b'[{"conversations": []},\n', r"line 2, column 1 .*; is the file cut off"),
        ("a.jsonl", b'{"conversations": []},\n', r"line 1, column 22 \(a comma with nothing behind it: remove it"),
        ("a.jsonl", b'{"conversations": [],}\n', r"line 1, column 2[12] \(a comma with nothing behind it: remove it"),
        ("a.json", b"", r"found an empty file"),
        ("a.json", b"[]", r"holds no samples"),
        ("a.json", b"<html>", r"not JSON \(starts with '<html>'\)"),
        ("a.json", b'["\xff"]', r"not UTF-8 \(byte 2\)"),
        ("a.jsonl", b'{"conversations": []}\n\n{"id": ', r"broken JSON in line 3, column 8"),
        ("a.jsonl", b"\n\n", r"holds no samples"),
    ],
)
def test_broken_files_say_where(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json.*: .*" + complaint) as caught:
        Manifest.read([str(tmp_path / name)], version="v1")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_flag(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file; .*--data-path"):
        Manifest.read([str(tmp_path / "nowhere.json")], version="v1")


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.NdJson"])
def test_json_lines_by_other_names(tmp_path, name):
    assert len(Manifest.read([write(tmp_path, [record(id=1), record(id=2)], name)], version="v1")) == 2


@pytest.mark.parametrize("head", ['{"data": ', '{"version": [1, {"a": 2}], "info": {"data": 3}, "annotations": '])
@pytest.mark.parametrize("window", [3, 1 << 20])
def test_records_inside_one_object(tmp_path, head, window):
    """As `datasets` (field="data") and COCO write them; keys before and behind the list hold no records."""
    items = [record(id=n) for n in range(3)]
    path = tmp_path / "a.json"
    path.write_text(f'{head}{json.dumps(items, indent=1)}, "more": ["x"]}}')
    assert [found.name for found, _ in read_records(str(path), window_bytes=window)] == ["0", "1", "2"]


def test_numbers_and_gaps_as_pandas_writes_them(tmp_path):
    """A column with gaps turns 12 into 12.0 and what is not there into NaN; neither stops the file."""
    gap = float("nan")  # json.dumps writes NaN, as for frame.to_dict("records")
    rows = [{"id": 12.0, "image": "1.jpg", "text": "a"}, {"id": gap, "image": gap, "text": gap, HALLUCINATED: gap}]
    path = write(tmp_path, [record(**row) for row in [*rows, {"id": 2.0**40, "image": "3.jpg", "text": "b"}]])
    assert "12.0" in Path(path).read_text() and "NaN" in Path(path).read_text()
    manifest = Manifest.read([path], version="v1")
    assert [sample.name for sample in manifest] == ["12", "record 1", str(2**40)]
    assert [sample.image for sample in manifest] == ["1.jpg", None, "3.jpg"]
    assert [sample.caption for sample in manifest] == ["a", None, "b"]


@pytest.mark.parametrize(("image", "meant"), [("", None), ("  ", None), ([], None), ([""], None), (["b.jpg"], "b.jpg")])
def test_an_empty_image_is_none_and_a_list_of_one_is_that_one(tmp_path, image, meant):
    path = write(tmp_path, [record(id="a"), record(id="b", image=image), record(id="c", image=image)])
    manifest = Manifest.read([path], version="v1")
    assert [sample.image for sample in manifest] == ["a/7.jpg", meant, meant]
    said = [line for line in manifest.remarks() if "read as text only" in line]
    if meant is None:  # read in another way than it is written: that is said, with the records
        assert len(said) == 1 and said[0].startswith(f"{path}: 2 of 3 records (b, c): key 'image' is ")
    else:
        assert not said


def of_images(*images: str, **keys) -> Sample:
    turns = (("human", "<image>\n<image>\nOne?"), ("gpt", " A cat. "), ("human", "<image>\nTwo?"), ("gpt", "A dog."))
    given = {"caption": None, "hallucinated_captions": (), "conversations": turns, **keys}
    return Sample(sample_id=0, name="0", images=images, source="a.json", **given)


def test_pairs_and_twins_are_of_one_image_as_they_were_and_of_several_as_they_are_listed():
    one = of_images("a.jpg", caption="A cat.", hallucinated_captions=("A cow.",))
    assert one.image == "a.jpg" and one.stored == (None,) and one.pairs == ((0, "A cat.", ("A cow.",)),)
    assert [turns[1] for turns in one.twin_conversations()] == [("gpt", " A cow. ")]
    none = of_images(caption="A cat.", hallucinated_captions=("A cow.",))
    assert none.image is None and none.stored == () and none.pairs == ()
    assert [turns[1] for turns in none.twin_conversations()] == [("gpt", " A cow. ")]
    listed = (Pair(0, "A cat.", ("A cow.",)), Pair(1, "A bird.", ("A fly.",)), Pair(2, "A dog.", ("A cow.", "A ox.")))
    several = of_images("a.jpg", "b.jpg", "c.jpg", listed_pairs=listed, rejected_answers=("No.",))
    assert several.image == "a.jpg" and several.pairs == listed and several.caption is None
    turns = several.conversations
    assert list(several.twin_conversations()) == [
        (turns[0], ("gpt", " A cow. "), *turns[2:]), None,
        (*turns[:3], ("gpt", "A cow.")), (*turns[:3], ("gpt", "A ox.")), (*turns[:3], ("gpt", "No.")),
    ]  # fmt: skip
    earlier = of_images("a.jpg", "b.jpg", "c.jpg", listed_pairs=(Pair(2, "A cat.", ("A cow.",)),))
    assert list(earlier.twin_conversations()) == [None], "the answer that it equals has not seen the third image"
