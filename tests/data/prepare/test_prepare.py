"""The prepare tool as its users run it: every record kept as the JSON has it, duplicates, digests, mistakes."""

import gc
import json
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import arrow_manifest
from hacl_megatron.data.prepare import parts as prepare
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.templates import find_template, template_names
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.prepare.prepare_runs import RECORDS, ROOT, settings, turns
from tests.data.tiny_tokenizer import CHAT, write_tokenizer
from tests.warm import run_warm


def contents(manifest: Manifest) -> list[tuple]:
    return [(s.name, s.image, s.conversations, s.caption, s.hallucinated_captions) for s in manifest]


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_samples_are_the_records_of_the_json(source, monkeypatch, chunk):
    """Worked out here once more from the JSON, by the rules of the design page."""
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", chunk)
    report = run_prepare(settings(source, num_workers=3))
    assert (report["samples"], report["text only"]) == (len(RECORDS), 2)
    for version in ("plain", "v1"):
        manifest = Manifest.read([str(source / "out")], version=version)
        assert len(manifest) == len(RECORDS)
        for index, record in enumerate(RECORDS):
            sample, said = manifest[index], record["conversations"]
            answer = next((turn["value"] for turn in said if turn["from"] == "gpt"), None)
            text = record.get("text")
            if text is None and (version == "plain" or {"caption", "Hallucination caption"} & set(record)):
                text = answer if isinstance(answer, str) else None
            wrong = record.get("Hallucination caption", [])
            assert sample.name == str(record.get("id", record.get("image", f"record {index}")))
            assert sample.image == record.get("image")
            assert sample.conversations == tuple((turn["from"], turn["value"]) for turn in said)
            assert sample.caption == ((text or "").replace("<image>", "").strip() or None)
            expected = [c.strip() for c in ([wrong] if isinstance(wrong, str) else wrong)]
            assert sample.hallucinated_captions == tuple(c for c in expected if c)
            assert (sample.source, sample.stored) == (str(source / "a.json"), (None,) * len(sample.images))
    words = [sum(len(t["value"].split()) for t in r["conversations"] if isinstance(t["value"], str)) for r in RECORDS]
    signs = [1 if "image" in record else -1 for record in RECORDS]
    assert manifest.modality_lengths().tolist() == [s * max(w, 1) for s, w in zip(signs, words, strict=True)]


def test_a_manifest_keeps_the_objects_of_few_record_batches(source, monkeypatch):
    """Some 29 kB each: catches a rank that holds them all, 140 MB for 20 million records, and threads that are handed
    another batch's columns while theirs makes room."""
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 1)
    run_prepare(settings(source))
    path, made, read = str(source / "out/manifest.arrow"), [], ArrowManifest._read
    expected = [ArrowManifest(path).record(index) for index in range(len(RECORDS))]

    def noting(self, number):
        columns = read(self, number)
        made.append(weakref.ref(columns["id"]))
        return columns

    monkeypatch.setattr(arrow_manifest, "KEPT_BATCHES", 3)
    monkeypatch.setattr(ArrowManifest, "_read", noting)
    manifest = ArrowManifest(path)
    with ThreadPoolExecutor(4) as threads:
        order = [*range(len(RECORDS))] * 20
        random.Random(0).shuffle(order)
        assert [*threads.map(manifest.record, order)] == [expected[index] for index in order]
    assert len(manifest.column("id")) == len(RECORDS) and len(manifest.of_images("image")[1]) > 3
    gc.collect()
    assert sum(batch() is not None for batch in made) == 3 < len(RECORDS) < len(made)


def test_any_arrow_reader_opens_the_manifest(source):
    run_prepare(settings(source))
    table = pa.ipc.open_file(str(source / "out" / "manifest.arrow")).read_all()
    assert table.column("id").to_pylist()[:3] == ["1", "2", "3"]
    assert table.column("conversations")[0].as_py() == RECORDS[0]["conversations"]
    assert table.column("hallucinated_captions")[2].as_py() == ["A dog.", "A <unk> cat"]


def test_the_digest_is_of_the_content(source):
    """Equal for raw and prepared, wherever they lie; another for whatever training would see."""
    run_prepare(settings(source))
    raw = Manifest.read([str(source / "a.json")], version="v1")
    assert raw.digest == Manifest.read([str(source / "out")], version="v1").digest
    (source / "elsewhere").mkdir()
    digests = {raw.digest}
    changes = [{"image": "x.jpg"}, {"text": "x"}, {"conversations": turns("Why?")}, {"Hallucination caption": ["x"]}]
    for number, change in enumerate([{"id": "x"}, *changes]):
        path = source / "elsewhere" / f"{number}.json"
        path.write_text(json.dumps([RECORDS[0] | change, *RECORDS[1:]]))
        digests.add(Manifest.read([str(path)], version="v1").digest)
    assert len(digests) == 1 + len(changes)  # a name alone changes nothing
    (source / "elsewhere" / "order.json").write_text(json.dumps(RECORDS[::-1]))
    assert Manifest.read([str(source / "elsewhere" / "order.json")], version="v1").digest not in digests


