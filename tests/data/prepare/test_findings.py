"""Images and hallucinated captions that training would never see: said and named, refused where it is all of them.

The kinds are those of public reports: xtuner's `img` (xtuner#771), tags without an image and images without a tag, a
tag in a turn that the template leaves out.
"""

import contextlib
import json

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.records.keys import meant_by
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.templates.template import IMAGE
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.conftest import dataset  # noqa: F401  # a fixture
from tests.data.loader_runs import loader_of
from tests.data.prepare.prepare_runs import settings
from tests.data.tiny_tokenizer import write_tokenizer
from tests.tool_runs import run_tool

TAGGED = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": "yes"}]
PLAIN = [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "yes"}]
GREETING = {"from": "gpt", "value": "<image>\nA cat"}

UNSEEN = {
    "imgs": ({"imgs": ["a/1.jpg"], "conversations": TAGGED}, "key 'imgs' is not read.*did you mean 'image'?"),
    "too few tags": (
        {"images": ["a/1.jpg", "a/1.jpg"], "conversations": TAGGED},
        "more or fewer <image> tags than images: training leaves it out, as a bad sample",
    ),
    "too many tags": ({"image": "a/1.jpg", "conversations": TAGGED * 2}, "more or fewer <image> tags than images"),
    "img": ({"img": "a/1.jpg", "conversations": PLAIN}, "key 'img' is not read.*did you mean 'image'?"),
    "typing": ({"imgae": "a/1.jpg", "conversations": TAGGED}, "key 'imgae' is not read"),
    "capital": ({"Image": "a/1.jpg", "conversations": TAGGED}, "key 'Image' is not read"),
    "tag alone": ({"conversations": TAGGED}, "an <image> tag and no image: the tag is read as text"),
    "no tag": (
        {"image": "a/1.jpg", "conversations": PLAIN},
        "an image and no <image> tag.*put <image> into a question",
    ),
    "other tag": (
        {"image": "a/1.jpg", "conversations": [{"from": "human", "value": "<img> is it?"}, PLAIN[1]]},
        "found '<img>', did you mean <image>?",
    ),
    "dropped turn": ({"image": "a/1.jpg", "conversations": [GREETING, *PLAIN]}, "tag is in a leading gpt turn"),
    "no answer": ({"conversations": PLAIN[:1]}, "no answer, or none with words: it trains nothing"),
    "empty answer": ({"conversations": [PLAIN[0], {"from": "gpt", "value": ""}]}, "no answer, or none with words"),
    "twin": (
        {"image": "a/1.jpg", "conversations": TAGGED, "hallucination_caption": "a dog"},
        "key 'hallucination_caption' is not read; did you mean 'Hallucination caption'?",
    ),
    "empty caption": (
        {"image": "a/1.jpg", "conversations": TAGGED, "text": " ", "Hallucination caption": "a dog"},
        "key 'text' is empty, so that it has no caption for its hallucinated captions; leave the key out",
    ),
    "other roles": (
        {
            "image": "a/1.jpg",
            "conversations": [{"from": "tool", "value": "<image>"}, {"from": "function", "value": "a"}],
        },
        "a turn is from 'tool', expected 'human' or 'gpt': training leaves it out",
    ),
    "no turns": ({"conversations": []}, "the dialogue has no turns: training leaves it out"),
}
NO_DIALOGUE = {"no answer", "empty answer", "other roles", "no turns"}
WITH_PLAIN_TOO = {
    "imgs",
    "img",
    "too few tags",
    "too many tags",
    "typing",
    "capital",
    "tag alone",
    "twin",
    "empty caption",
    *NO_DIALOGUE,
}
SOUND = [
    {"id": "s", "image": "a/1.jpg", "conversations": TAGGED, "text": "a cat", "Hallucination caption": "a dog"},
    {"id": "t", "conversations": PLAIN},
    {"id": "u", "image": "a/1.jpg", "conversations": TAGGED, "image_id": "7", "height": 3, "language": "en"},
    {"id": "v", "image": "a/1.jpg", "conversations": [GREETING]},
]


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_is_never_shown_is_named_and_refused_where_it_is_all(tmp_path, kind):
    record, said = UNSEEN[kind]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*SOUND, *({"id": f"r{n}", **record} for n in range(5))]))
    (line,) = Manifest.read([str(path)], version="v1").remarks()
    assert line.startswith(f"{path}: 5 of 9 records (r0, r1, r2, ...): ")
    path.write_text(json.dumps([{"id": f"r{n}", **record} for n in range(5)]))
    with pytest.raises(ValueError, match=said) as caught:
        list(Manifest.read([str(path)], version="v1").remarks())
    assert f"{path}: training would see no " in str(caught.value) and "\n" not in str(caught.value)
    plain = Manifest.read([str(path)], version="plain")
    if kind in WITH_PLAIN_TOO:
        with pytest.raises(ValueError, match="training would see no"):
            list(plain.remarks())
    else:  # the image is the whole prompt there: nothing is amiss
        assert list(plain.remarks()) == []


