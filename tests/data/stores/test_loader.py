"""Steps out of an object store are those out of the folder, bit for bit, whatever the connection does."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hacl_megatron.config.files import objects
from hacl_megatron.config.files.objects import StoreError, read_range
from hacl_megatron.data.manifest import Manifest, refuse_where_no_image_is
from hacl_megatron.data.node_cache import NodeCache
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.data.store import ImageStore, UnusableImage
from tests.data.conftest import write_dataset
from tests.data.loader_runs import assert_same_batch, draw, mains
from tests.s3_server import BUCKET, FAULTS, FaultyProxy


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set, raw and prepared."""
    dataset = write_dataset(tmp_path_factory.mktemp("stores"))
    for name in ("train", "contrastive"):
        run_prepare(
            PrepareSettings(
                inputs=[str(dataset / f"{name}.json")],
                output=str(dataset / f"{name}-prepared"),
                image_folder=str(dataset / "images"),
                write_shards=True,
                images_per_shard=4,
                progress_bar=False,
            )
        )
    return dataset


@pytest.fixture(scope="module")
def url(server, prepared: Path) -> str:
    return server.upload(prepared, "data")


def flags(cache: Path, **more) -> dict:
    return {"data_cache_dir": str(cache), **more}


def assert_same_steps(expected: list, found: list) -> None:
    for one, other in zip(expected, found, strict=True):
        assert one.data_state == other.data_state
        for mine, theirs in zip(mains(one), mains(other), strict=True):
            assert_same_batch(mine, theirs)


