import os

import pytest

from hacl_megatron.data.store import FolderStore, UnusableImage, image_key


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "train2014").mkdir(parents=True)
    (root / "train2014" / "COCO_1.jpg").write_bytes(b"one")
    (root / "empty.jpg").write_bytes(b"")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    return root


def test_reads_files_in_sub_folders_by_the_names_of_llava_json(folder):
    store = FolderStore(folder)
    assert store.read("train2014/COCO_1.jpg") == b"one"
    assert store.read("./train2014//COCO_1.jpg") == b"one"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jpg", "no such file"),
        ("train2014", "is a folder"),
        ("", "is a folder"),
        ("empty.jpg", "empty"),
        ("train2014/COCO_1.jpg/x.jpg", "cannot be read"),
        ("nul\0byte.jpg", "no file name"),
        ("x" * 5000, "name"),
    ],
)
def test_unreadable_files_have_a_reason_of_one_line(folder, name, reason):
    with pytest.raises(UnusableImage, match=reason) as error:
        FolderStore(folder).read(name)
    assert "\n" not in str(error.value)


def test_what_resolves_inside_the_folder_is_read_however_it_is_named(folder, tmp_path):
    """LLaVA's own lists have absolute names; a script that joins paths leaves `..` in them."""
    (tmp_path / "link").symlink_to(folder)
    whole = folder / "train2014" / "COCO_1.jpg"
    linked = tmp_path / "link" / "train2014" / "COCO_1.jpg"
    relative = ["train2014/../train2014/COCO_1.jpg", "../images/train2014/COCO_1.jpg", "no/../train2014/COCO_1.jpg"]
    for name in (*relative, str(whole), str(linked)):
        assert FolderStore(folder).read(name) == b"one", name
        assert FolderStore(tmp_path / "link").read(name) == b"one", name


def test_a_step_back_through_a_link_is_a_step_back_from_where_it_leads(folder, tmp_path):
    """The kernel's way; taken letter by letter `up/../images/...` would stay inside."""
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "secret.jpg").write_bytes(b"secret")
    (folder / "out").symlink_to(tmp_path / "other" / "deep")
    with pytest.raises(UnusableImage, match="leaves the image folder"):
        FolderStore(folder).read("out/../secret.jpg")


@pytest.mark.parametrize("name", ["../secret.txt", "train2014/../../secret.txt", "../images-2/a.jpg", "/etc/passwd"])
def test_a_name_cannot_leave_the_folder(folder, name):
    with pytest.raises(UnusableImage, match="leaves the image folder"):
        FolderStore(folder).read(name)


def test_links_may_stay_inside_but_not_lead_outside(folder):
    (folder / "inside.jpg").symlink_to(folder / "train2014" / "COCO_1.jpg")
    (folder / "outside.jpg").symlink_to(folder.parent / "secret.txt")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    store = FolderStore(folder)
    assert store.read("inside.jpg") == b"one"
    for name in ("outside.jpg", "up/secret.txt"):
        with pytest.raises(UnusableImage, match="outside the image folder"):
            store.read(name)
    with pytest.raises(UnusableImage):
        store.read("loop.jpg")


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert FolderStore(tmp_path / "link").read("train2014/COCO_1.jpg") == b"one"


def test_a_pipe_is_refused_instead_of_blocking(folder):
    os.mkfifo(folder / "pipe.jpg")
    with pytest.raises(UnusableImage, match="not a regular file"):
        FolderStore(folder).read("pipe.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_has_a_reason(folder):
    (folder / "train2014" / "COCO_1.jpg").chmod(0)
    with pytest.raises(UnusableImage, match="cannot be read: Permission denied"):
        FolderStore(folder).read("train2014/COCO_1.jpg")


def test_a_missing_root_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"--image-folder .*nowhere is not a folder") as error:
        FolderStore(tmp_path / "nowhere")
    assert not isinstance(error.value, UnusableImage)


def test_image_key_is_a_signed_64_bit_hash_of_the_bytes():
    keys = [image_key(bytes([value])) for value in range(200)]
    assert len(set(keys)) == 200
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert any(key < 0 for key in keys) and any(key >= 2**32 for key in keys)
    # From `printf abc | b2sum -l 64`, read as a little-endian signed integer: stable over runs and machines.
    assert image_key(b"abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little", signed=True)
