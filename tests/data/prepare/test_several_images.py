"""Records with several images, in every form that users have them, beside those with one and with none."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, encode
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.store import ImageStore
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.prepare.prepare_runs import RECORDS, settings, turns

HALLUCINATED = "Hallucination caption"
TAGS = "<image>\n<image>\n"
ONE = {"id": "1", "image": "a/1.jpg", "conversations": turns()}
TWO = {"id": "2", "image": ["a/1.jpg", "a/2.png"], "conversations": turns("<image>\nWhich is red?")}


def read(folder: Path, *records: dict[str, Any], version: str = "v1") -> Manifest:
    (folder / "data.json").write_text(json.dumps(records))
    return Manifest.read([str(folder / "data.json")], version=version)


def seen(sample: Sample) -> tuple[Any, ...]:
    return sample.images, sample.conversations, sample.caption, sample.hallucinated_captions, sample.pairs


CAPTIONS = {"text": "A cat.", HALLUCINATED: ["A dog.", "A cow."]}
OF_ONE = {
    "a list": {"image": ["a/1.jpg"]} | CAPTIONS,
    "images": {"image": None, "images": ["a/1.jpg"]} | CAPTIONS,
    "images, a string": {"images": "a/1.jpg"} | CAPTIONS,
    "listed captions": {"image": ["a/1.jpg"], "text": ["A cat."], HALLUCINATED: [["A dog.", "A cow."]]},
    "listed caption, listed twins": {"image": ["a/1.jpg"], "text": ["A cat."], HALLUCINATED: ["A dog.", "A cow."]},
    "what datasets writes": {"images": [{"bytes": "/9j/", "path": "a/1.jpg"}], "image": None} | CAPTIONS,
}


@pytest.mark.parametrize("form", OF_ONE)
def test_a_list_of_one_is_what_it_holds(tmp_path, form):
    """Hashed otherwise, a run could not go on over the same data; `images` was not read at all."""
    plain, listed = read(tmp_path, ONE | CAPTIONS), read(tmp_path, {**ONE, "image": None, **OF_ONE[form]})
    assert seen(listed[0]) == seen(plain[0]) and plain[0].pairs == ((0, "A cat.", ("A dog.", "A cow.")),)
    assert listed.digest == plain.digest and listed.modality_lengths().tolist() == plain.modality_lengths().tolist()
    assert ["picture in key 'images'" in line for line in listed.remarks()] == [True] * (form == "what datasets writes")


PARTS = [{"type": "image"}, {"type": "text", "text": "Left: "}, {"type": "image"}, {"type": "image"}]
OF_SEVERAL = {
    "LLaVA-NeXT's": (TWO, f"{TAGS}Which is red?"),
    "in the text": (TWO | {"conversations": turns("Is <image> red?")}, "<image>\nIs <image> red?"),
    "LLaMA-Factory's and ms-swift's": (
        {"messages": [{"role": "user", "content": f"{TAGS}Which?"}, {"role": "assistant", "content": "1"}],
         "images": ["a/1.jpg", "a/2.png"]}, f"{TAGS}Which?"),
    "OpenAI's parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "no"}],
         "images": ["a/1.jpg", "a/2.png", "a/1.jpg"]}, "<image>\nLeft: <image><image>"),
    "a preference": (
        {"question": "Which?", "images": ["a/1.jpg", "a/2.png"], "chosen": "1", "rejected": "2"}, f"{TAGS}Which?"),
    "a preference with tags": (
        {"question": "Is <image> or <image>?", "image": ["a/1.jpg", "a/2.png"], "chosen": "1", "rejected": "2"},
        "Is <image> or <image>?"),
}  # fmt: skip


@pytest.mark.parametrize("form", OF_SEVERAL)
def test_every_form_of_several_images_keeps_them_and_their_tags_in_order(tmp_path, form):
    record, question = OF_SEVERAL[form]
    (sample,) = manifest = read(tmp_path, record, version="plain")
    assert sample.images == ("a/1.jpg", "a/2.png", "a/1.jpg")[: len(sample.images)]
    assert len(sample.images) == question.count("<image>") and sample.stored == (None,) * len(sample.images)
    assert sample.conversations[0] == ("human", question)
    assert sample.caption is None and sample.pairs == (), "the template makes no caption of an answer about several"
    assert sample.name == record.get("id", "a/1.jpg")
    assert list(manifest.remarks("phrase")) == [] and manifest.modality_lengths()[0] > 0


LISTED = TWO | {"text": [" A cat.\n", None], HALLUCINATED: [["A dog.", " "], None]}
NO_PAIR = {
    "a plain caption": ({"text": "Cats."}, "several images, and a key 'text' without a list of their captions"),
    "a marked answer": ({"caption": "yes"}, "several images, and a key 'caption' without a list of their captions"),
    "plain twins": ({HALLUCINATED: "Dogs."}, f"several images, and a key '{HALLUCINATED}' without a list"),
    "listed twins alone": ({HALLUCINATED: [["Dogs."], None]}, f"several images, and a key '{HALLUCINATED}' without"),
    "a twin of nothing": ({"text": ["A cat.", ""], HALLUCINATED: [[], "Dogs."]}, "whose caption is not in the list"),
}


def test_pairs_are_of_the_images_whose_captions_are_listed(tmp_path):
    """Taken for one image's, the captions of several would all be contrasted with the first."""
    manifest = read(
        tmp_path, LISTED, LISTED | {"text": ["A cat.", "A bird."], HALLUCINATED: ["A dog.", ["A fly.", "A bee."]]},
        LISTED | {"text": ["A cat.", "A bird."], HALLUCINATED: []}, LISTED | {"text": [None, ""], HALLUCINATED: None},
    )  # fmt: skip
    cat, bird = (0, "A cat.", ("A dog.",)), (1, "A bird.", ("A fly.", "A bee."))
    pairs = [sample.pairs for sample in manifest]
    assert pairs == [(cat,), (cat, bird), ((0, "A cat.", ()), (1, "A bird.", ())), ()]
    assert list(manifest.remarks()) == [] and len({read(tmp_path, TWO).digest, manifest.digest}) == 2
    digests = {read(tmp_path, LISTED | {"text": [caption, None]}).digest for caption in ("A cat.", "A cow.", None)}
    assert len(digests) == 3, "captions are part of what training sees"


