"""Records that name very many images, or others than a record may, and manifests that nobody's tool wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare.arrow_manifest import SCHEMA
from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.data.prepare.sealed_arrow import open_sealed, write_sealed
from hacl_megatron.data.store import ImageStore, UnusableImage
from tests.data.drawn_images import jpeg

MANY = 10_000


def record(*images: str, **keys: Any) -> dict[str, Any]:
    said = "<image>\n" * len(images)
    turns = [{"from": "human", "value": said + "Which?"}, {"from": "gpt", "value": "1"}]
    return {"id": str(len(images)), "image": [*images], "conversations": turns, **keys}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder prepared with shards."""
    tmp_path = tmp_path_factory.mktemp("several")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(8, 8))
    records = [
        record("1.jpg", "1.jpg", text=["a", "b"]), record("1.jpg"), record("1.jpg", "../secret.jpg", "1.jpg"),
        record(*[f"{number}.jpg" for number in range(MANY)], text=["x"] * MANY),
    ]  # fmt: skip
    (tmp_path / "secret.jpg").write_bytes(jpeg(8, 8))
    (tmp_path / "a.json").write_text(json.dumps(records))
    run_prepare(
        PrepareSettings(
            inputs=[str(tmp_path / "a.json")], output=str(tmp_path / "out"), image_folder=str(tmp_path / "images"),
            write_shards=True, progress_bar=False,
        )
    )  # fmt: skip
    return tmp_path / "out"


def test_ten_thousand_images_are_a_record_and_a_name_that_leaves_the_folder_is_read_by_nobody(whole):
    store = ImageStore(whole.parent / "images")
    for path in (whole, whole.parent / "a.json"):
        samples = list(Manifest.read([str(path)], version="v1"))
        assert [len(sample.images) for sample in samples] == [2, 1, 3, MANY]
        assert len(samples[3].pairs) == MANY and samples[3].images[-1] == f"{MANY - 1}.jpg"
        with pytest.raises(UnusableImage, match="leaves the image folder"):
            store.fetch(samples[2].images[1], samples[2].stored[1])
        assert store.fetch(samples[2].images[2], samples[2].stored[2]).startswith(b"\xff\xd8")
    faults = (whole / "bad_images.jsonl").read_text().splitlines()
    assert len(faults) == MANY and "leaves the image folder" in faults[0] and '"samples": ["3"]' in faults[0]
    store.close()


CHANGES = {
    "a shard that it does not name": ("more_images", {"shard": 7}, "shards that it does not name"),
    "an image without a name": ("more_images", {"image": None}, "record 0 is none that"),
    "a caption of a third image": ("pairs", {"image": 2}, "record 0 is none that"),
    "a caption of no image": ("pairs", {"image": None}, "record 0 is none that"),
    "a caption that is none": ("pairs", {"caption": None}, "record 0 is none that"),
    "twins that are no list": ("pairs", {"hallucinated": None}, "record 0 is none that"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_of_which_only_the_checksum_holds_is_refused_in_one_line(whole, tmp_path, change):
    """Whoever makes a file makes its checksum too; an image's caption would be another's, or a traceback."""
    column, changes, said = CHANGES[change]
    out = shutil.copytree(whole, tmp_path / "out")
    path = str(out / "manifest.arrow")
    reader = open_sealed(path)
    batch = reader.get_batch(0)
    rows = batch.column(column).to_pylist()
    rows[0][0] |= changes
    place = SCHEMA.names.index(column)
    batch = batch.set_column(place, SCHEMA.field(place), pa.array(rows, SCHEMA.field(place).type))
    write_sealed(path, reader.schema, [batch])
    with pytest.raises(ValueError, match=rf"manifest\.arrow: .*{said}.*prepare the data again") as caught:
        list(Manifest.read([str(out)], version="v1"))
    assert "\n" not in str(caught.value)