UNUSABLE = {"too few tags", "too many tags"}
NO_IMAGE = [kind for kind in UNSEEN if kind not in ("twin", "empty caption", *NO_DIALOGUE, *UNUSABLE)]


@pytest.mark.parametrize("kind", NO_IMAGE)
def test_the_encoder_shows_no_image_of_them(tmp_path, kind):
    """What is said is true: no row of the dialogue takes an image feature."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": "r", **UNSEEN[kind][0]}, SOUND[2]]))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", legacy=True))
    rows = [
        encode(
            sample,
            tokenizer,
            EncodingSettings(version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=3)),
        ).dialogue
        for sample in Manifest.read([str(path)], version="v1")
    ]
    assert IMAGE not in rows[0] and (rows[1] == IMAGE).sum() == 3


def test_different_reasons_add_up_to_all_of_a_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": kind, **UNSEEN[kind][0]} for kind in NO_IMAGE]))
    with pytest.raises(ValueError, match="no image of any of its 8 records"):
        list(Manifest.read([str(path)], version="v1").remarks())


@pytest.mark.parametrize("last", [PLAIN[:1], [PLAIN[0], {"from": "gpt", "value": ""}]])
def test_dialogues_that_llavas_rule_makes_worthless_are_named(tmp_path, last):
    """Not refused: other templates, and v1 under other vocabularies, do train their other answers."""
    (tmp_path / "a.json").write_text(json.dumps([{"id": "q", "conversations": [*PLAIN, *last]}]))
    (line,) = Manifest.read([str(tmp_path / "a.json")], version="v1").remarks()
    assert "1 of 1 records (q): " in line and "--version v1 then trains none of its answers" in line


def test_sound_records_are_not_remarked_upon(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SOUND))
    assert list(Manifest.read([str(tmp_path / "a.json")], version="v1").remarks()) == []
    # Another kind of file is no image: text-only data with such a key were refused whole.
    text = [{"id": "c", "conversations": PLAIN, "filename": "chapter-3.txt"}]
    (tmp_path / "c.json").write_text(json.dumps(text))
    assert list(Manifest.read([str(tmp_path / "c.json")], version="v1").remarks()) == []
    # A pair shows its image beside the dialogue, which may do without: named, never refused.
    pair = {"id": "p", "image": "a/1.jpg", "conversations": PLAIN, "text": "a cat"}
    (tmp_path / "b.json").write_text(json.dumps([pair]))
    assert len(list(Manifest.read([str(tmp_path / "b.json")], version="v1").remarks())) == 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [("IMAGES", "image"), ("images", None), ("image_path", "image"), ("Hallucination Caption", "Hallucination caption"),
     ("hallucination_captions", "Hallucination caption"), ("halucination caption", "Hallucination caption"),
     ("Hallucination edits", None), ("image_id", None), ("caption", None), ("model", None),
     ("file_name", "image"), ("Text", "text"), ("captions", "caption"), ("context", None), ("video", None)],
)  # fmt: skip
def test_which_keys_are_taken_for_which(key, meant):
    assert meant_by(key) == meant


def test_a_caption_under_another_key_is_named(tmp_path):
    """`Text` beside a hallucinated caption: the pair was made of the first answer, without a word."""
    turns = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": "yes"}]
    record = {"id": "p", "image": "a/1.jpg", "conversations": turns, "Text": "a cat", "Hallucination caption": "a dog"}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (line,) = Manifest.read([str(tmp_path / "a.json")], version="v1").remarks()
    assert "1 of 1 records (p): key 'Text' is not read; did you mean 'text'" in line


def test_prepare_reports_them_and_a_prepared_folder_says_them_again(source, capsys):
    records = [*SOUND, {"id": "r", **UNSEEN["img"][0]}, {"id": "q", **UNSEEN["no tag"][0]}]
    (source / "a.json").write_text(json.dumps(records))
    assert run_tool("prepare_data", "--input", source / "a.json", "--output", source / "out") == 0
    shown = capsys.readouterr().out
    lines = [line.removeprefix("note: ") for line in shown.splitlines() if line.startswith("note: ")]
    assert len(lines) == 2 and "1 of 6 records (r): key 'img'" in lines[0]
    assert json.loads((source / "out" / "report.json").read_text())["to look at"] == lines
    assert list(Manifest.read([str(source / "out")], version="v1").remarks()) == lines
    (source / "a.json").write_text(json.dumps(records[4:5]))
    with pytest.raises(ValueError, match="no image of any of its 1 records"):
        run_prepare(settings(source, output=str(source / "other")))
    assert not (source / "other" / "manifest.arrow").exists()


def test_a_start_says_them_and_refuses_before_any_thread(dataset, capsys):  # noqa: F811
    records = json.loads((dataset / "train.json").read_text())
    records[0]["imgs"] = [records[0].pop("image")]
    (dataset / "train.json").write_text(json.dumps(records))
    loader_of(dataset).close()
    assert "note: " in (shown := capsys.readouterr().out) and "1 of 12 records (train-0): key 'imgs'" in shown
    for record in records:
        record["imgs"] = [record.pop("image", "x.jpg")]
    (dataset / "train.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="no image of any of its 12 records"):
        loader_of(dataset)


def test_with_a_tokenizer_prepare_names_what_will_train_nothing_as_the_trainer_does(source, capsys):
    """Cut before any answer, or without labels by LLaVA's mismatch rule: only a tokenizer can tell. A second start,
    which takes the parts over and measures nothing, says the same."""
    long = [{"from": "human", "value": "<image>\n" + "Q " * 60}, {"from": "gpt", "value": "a cat"}]
    records = [
        {"id": "good", "image": "a/1.jpg", "conversations": SOUND[0]["conversations"]},
        {"id": "cut", "image": "a/1.jpg", "conversations": long},
        {"id": "asks", "conversations": [*PLAIN, *PLAIN[:1]]},
        {"id": "eos", "conversations": [PLAIN[0], {"from": "gpt", "value": "a </s> USER: cat"}]},
        {"id": "pair", "image": "a/1.jpg", "conversations": long, "text": "a cat"},
        {"id": "half", "conversations": [PLAIN[0], {"from": "gpt", "value": "\ud83d"}]},
    ]
    (source / "a.json").write_text(json.dumps(records))
    limits = {"model_max_length": 150, "visual_tokens": 16}
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    rules = EncodingSettings(version="v1", model_max_length=150, image_layout=ImageLayout(visual_tokens=16))
    expected: dict[str, list[str]] = {}
    for sample in Manifest.read([str(source / "a.json")], version="v1"):
        with contextlib.suppress(UnusableSample):
            kind = encode(sample, tokenizer, rules).untrained
            expected.setdefault(kind, []).append(sample.name)
    assert {"good", "pair"} == set(expected.pop(None)) and ["cut"] in expected.values() and len(expected) >= 2
    for _ in range(2):
        report = run_prepare(settings(source, tokenizer=str(source / "tokenizer"), **limits))
        lines = report["to look at"]
        for kind, names in expected.items():
            said = f"{len(names)} of 6 records ({', '.join(names)}): {kind}"
            assert f"as this tokenizer and --version v1 have it, {said}" in lines
        assert any("1 of 6 records (half): half of a surrogate pair" in line for line in lines)
        merge = source / "out" / "manifest.arrow"
        merge.unlink()
    # The notes that a run says at its start are none of them: its own limits decide.
    run_prepare(settings(source, tokenizer=str(source / "tokenizer"), **limits))
    assert not any("as this tokenizer" in line for line in Manifest.read([str(source / "out")], version="v1").remarks())


def test_a_caption_without_an_image_is_no_pair(tmp_path):
    """So its dialogue without an answer trains nothing, `text` or not."""
    (tmp_path / "a.json").write_text(json.dumps([{"id": "q", "conversations": PLAIN[:1], "text": "a cat"}, *SOUND]))
    (line,) = Manifest.read([str(tmp_path / "a.json")], version="v1").remarks()
    assert "(q): no answer, or none with words" in line


def test_twins_without_an_image_are_named(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"id": "q", "conversations": PLAIN, "text": "yes", "Hallucination caption": "no"}])
    )
    (line,) = Manifest.read([str(tmp_path / "a.json")], version="v1").remarks()
    assert line.endswith("1 of 1 records (q): hallucinated captions and no image: they make no pair")


@pytest.mark.parametrize("lines", [False, True])
def test_keys_that_stand_twice_and_keys_that_are_nan_are_said(tmp_path, lines):
    """JSON's readers take the last of two and say nothing; NaN is what pandas writes for a record without the key."""
    turns = '"conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "no", "value": "yes"}]'
    once = turns.replace('"value": "no", ', "")
    texts = [
        f'{{"id": "a", "text": "one", "text": "two", {turns}}}',
        f'{{"id": "b", "text": NaN, {once}}}',
        f'{{"id": "c", {once}}}',
    ]
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_text("\n".join(texts) if lines else f"[{', '.join(texts)}]")
    manifest = Manifest.read([str(path)], version="v1")
    assert manifest[0].caption == "two" and manifest[0].conversations[1][1] == "yes"
    assert manifest[1].caption is None
    assert [line.removeprefix(f"{path}: 1 of 3 records ") for line in manifest.remarks()] == [
        "(a): key 'text' stands there more than once: the last one is read",
        "(a): key 'value' stands there more than once: the last one is read",
        "(b): key 'text' is NaN: read as if it were not there",
    ]