def test_duplicates_are_dropped_and_equal_ids_told_apart(source):
    first, other = {"id": "7", "image": "7.jpg", "conversations": turns()}, {"id": "7", "conversations": turns("Why?")}
    taken = {"id": "7#2", "conversations": turns("When?")}
    (source / "a.json").write_text(json.dumps([first, first, other]))
    (source / "b.jsonl").write_text("\n".join(map(json.dumps, [other, {**first, "id": 7}, taken, first, taken])))
    inputs = [str(source / "a.json"), str(source / "b.jsonl")]
    report = run_prepare(settings(source, inputs=inputs))
    assert (report["duplicates dropped"], report["renamed, same id as another record"]) == (5, 2)
    assert list(report["files"].values()) == [2, 1]
    names = [sample.name for sample in Manifest.read([str(source / "out")], version="v1")]
    assert names == ["7", "7#2", "7#2#2"]
    run_prepare(settings(source, inputs=inputs, keep_duplicates=True, output=str(source / "all")))
    kept = Manifest.read([str(source / "all")], version="v1")
    assert [sample.name for sample in kept] == ["7"] * 5 + ["7#2", "7", "7#2"]
    assert contents(kept) == contents(Manifest.read(inputs, version="v1"))  # raw files are taken as they are


@pytest.mark.parametrize("version", [name for name in template_names() if not find_template(name).needed_tokens])
@pytest.mark.parametrize("legacy", [True, False])
def test_token_lengths_are_those_of_the_encoder(source, version, legacy):
    folder = write_tokenizer(source / "other", legacy=legacy, chat_template=CHAT)
    run_prepare(settings(source, tokenizer=folder, version=version))
    tokenizer = load_tokenizer(folder)
    rules = EncodingSettings(version=version, model_max_length=10**6, image_layout=ImageLayout(visual_tokens=1))
    manifest = ArrowManifest(str(source / "out" / "manifest.arrow"))
    columns = [manifest.column(f"{name}_tokens").to_pylist() for name in ("dialogue", "caption", "hallucinated")]
    counted = 0
    for sample, *found in zip(Manifest.read([str(source / "out")], version=version), *columns, strict=True):
        try:
            encoded = encode(sample, tokenizer, rules)
        except UnusableSample:
            assert found == [None, None, None]
            continue
        captions = [None, None]
        if encoded.pairs:
            captions = [len(encoded.pairs[0].caption_segment), sum(map(len, encoded.pairs[0].hallucinated_segments))]
        assert found == [len(encoded.dialogue), *captions], sample
        counted += 1
    assert counted >= 4


def test_a_fast_tokenizers_batch_is_its_single_texts(source):
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    texts = ["", " a cat", "a  cat </s> USER", "<unk> 😀", "</s>"] * 130  # more than go in one call
    assert tokenizer.backend.is_fast
    singles = [tokenizer.encode(text, bos=False) for text in texts]
    assert tokenizer.count(texts) == [(len(ids), ids.count(tokenizer.unk_id)) for ids in singles]


def tool(source: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "tools" / "prepare_data.py"), "--input", str(source / "a.json"), "--output",
        str(source / "out"), "--num-workers", "2", *more,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"inputs": ["/nowhere.json"]}, "/nowhere.json: no such file"),
        ({"inputs": ["{}/a.json", "{}/./a.json"]}, "names a file twice"),
        ({"output": "{}/a.json"}, "is a file; expected a folder"),
        ({"verify_images": True}, "--verify-images is given without the images; add --image-folder"),
        ({"write_shards": True}, "--write-shards is given without"),
        ({"write_shards": True, "image_folder": "{}/gone"}, "is not a folder"),
        ({"num_workers": 0}, "--num-workers is 0; expected at least 1"),
        ({"tokenizer": "{}/images"}, "holds neither tokenizer.model"),
    ],
)
def test_mistakes_are_one_line(source, changes, complaint):
    def here(value):
        return value.format(source) if isinstance(value, str) else value

    changes = {k: [here(x) for x in v] if isinstance(v, list) else here(v) for k, v in changes.items()}
    with pytest.raises(ValueError, match=complaint) as caught:
        run_prepare(settings(source, **changes))
    assert "\n" not in str(caught.value)


def test_the_tool_prints_its_report_and_names_faults_in_one_line(source):
    more = ["--image-folder", str(source / "images"), "--verify-images", "--tokenizer", str(source / "tokenizer")]
    done = run_warm(tool(source, *more))
    assert done.returncode == 0, done.stderr
    assert f"samples: {len(RECORDS)}\n" in done.stdout and "bad images: 1\n" in done.stdout
    assert f"train with --data-path {source / 'out'}" in done.stdout
    (source / "a.json").write_text('[{"id": 1}]')
    done = run_warm(tool(source))
    assert done.returncode == 2 and "key 'conversations' is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_manifest_says_so(source):
    run_prepare(settings(source))
    path = source / "out" / "manifest.arrow"
    data = path.read_bytes()
    for content, complaint in (
        (data[:-50], "not a whole Arrow file"),
        (b"[]", "not a whole Arrow file"),
        (b"", "Arrow"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint) as caught:
            Manifest.read([str(source / "out")], version="v1")
        assert "\n" not in str(caught.value) and "prepare" in str(caught.value)
    with pa.ipc.new_file(str(path), pa.schema([("a", pa.int32())])) as writer:
        writer.write_table(pa.table({"a": pa.array([1], pa.int32())}))
    with pytest.raises(ValueError, match=r"no manifest of tools/prepare_data\.py"):
        Manifest.read([str(path)], version="v1")
    path.unlink()
    with pytest.raises(ValueError, match="no such file"):
        Manifest.read([str(source / "out")], version="v1")
