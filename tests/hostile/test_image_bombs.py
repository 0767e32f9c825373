"""Small files that unfold to gigabytes, and names that never end: refused or decoded, in little memory and time."""

import os

import pytest

from hacl_megatron.data.images import dali_is_installed
from hacl_megatron.data.store import MAX_IMAGE_BYTES, FolderStore, ShardReader, StoredImage, UnusableImage
from tests.data.drawn_images import decoder
from tests.measure.fuzz_images import BYTES, SECONDS, Worker, bombs, jpeg2000_of_tiles, saved, solid_webp

REFUSED = {"webp beyond the bound", "moving webp far beyond the bound", "gif beyond the bound"}
DECODED = {"webp at the bound", "png at the bound, 1 bit"}


@pytest.mark.timeout(300)
def test_bombs_cost_no_memory(tmp_path):
    """Catches the bound of 179 million pixels, by which a WebP of 28 bytes took 3.6 GB; and pictures above any bound
    that are unfolded before their size is looked at. In a process of its own, by DALI, Pillow and `--verify-images`."""
    assert len(solid_webp(16383, 16383)) == 28
    worker = Worker(tmp_path, ["dali", "pillow"][not dali_is_installed() :])
    for name, data in bombs(only=REFUSED | DECODED):
        (tmp_path / "bomb").write_bytes(data)
        found = worker.open("bomb", seconds=120)
        assert isinstance(found, dict), f"{name}: {found}"
        # A picture at the bound takes 1.75 GB here, and one copy of it more where threads fall otherwise.
        assert found["peak"] < (BYTES * 1.25 if name in DECODED else BYTES / 2), (name, found)
        for way, (reason, seconds) in found["answers"].items():
            assert seconds < SECONDS, (name, way)
            assert (reason is None) == (name in DECODED), (name, way, reason)
            assert reason is None or ("--max-image-pixels" in reason and "\n" not in reason)
    worker.close()


def test_a_jpeg_2000_of_thousands_of_tiles_is_refused():
    """A picture of 250 x 250 tiles of one pixel took 2.3 GB; one of sixteen tiles is as good as any."""
    item = decoder("pillow")
    bomb, few = jpeg2000_of_tiles(250), saved("RGB", (64, 64), "JPEG2000", tile_size=(16, 16))
    assert item.decode([bomb, few]).reasons == ["a JPEG 2000 of 62500 tiles; expected at most 4096", None]
    item.close()


def test_a_file_larger_than_any_image_is_refused_unread(tmp_path):
    """A sparse file of 40 GB, which takes no room on the disk, took as much memory."""
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(40 << 30)
    with pytest.raises(UnusableImage, match=f"bytes are more than an image file may have, {MAX_IMAGE_BYTES:,}"):
        FolderStore(tmp_path).read("huge.jpg")
    with pytest.raises(UnusableImage, match="bytes are more than an image file may have"):
        ShardReader().read(StoredImage(path=str(tmp_path / "huge.jpg"), offset=0, size=39 << 30))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    """A pipe whose other end nobody opens, a device that never ends, a socket's place, each by a link too."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", "link.jpg"):
        with pytest.raises(UnusableImage, match="not a regular file"):
            FolderStore(tmp_path).read(name)
    with pytest.raises(UnusableImage, match="not a regular file"):
        FolderStore("/dev").read("zero")