@pytest.mark.parametrize("form", ["prepared", "raw"])
def test_steps_are_those_of_the_folder(server, prepared, url, tmp_path, monkeypatch, form) -> None:
    """With 15 % of the requests broken, twice: from the store, and from the cache. Catches places that are off, images
    that are left out for a fault of the connection, and order or content that depends on where the data lies."""
    names = [f"{name}-prepared" if form == "prepared" else f"{name}.json" for name in ("train", "contrastive")]
    local = [str(prepared / name) for name in names]
    expected = draw(5, prepared, data_paths=local[:1], contrastive_paths=local[1:])
    proxy = FaultyProxy(server.port, rates=dict.fromkeys(FAULTS, 0.05), seed=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    objects._store.cache_clear()
    remote = {"data_paths": [f"{url}/{names[0]}"], "contrastive_paths": [f"{url}/{names[1]}"]}
    found = draw(5, prepared, flags=flags(tmp_path, image_folder=f"{url}/images"), **remote)
    assert_same_steps(expected, found)
    assert not any(step.bad_samples for step in found)
    before, bytes_before = proxy.counts["requests"], proxy.counts["bytes"]
    assert_same_steps(expected, draw(5, prepared, flags=flags(tmp_path, image_folder=f"{url}/images"), **remote))
    again = proxy.counts["requests"] - before
    assert proxy.counts["bytes"] - bytes_before < bytes_before / 2, "what is there still is not sent again"
    assert again < before / 2 if form == "prepared" else again > 0, "raw names are asked for again, shards are not"
    proxy.stop()


def test_a_missing_image_costs_its_sample_alone(server, prepared, tmp_path) -> None:
    """As in a folder, under the URL's name; what leaves the folder is not asked for."""
    url = server.upload(prepared / "images", "some")
    server.client.delete_object(Bucket=BUCKET, Key="some/train/3.jpg")
    store = ImageStore(url, NodeCache(str(tmp_path)))
    assert store.fetch("train/2.jpg", None) == (prepared / "images/train/2.jpg").read_bytes()
    with pytest.raises(UnusableImage, match="no such object in the image folder s3://bucket/some"):
        store.fetch("train/3.jpg", None)
    for name in ("a\nb.jpg", "a\x7f.jpg", "half \ud83d.jpg", "ü" * 600):  # an answer 400 is no outage
        with pytest.raises(UnusableImage, match="is no object's name"):
            store.fetch(name, None)
    for name in ("../data/images/train/2.jpg", "/etc/passwd", "a/../../b"):
        with pytest.raises(UnusableImage, match="leaves the image folder"):
            store.fetch(name, None)
    (bad,) = [
        bad
        for step in draw(4, prepared, flags=flags(tmp_path, image_folder=url), contrastive_paths=[], shuffle=False)
        for bad in step.bad_samples
    ]
    assert bad.sample_id == 3 and bad.source == "s3://bucket/some/train/3.jpg"


def test_a_replaced_image_is_read_anew(server, prepared, tmp_path, capfd) -> None:
    """A folder is read anew each time too: the cache asks whether it still has the newest. It says once where it is."""
    server.put("other/a.jpg", b"one")
    store = ImageStore("s3://bucket/other", NodeCache(str(tmp_path), 10**9))
    assert [store.fetch("a.jpg", None) for _ in range(2)] == [b"one"] * 2
    server.put("other/a.jpg", b"two")
    assert store.fetch("a.jpg", None) == b"two"
    said = "".join(capfd.readouterr())
    assert said.count(f"are kept in {tmp_path}") == 1 and "1 GB a node at most" in said


def test_a_replaced_shard_or_manifest_is_said(server, prepared, tmp_path) -> None:
    """A shard that is not the one that the manifest was made with must not give pixels, out of the cache neither."""
    url = server.upload(prepared / "train-prepared", "moved")
    manifest = Manifest.read([url], version="v1", cache_dir=str(tmp_path))
    stored = next(sample.stored[0] for sample in manifest if sample.images)
    store = ImageStore(".", NodeCache(str(tmp_path / "other")))
    data = store.fetch("", stored)
    key = stored.path.removeprefix(f"s3://{BUCKET}/")
    server.put(key, random.Random(0).randbytes(10_000))
    assert store.fetch("", stored) == data, "it was read and checked before"
    fresh = ImageStore(".", NodeCache(str(tmp_path / "third")))
    with pytest.raises(UnusableImage, match="its checksum differs"):
        fresh.fetch("", stored)
    for size in (stored.offset + 1, 10):
        server.put(key, bytes(size))
        with pytest.raises(UnusableImage, match="are not in the shard: it is cut off"):
            fresh.fetch("", stored)
    server.client.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(UnusableImage, match="the shard is not there any more"):
        fresh.fetch("", stored)
    with pytest.raises(ValueError, match=r"s3://bucket/moved/manifest.arrow: 1 of its 3 shards are missing, first"):
        Manifest.read([url], version="v1", cache_dir=str(tmp_path))
    server.put(key, b"")
    server.put("moved/manifest.arrow", (prepared / "contrastive-prepared/manifest.arrow").read_bytes())
    assert len(Manifest.read([url], version="v1", cache_dir=str(tmp_path))) == 4
    copies = [path.name for path in tmp_path.rglob("whole/*")]
    assert len(copies) == 1, "the earlier state's copy is gone"


def test_a_store_that_stays_away_ends_the_run_and_drops_no_sample(server, prepared, url, tmp_path, monkeypatch) -> None:
    """Catches outages that are counted as bad samples, of which a run may lose some unseen."""
    server_url = f"{url}/train-prepared"
    monkeypatch.setattr(objects, "RETRY_SECONDS", 0)
    proxy = FaultyProxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    objects._store.cache_clear()
    manifest = Manifest.read([server_url], version="v1", cache_dir=str(tmp_path))
    proxy.rates["throttled"] = 1.0
    with pytest.raises(StoreError, match="503"):
        draw(
            2,
            prepared,
            data_paths=[str(prepared / "train.json")],
            flags=flags(tmp_path, image_folder=url, max_bad_fraction=1.0),
        )
    with pytest.raises(StoreError, match="503"):
        ImageStore(".", NodeCache(str(tmp_path / "c"))).fetch("", manifest[0].stored[0])
    proxy.stop()


def test_an_image_folder_one_level_off_is_said_before_the_run(server, prepared, url) -> None:
    manifest = Manifest.read([str(prepared / "train.json")], version="v1")
    refuse_where_no_image_is(manifest, f"{url}/images")
    with pytest.raises(ValueError, match=r"--image-folder s3://bucket/data: none of \d+ images .* such as train/0.jpg"):
        refuse_where_no_image_is(manifest, url)


def test_broken_json_is_named_by_its_url(server, tmp_path) -> None:
    """Not by the copy's path, which nobody knows."""
    server.put("broken.json", b'[{"id": 1,]')
    with pytest.raises(ValueError, match=r"^s3://bucket/broken.json: broken JSON in line 1"):
        Manifest.read(["s3://bucket/broken.json"], version="v1", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"^s3://bucket/none/manifest.arrow: no such object; expected LLaVA JSON"):
        Manifest.read(["s3://bucket/none"], version="v1", cache_dir=str(tmp_path))


def test_a_large_manifest_is_copied_piece_by_piece(server, tmp_path, monkeypatch) -> None:
    """Catches pieces in the wrong place, and such that the disk took half of."""
    data = np.random.default_rng(0).bytes(100_003)
    server.put("big.arrow", data)
    monkeypatch.setattr("hacl_megatron.data.node_cache._PIECE", 1000)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, bytes(data)[:700], at))  # as a full disk does
    copy = NodeCache(str(tmp_path)).whole("s3://bucket/big.arrow")
    assert Path(copy).read_bytes() == data
    assert NodeCache(str(tmp_path)).whole("s3://bucket/big.arrow") == copy


