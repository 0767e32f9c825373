"""Bytes that changed on a disk or in a copy: refused in one line, or one bad sample; never another record."""

import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import parts, sealed_arrow
from hacl_megatron.data.prepare.arrow_manifest import SCHEMA
from hacl_megatron.data.store import ImageStore, UnusableImage
from tests.hostile.prepared import prepare


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def out(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def read(out: Path) -> list:
    return list(Manifest.read([str(out)], version="v1"))


def test_a_changed_bit_anywhere_in_a_manifest_is_refused_in_one_line(out):
    """Without a checksum over every byte half of them went unseen and one in 25 ended the process."""
    path, rng = out / "manifest.arrow", random.Random(0)
    data = path.read_bytes()
    places = [*range(64), *range(len(data) - 64, len(data)), *(rng.randrange(len(data)) for _ in range(250))]
    mark = data.index(sealed_arrow._MARK)
    places += range(mark, mark + len(sealed_arrow._MARK) + 16)  # the checksum itself
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.arrow: .*; prepare the data again") as caught:
            read(out)
        assert "\n" not in str(caught.value), place


@pytest.mark.parametrize("keep", [0, 3, 15, 16, 100, 0.5, -1])
def test_a_manifest_that_is_cut_off_is_refused(out, keep):
    path = out / "manifest.arrow"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"manifest\.arrow: .*; prepare the data again"):
        read(out)


def test_a_manifest_without_checksum_is_not_looked_at(out):
    """One of an earlier version, or rewritten elsewhere: nothing vouches for the offsets in it."""
    path = out / "manifest.arrow"
    table = pa.ipc.open_file(str(path)).read_all()
    with pa.ipc.new_file(str(path), table.schema.with_metadata({b"hacl_megatron": b"{}"})) as writer:
        writer.write_table(table.replace_schema_metadata({b"hacl_megatron": b"{}"}))
    with pytest.raises(ValueError, match=r"has no checksum: of an earlier version, damaged, .*prepare the data again"):
        read(out)


def test_a_large_manifest_is_read_in_pieces(tmp_path):
    """Whatever it says of its schema's length: its checksum must not take as much memory as the file."""
    path = tmp_path / "manifest.arrow"
    with open(path, "wb") as file:
        schema = sealed_arrow._MARK + b"0" * 16
        file.write(b"ARROW1\0\0\xff\xff\xff\xff" + len(schema).to_bytes(4, "little") + schema)
        file.seek(64 << 20)
        file.write(b"ARROW1")
    tracemalloc.start()
    with open(path, "rb+") as file:
        sealed_arrow.seal(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, peak


def test_texts_that_leave_the_file_are_refused_where_the_checksum_is_made_to_hold(out):
    """A stranger makes the checksum of what he writes: the offsets of texts led out of the process's memory."""
    path = out / "manifest.arrow"
    data = path.read_bytes()
    ids = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0).column("id")
    offsets = np.frombuffer(ids.buffers()[1], np.int32)[: len(ids) + 1]
    wild = np.arange(len(offsets), dtype=np.int32) << 26
    assert data.count(offsets.tobytes()) == 1
    path.write_bytes(data.replace(offsets.tobytes(), wild.tobytes()))
    with open(path, "rb+") as file:
        sealed_arrow.seal(file)
    with pytest.raises(ValueError, match=r"manifest\.arrow: .*; prepare the data again"):
        read(out)


def test_a_record_of_a_file_or_shard_that_is_not_there_is_refused(out):
    path = str(out / "manifest.arrow")
    reader = sealed_arrow.open_sealed(path)
    batch = reader.get_batch(0)
    for name in ("file", "shard"):
        place = SCHEMA.names.index(name)
        changed = batch.set_column(place, SCHEMA.field(place), pa.array([7] * batch.num_rows, pa.int32()))
        sealed_arrow.write_sealed(path, reader.schema, [changed])
        with pytest.raises(ValueError, match=f"column '{name}' does not count 1.*; prepare the data again"):
            read(out)


def test_a_changed_byte_of_a_shards_image_is_that_sample_alone(out):
    """It may decode to another picture: only a checksum of the image's bytes tells. The rest of a shard is not read."""
    shard, rng = out / "shards" / "images-000000.tar", random.Random(1)
    data, samples = shard.read_bytes(), read(out)
    images = [(place.offset, place.offset + place.size) for sample in samples for place in sample.stored]
    store = ImageStore(out)
    hit = [begin + rng.randrange(end - begin) for begin, end in images[:6]]
    harmless = [place for place in (rng.randrange(len(data)) for _ in range(60))
                if not any(begin <= place < end for begin, end in images)]  # fmt: skip
    assert len(harmless) > 10
    for place in [*hit, *harmless]:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        with open(shard, "rb+") as file:  # the same file: the store keeps it open
            file.write(changed)
        for sample, (begin, end) in zip(samples, images, strict=True):
            if begin <= place < end:
                with pytest.raises(UnusableImage, match=r"is damaged in the shard: .*prepare again"):
                    store.fetch(sample.images[0], sample.stored[0])
            else:
                assert store.fetch(sample.images[0], sample.stored[0]) == data[begin:end]
    store.close()


def test_a_damaged_part_of_a_killed_start_is_made_again(tmp_path):
    """A power cut leaves parts of zeros, a bad disk other records: both went into the manifest."""
    records = tmp_path / "a.json"
    records.write_text('[{"id": "1", "conversations": []}, {"id": "22", "conversations": []}]')
    options = {"deduplicate": False, "num_workers": 1}
    (part,), _ = parts.build_parts([str(records)], str(tmp_path / "work"), **options)
    data = Path(part).read_bytes()
    place = data.index(b"122")
    Path(part).write_bytes(data[:place] + b"9" + data[place + 1 :])
    (again,), _ = parts.build_parts([str(records)], str(tmp_path / "work"), **options)
    assert again == part and parts.read_part(part).column("id").to_pylist() == ["1", "22"]