@pytest.mark.parametrize("case", NO_PAIR)
def test_what_gives_several_images_no_pair_is_said(tmp_path, case):
    keys, said = NO_PAIR[case]
    manifest = read(tmp_path, TWO | keys, LISTED)
    assert not any(pair.hallucinated for pair in manifest[0].pairs) and manifest[0].caption is None
    (line,) = manifest.remarks()
    assert "1 of 2 records (2): " in line and said in line
    if HALLUCINATED in keys:
        with pytest.raises(ValueError, match="training would see no hallucinated captions of any"):
            list(read(tmp_path, TWO | keys).remarks())


def test_mixed_records_are_stored_once_and_read_back_bit_for_bit(source):
    """Raw and prepared; those of which the columns hold no text too."""
    mixed = [
        *RECORDS, TWO, LISTED | {"id": "l"}, {"id": "t", "image": [], "conversations": turns()},
        TWO | {"id": "again", "image": ["b/3.jpg", "b/3.jpg"]}, TWO | {"id": "gone", "image": ["a/1.jpg", "no.jpg"]},
        LISTED | {"id": "half", "text": ["\ud83d", "B"]}, TWO, {"id": "p", **OF_SEVERAL["a preference"][0]},
    ]  # fmt: skip
    (source / "a.json").write_text(json.dumps(mixed))
    report = run_prepare(
        settings(source, image_folder=str(source / "images"), write_shards=True, tokenizer=str(source / "tokenizer"))
    )
    assert (report["several images"], report["distinct images"], report["duplicates dropped"]) == (6, 5, 1)
    bad = [json.loads(line) for line in (source / "out" / "bad_images.jsonl").read_text().splitlines()]
    assert [(entry["image"], entry["samples"]) for entry in bad][-1] == ("no.jpg", ["gone"])
    prepared = Manifest.read([str(source / "out")], version="v1")
    assert any("(\\ud83d, half): half of a surrogate pair" in line for line in prepared.remarks())
    del mixed[-2]  # dropped, for it repeats an earlier one
    (source / "a.json").write_text(json.dumps(mixed))
    raw = Manifest.read([str(source / "a.json")], version="v1")
    assert raw.digest == prepared.digest and len(raw) == len(prepared) == len(mixed)
    assert raw.modality_lengths().tolist() == prepared.modality_lengths().tolist()
    store, places = ImageStore(source), {}
    for one, other in zip(raw, prepared, strict=True):
        assert seen(one) == seen(other) and one.rejected_answers == other.rejected_answers
        for name, place in zip(other.images, other.stored, strict=True):
            assert places.setdefault(name, place) == place, "an image used by many records lies in one place"
            if place is not None:
                assert store.fetch(name, place) == (source / "images" / name).read_bytes()
    store.close()
    assert [name for name, place in places.items() if place is not None] == ["a/1.jpg", "a/2.png", "b/3.jpg"]
    manifest = ArrowManifest(str(source / "out" / "manifest.arrow"))
    names, rows = manifest.of_images("image")
    shown = [(row, name) for row, sample in enumerate(prepared) for name in sample.images if name.isascii()]
    found = zip(rows.tolist(), names.to_pylist(), strict=True)
    assert [item for item in found if item[1] != "c/?.jpg"] == shown, "in the records' order"
    widths, rows = manifest.of_images("width")
    assert dict(zip(rows.tolist(), widths.to_pylist(), strict=True))[12] == 8, "the last image of TWO is 8 wide"
    assert manifest.column("more_images")[12].as_py()[0]["width"] == 8
    checked = settings(source, output=str(source / "in"), image_folder=str(source / "images"), verify_images=True)
    assert run_prepare(checked)["bad images"] == report["bad images"] == len(bad)
    unpacked = ArrowManifest(str(source / "in" / "manifest.arrow"))
    for name in ("image", "width", "height"):
        assert [part.tolist() for part in manifest.of_images(name)] == [p.tolist() for p in unpacked.of_images(name)]
    assert (source / "in" / "bad_images.jsonl").read_text().splitlines()[-1] == json.dumps(bad[-1])

    # A record stands beside the first of its images, once, and is read as the same record.
    shard = source / "out" / "shards" / "images-000000.tar"
    beside = {about["image"]: about["records"] for about in (
        json.loads(item["json"]) for item in webdataset.WebDataset(str(shard), shardshuffle=False)
    )}  # fmt: skip
    assert [len([r for r in beside[name] if r["id"] == "again"]) for name in ("a/1.jpg", "b/3.jpg")] == [0, 1]
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 6
    written = {record["id"]: record for records in beside.values() for record in records}
    assert len(written) == sum(map(len, beside.values()))
    for name in ("2#2", "l", "again", "gone", "p"):
        (before,) = (sample for sample in prepared if sample.name == name)
        assert seen(read(source, written[name])[0]) == seen(before)


