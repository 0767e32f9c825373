"""Images that the preparation checks and packs into shards: their bytes, their places, names that lead elsewhere."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.run import run_prepare
from hacl_megatron.data.prepare.sealed_arrow import write_sealed
from hacl_megatron.data.store import ImageStore, StoredImage, UnusableImage
from tests.data.prepare.prepare_runs import RECORDS, settings, turns


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
            assert store.fetch(sample.images[0], sample.stored[0]) == seen[sample.image]
            read += 1
    assert read == 9 and manifest[3].stored == (None,) * len(manifest[3].images)
    columns = ArrowManifest(str(source / "out" / "manifest.arrow"))
    assert columns.column("width").to_pylist()[:4] == [20, 8, 31, None]
    store.close()


def test_images_of_any_kind_keep_their_bytes(source):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(buffer, "GIF")
    (source / "images" / "a" / "1.jpg").write_bytes(buffer.getvalue())
    run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True))
    with tarfile.open(source / "out" / "shards" / "images-000000.tar") as tar:
        assert tar.extractfile("000000000.gif").read() == buffer.getvalue()


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
    schema = table.schema.with_metadata({b"hacl_megatron": json.dumps(known | metadata).encode()})
    write_sealed(str(source / "out" / "other.arrow"), schema, table.to_batches())
    return str(source / "out" / "other.arrow")


@pytest.mark.parametrize("name", ["../../secret.tar", "/etc/passwd", "images-000000.tar/..", "x.tar", 3])
def test_a_manifest_cannot_name_a_shard_outside_its_folder(source, name):
    run_prepare(settings(source, image_folder=str(source / "images"), write_shards=True))
    with pytest.raises(ValueError, match=r"as a shard, expected images-000000\.tar"):
        ArrowManifest(rewritten(source, shards=[name]))
    with pytest.raises(ValueError, match=r"1 of its 2 shards are missing, first images-000007.tar"):
        ArrowManifest(rewritten(source, shards=["images-000000.tar", "images-000007.tar"]))
    with pytest.raises(ValueError, match=r"format 99, expected 4; prepare the data again"):
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
