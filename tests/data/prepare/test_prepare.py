"""The prepare tool as its users run it: every record kept as the JSON has it, restarts, duplicates, images, shards."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import parts as prepare
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.data.store import ImageStore, StoredImage, UnusableImage
from hacl_megatron.data.templates import template_names
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer
from tests.distributed import _context

ROOT = Path(__file__).parents[3]


def turns(question: str = "What is it?", answer: str = "a red cat") -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


RECORDS = [
    {"id": "1", "image": "a/1.jpg", "conversations": turns()},
    {"id": 2, "image": "a/2.png", "conversations": turns(), "text": " A cat.\n", "Hallucination caption": "A dog."},
    {"id": "3", "image": "b/3.jpg", "conversations": turns(), "Hallucination caption": ["A dog. ", "", "A <unk> cat"]},
    {"id": "4", "conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "yes"}]},
    {"image": "b/3.jpg", "conversations": turns("é 日本 😀", "<unk> a  cat"), "caption": ""},
    {"conversations": [{"from": "human", "value": "no answer"}], "text": ""},
    {"id": "\ud83d", "image": "c/\ud83d.jpg", "conversations": turns("\ud83d"), "text": "\ud83d"},
    {"id": "8", "image": "b/3.jpg", "conversations": [{"from": 1, "value": None}, {"from": "gpt", "value": [2]}]},
    {"id": "9", "image": "b/3.jpg", "conversations": []},
    {"id": "10", "image": "a/1.jpg", "conversations": [*turns(), *turns("US", "")[:1], *turns(answer="")[1:]]},
    {"id": "11", "image": "a/1.jpg", "conversations": [turns()[1], *turns("red </s> dog", "</s>")]},
    {"id": "12", "image": "a/1.jpg", "conversations": [*turns(), *turns()]},  # two tags: unusable
]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    """`a.json`, `images/`, `tokenizer/`."""
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    for name, size in (("a/1.jpg", (20, 10)), ("a/2.png", (8, 9)), ("b/3.jpg", (31, 17))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(path)
    write_tokenizer(tmp_path / "tokenizer", legacy=True)
    return tmp_path


def settings(source: Path, **changes) -> PrepareSettings:
    options = {"inputs": [str(source / "a.json")], "output": str(source / "out"), "progress_bar": False}
    return PrepareSettings(**(options | changes))


def contents(manifest: Manifest) -> list[tuple]:
    return [(s.name, s.image, s.conversations, s.caption, s.hallucinated_captions) for s in manifest]


# ------------------------------------------------------------------------------------------------------------- manifest


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
            assert (sample.source, sample.stored) == (str(source / "a.json"), None)
    words = [sum(len(t["value"].split()) for t in r["conversations"] if isinstance(t["value"], str)) for r in RECORDS]
    signs = [1 if "image" in record else -1 for record in RECORDS]
    assert manifest.modality_lengths().tolist() == [s * max(w, 1) for s, w in zip(signs, words, strict=True)]


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


@pytest.mark.parametrize("version", template_names())
@pytest.mark.parametrize("legacy", [True, False])
def test_token_lengths_are_those_of_the_encoder(source, version, legacy):
    folder = write_tokenizer(source / "other", legacy=legacy)
    run_prepare(settings(source, tokenizer=folder, version=version))
    tokenizer = load_tokenizer(folder)
    rules = EncodingSettings(version=version, model_max_length=10**6, visual_tokens=1)
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
        if encoded.caption_segment is not None:
            captions = [len(encoded.caption_segment), sum(map(len, encoded.hallucinated_segments))]
        assert found == [len(encoded.dialogue), *captions], sample
        counted += 1
    assert counted >= 4


def test_a_fast_tokenizers_batch_is_its_single_texts(source):
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    texts = ["", " a cat", "a  cat </s> USER", "<unk> 😀", "</s>"] * 130  # more than go in one call
    assert tokenizer.backend.is_fast
    singles = [tokenizer.encode(text, bos=False) for text in texts]
    assert tokenizer.count(texts) == [(len(ids), ids.count(tokenizer.unk_id)) for ids in singles]


# ------------------------------------------------------------------------------------------------------------- restarts


def tool(source: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--input", str(source / "a.json"), "--output",
        str(source / "out"), "--num-workers", "2", *more,
    ]  # fmt: skip


def prepare_in_small_parts(*options: str) -> None:
    """Runs in a process of its own, which will be killed."""
    prepare.CHUNK_SAMPLES = 64
    source, output, tokenizer = options
    run_prepare(PrepareSettings(inputs=[source], output=output, tokenizer=tokenizer, progress_bar=False))


def test_a_killed_start_goes_on_and_ends_like_an_undisturbed_one(source, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_SAMPLES", 64)
    many = [{"id": n, "image": f"{n % 3}.jpg", "conversations": turns(f"{n}")} for n in range(6000)]
    total = -(-len(many) // 64)
    (source / "a.json").write_text(json.dumps(many))
    tokenizer = str(source / "tokenizer")
    # A process of the tests' fork server, which has paid the imports.
    options = (str(source / "a.json"), str(source / "out"), tokenizer)
    child = _context.Process(target=prepare_in_small_parts, args=options)
    child.start()
    work = source / "out" / ".partial"
    end = time.monotonic() + 120
    while len(list(work.glob("*.arrow"))) < 5 and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = sorted(work.glob("*.arrow"))
    assert 5 <= len(before) < total and not (source / "out" / "manifest.arrow").exists()
    before[0].write_bytes(before[0].read_bytes()[:1000])  # as a power cut may leave it

    built = []
    monkeypatch.setattr(
        prepare, "build_batch", lambda *given, build=prepare.build_batch: built.append(1) or build(*given)
    )
    run_prepare(settings(source, tokenizer=tokenizer))
    assert len(built) == total - (len(before) - 1)
    assert not work.exists()
    run_prepare(settings(source, tokenizer=tokenizer, output=str(source / "undisturbed")))
    one, other = (source / name / "manifest.arrow" for name in ("out", "undisturbed"))
    assert one.read_bytes() == other.read_bytes()


def test_other_settings_do_not_take_over_what_was_measured_before(source, monkeypatch):
    monkeypatch.setattr("hacl_megatron.data.prepare.run.remove_folder", lambda folder: None)
    lengths = []
    for version in ("plain", "v1", "plain"):
        run_prepare(settings(source, tokenizer=str(source / "tokenizer"), version=version))
        lengths.append(ArrowManifest(str(source / "out" / "manifest.arrow")).column("dialogue_tokens").to_pylist())
    assert lengths[0] == lengths[2] != lengths[1]


def test_two_starts_at_once_are_one_too_many(source):
    (source / "out" / ".partial").mkdir(parents=True)
    held = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
         "print('held', flush=True); sys.stdin.read()", str(source / "out" / ".partial")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="being prepared by another process"):
            run_prepare(settings(source))
    finally:
        held.communicate("")
    run_prepare(settings(source))


# --------------------------------------------------------------------------------------------------------------- images


def spoil(source: Path) -> None:
    folder = source / "images"
    whole = (folder / "b" / "3.jpg").read_bytes()
    (folder / "b" / "3.jpg").write_bytes(whole[:-20])
    (folder / "a" / "2.png").write_text("<html>404</html>")


def test_images_are_decoded_measured_and_the_bad_ones_listed(source):
    spoil(source)
    report = run_prepare(settings(source, image_folder=str(source / "images"), verify_images=True))
    assert report["bad images"] == 3
    bad = {e["image"]: e for e in map(json.loads, (source / "out" / "bad_images.jsonl").read_text().splitlines())}
    assert "cut off" in bad["b/3.jpg"]["reason"] and bad["b/3.jpg"]["samples"] == ["3", "b/3.jpg", "8", "9"]
    assert "not an image" in bad["a/2.png"]["reason"] and "no file name" in bad["c/?.jpg"]["reason"]
    manifest = ArrowManifest(str(source / "out" / "manifest.arrow"))
    assert manifest.column("width").to_pylist()[:5] == [20, None, None, None, None]
    assert manifest.column("height").to_pylist()[9] == 10
    assert Image.open(source / "out" / "histograms.png").size[0] > 1000  # words, width, height


def test_shards_are_read_by_webdataset_and_by_offset(source):
    run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True, images_per_shard=2))
    shards = sorted(map(str, (source / "out" / "shards").iterdir()))
    assert [os.path.basename(shard) for shard in shards] == ["images-000000.tar", "images-000001.tar"]
    seen = {}
    for found in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        about = json.loads(found["json"])
        (suffix,) = {"jpg", "png"} & set(found)
        assert about["image"] not in seen
        seen[about["image"]] = found[suffix]
        assert all(record["image"] == about["image"] for record in about["records"])
        for record in about["records"]:
            given = next(r for r in RECORDS if str(r.get("id", r.get("image"))) == record["id"])
            assert record["conversations"] == given["conversations"]
            assert record.get("text") == given.get("text")
    assert seen == {name: (source / "images" / name).read_bytes() for name in ("a/1.jpg", "a/2.png", "b/3.jpg")}

    (source / "nothing").mkdir()
    store = ImageStore(source / "nothing")
    manifest = Manifest.read([str(source / "out")], version="v1")
    read = 0
    for sample in manifest:
        if sample.image in seen:
            assert store.fetch(sample.image, sample.stored) == seen[sample.image]
            read += 1
    assert read == 9 and manifest[3].stored is None
    columns = ArrowManifest(str(source / "out" / "manifest.arrow"))
    assert columns.column("width").to_pylist()[:4] == [20, 8, 31, None]
    store.close()


def test_a_finished_shard_is_not_written_again(source, monkeypatch):
    options = {"image_folder": str(source / "images"), "write_shards": True, "images_per_shard": 1}
    monkeypatch.setattr("hacl_megatron.data.prepare.run.remove_folder", lambda folder: None)
    run_prepare(settings(source, **options))
    shards = sorted((source / "out" / "shards").iterdir())
    whole = [shard.read_bytes() for shard in shards]
    old = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].unlink()
    run_prepare(settings(source, **options))
    assert [shard.read_bytes() for shard in shards] == whole
    now = [shard.stat().st_mtime_ns for shard in shards]
    assert now[1] != old[1] and now[0] == old[0] and now[2:] == old[2:]


# ------------------------------------------------------------------------------------------------------------- security


def test_names_leave_neither_the_folder_nor_a_header(source):
    (source / "secret.jpg").write_bytes((source / "images" / "a" / "1.jpg").read_bytes())
    hostile = ["../secret.jpg", str(source / "secret.jpg"), "a/../../secret.jpg", "x\0.jpg", "a/1.jpg"]
    (source / "images" / "link.jpg").symlink_to(source / "secret.jpg")
    records = [
        {"id": f"../{n}", "image": name, "conversations": turns()} for n, name in enumerate([*hostile, "link.jpg"])
    ]
    (source / "a.json").write_text(json.dumps(records))
    report = run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True))
    assert report["bad images"] == 5
    with tarfile.open(source / "out" / "shards" / "images-000000.tar") as tar:
        assert tar.getnames() == ["000000004.jpg", "000000004.json"]
        assert all(member.isreg() for member in tar)
    assert sorted(path.name for path in source.iterdir()) == ["a.json", "images", "out", "secret.jpg", "tokenizer"]


def rewritten(source: Path, **metadata) -> str:
    """The prepared manifest with other metadata, as a hostile or careless author may give it away."""
    path = source / "out" / "manifest.arrow"
    table = pa.ipc.open_file(str(path)).read_all()
    known = json.loads(table.schema.metadata[b"hacl_megatron"])
    table = table.replace_schema_metadata({b"hacl_megatron": json.dumps(known | metadata).encode()})
    with pa.ipc.new_file(str(source / "out" / "other.arrow"), table.schema) as writer:
        writer.write_table(table)
    return str(source / "out" / "other.arrow")


@pytest.mark.parametrize("name", ["../../secret.tar", "/etc/passwd", "images-000000.tar/..", "x.tar", 3])
def test_a_manifest_cannot_name_a_shard_outside_its_folder(source, name):
    run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True))
    with pytest.raises(ValueError, match=r"as a shard, expected images-000000\.tar"):
        ArrowManifest(rewritten(source, shards=[name]))
    with pytest.raises(ValueError, match=r"1 of its 2 shards are missing, first images-000007.tar"):
        ArrowManifest(rewritten(source, shards=["images-000000.tar", "images-000007.tar"]))
    with pytest.raises(ValueError, match=r"format 99, expected 1; prepare the data again"):
        ArrowManifest(rewritten(source, format=99))


def test_places_outside_a_shard_are_bad_images(source):
    path = str(source / "x.tar")
    Path(path).write_bytes(bytes(range(100)))
    store = ImageStore(source)
    assert store.fetch("x", StoredImage(path, 90, 10)) == bytes(range(90, 100))
    for offset, size in ((90, 11), (-1, 5), (0, 0), (0, -1), (2**62, 1), (0, 2**62)):
        with pytest.raises(UnusableImage, match="not in the shard"):
            store.fetch("x", StoredImage(path, offset, size))
    for made, reason in ((os.symlink, "cannot be read"), (lambda _, to: os.mkfifo(to), "not a regular file")):
        made(path, f"{path}.{made.__name__}")
        with pytest.raises(UnusableImage, match=reason):
            store.fetch("x", StoredImage(f"{path}.{made.__name__}", 0, 1))
    store.close()


def test_more_shards_than_may_stay_open(source, monkeypatch):
    monkeypatch.setattr("hacl_megatron.data.store.MAX_OPEN_SHARDS", 2)
    store = ImageStore(source)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number in range(5):
            (source / f"{number}.tar").write_bytes(bytes([number] * 9))
            assert store.fetch("x", StoredImage(str(source / f"{number}.tar"), 3, 2)) == bytes([number] * 2)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    more = ["--image-folder", str(source / "images"), "--verify-images", "--tokenizer", str(source / "tokenizer")]
    done = subprocess.run(tool(source, *more), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"samples: {len(RECORDS)}\n" in done.stdout and "bad images: 1\n" in done.stdout
    assert f"train with --data-path {source / 'out'}" in done.stdout
    (source / "a.json").write_text('[{"id": 1}]')
    done = subprocess.run(tool(source), env=environment, capture_output=True, text=True, timeout=300)
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


def test_images_of_any_kind_keep_their_bytes(source):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(buffer, "GIF")
    (source / "images" / "a" / "1.jpg").write_bytes(buffer.getvalue())
    run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True))
    with tarfile.open(source / "out" / "shards" / "images-000000.tar") as tar:
        assert tar.extractfile("000000000.gif").read() == buffer.getvalue()