@pytest.mark.parametrize("version", ["v1", "mistral"])
def test_lengths_and_what_trains_nothing_are_the_encoders(source, version):
    """Each image is `--visual-tokens` rows: counted as one, a record that is cut before any answer went unnamed."""
    fits = turns("<image>\nWhich is red?", "a")
    records = [
        LISTED | {"text": ["A cat.", "A red bird."]}, TWO | {"id": "fits", "conversations": fits}, ONE,
        TWO | {"id": "long", "image": ["a/1.jpg"] * 4, "conversations": turns("<image>" * 3, "no")},
        {"id": "text", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        TWO | {"id": "tags", "conversations": turns()},
    ]  # fmt: skip
    (source / "a.json").write_text(json.dumps(records))
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    rules = EncodingSettings(version=version, model_max_length=10**6, image_layout=ImageLayout(visual_tokens=1))
    samples = list(Manifest.read([str(source / "a.json")], version=version))
    encoded = [encode(sample, tokenizer, rules) for sample in samples[:5]]
    longest = len(encoded[1].dialogue) + 2 * 99
    report = run_prepare(
        settings(
            source, tokenizer=str(source / "tokenizer"), version=version, visual_tokens=100, model_max_length=longest
        )
    )
    manifest = ArrowManifest(str(source / "out" / "manifest.arrow"))
    counted = [manifest.column(f"{name}_tokens").to_pylist() for name in ("dialogue", "caption", "hallucinated")]
    assert counted[0] == [*(len(sample.dialogue) for sample in encoded), None]
    pairs = encoded[0].pairs
    assert counted[1] == [sum(len(pair.caption_segment) for pair in pairs), *[None] * 5] and len(pairs) == 2
    twins = sum(len(twin) for pair in pairs for twin in pair.hallucinated_segments)
    assert counted[2][0] == twins > 0
    (said,) = [line for line in report["to look at"] if f"--version {version} have it" in line]
    assert said.endswith(f"1 of 6 records (long): its images do not fit into --model-max-length {longest}")