def test_an_object_that_is_replaced_while_it_is_copied_is_not_kept(server, tmp_path, monkeypatch) -> None:
    """Also where a store's tags are weak, by which no piece can be asked for: catches a copy of two versions."""
    server.put("moving.arrow", bytes(3000))
    monkeypatch.setattr("hacl_megatron.data.node_cache._PIECE", 1000)
    state = objects._state
    weak = lambda meta: replace(state(meta), version=f"W/{meta['e_tag']}")  # noqa: E731
    monkeypatch.setattr(objects, "_state", weak)

    def replacing(url: str, start: int, *given, **more) -> bytes:
        if start == 1000:
            server.put("moving.arrow", b"1" * 3000)
        return read_range(url, start, *given, **more)

    monkeypatch.setattr("hacl_megatron.data.node_cache.read_range", replacing)
    with pytest.raises(StoreError, match=r"moving\.arrow: changed while it was read"):
        NodeCache(str(tmp_path)).whole("s3://bucket/moving.arrow", threads=1)
    assert not [*tmp_path.rglob("whole/*")]


def test_a_damaged_copy_of_json_is_copied_anew(server, tmp_path, capfd) -> None:
    """One of the object's size too, which is still JSON: catches another caption trained on, and a copy that is refused
    at every start until someone removes it."""
    record = {"id": "1", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a cat"}]}
    server.put("few.json", whole := json.dumps([record]).encode())
    copy = Path(NodeCache(str(tmp_path)).whole("s3://bucket/few.json"))
    assert copy.read_bytes() == whole and not "".join(capfd.readouterr())
    cut = f"has {len(whole) - 9} of {len(whole)} bytes"
    for damaged, fault in ((whole.replace(b"cat", b"cow"), "is damaged"), (whole[:-9], cut)):
        copy.write_bytes(damaged)
        manifest = Manifest.read(["s3://bucket/few.json"], version="v1", cache_dir=str(tmp_path))
        assert manifest[0].conversations[1][1] == "a cat" and copy.read_bytes() == whole
        said = "".join(capfd.readouterr())
        assert fault in said and "copied anew" in said
        assert NodeCache(str(tmp_path)).whole("s3://bucket/few.json") == str(copy) and not "".join(capfd.readouterr())
    (sums,) = tmp_path.rglob("sums/*")
    sums.write_bytes(b"\xff" * 16)
    assert NodeCache(str(tmp_path)).whole("s3://bucket/few.json") == str(copy)
    assert "copied anew" in "".join(capfd.readouterr()) and sums.read_bytes().isascii()
    server.put("few.json", whole.replace(b"cat", b"dog"))
    NodeCache(str(tmp_path)).whole("s3://bucket/few.json")
    assert len([*tmp_path.rglob("whole/*")]) == len([*tmp_path.rglob("sums/*")]) == 1


def test_a_damaged_copy_of_a_manifest_is_copied_anew(server, prepared, url, tmp_path, capfd) -> None:
    """It has the object's size: catches one that is refused at every start until someone removes it."""
    expected = len(Manifest.read([f"{url}/train-prepared"], version="v1", cache_dir=str(tmp_path)))
    (copy,) = tmp_path.rglob("whole/*")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-300] + bytes(100) + whole[-200:])
    assert len(Manifest.read([f"{url}/train-prepared"], version="v1", cache_dir=str(tmp_path))) == expected
    assert copy.read_bytes() == whole and "copied anew" in "".join(capfd.readouterr())
    server.put("bad/manifest.arrow", whole[:-300] + bytes(100) + whole[-200:])
    with pytest.raises(ValueError, match=r"s3://bucket/bad/manifest.arrow"):
        Manifest.read(["s3://bucket/bad"], version="v1", cache_dir=str(tmp_path))
