"""On disk before a name says so: files are synced, then the list of them, then the folder; nothing stays open."""

import os
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.run import publish
from hacl_megatron.checkpoint.run.folder import write_atomically
from hacl_megatron.checkpoint.run.integrity import read_files, sync_folder, write_files
from hacl_megatron.checkpoint.run.part_files import Part, serialized, write_parts


@pytest.fixture()
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(name, whether the latest file is there) of each file and folder, as it really is synced. No file is empty."""
    found: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append((path.name, (path / "latest_checkpointed_iteration.txt").exists()))
        torchs_own = path.name == ".metadata.tmp"  # synced too early, before `write_files` does it again
        assert os.fstat(descriptor).st_size or path.is_dir() or torchs_own, f"{path}: what was written is not in it yet"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def names(synced: list[tuple[str, bool]]) -> list[str]:
    return [name for name, _ in synced]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_listed_files_are_synced_before_the_list_and_this_before_its_name(tmp_path: Path, synced) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name * 2)
    before = open_files()
    write_files(tmp_path, ["one", "two"], parts=[1])
    assert names(synced) == ["one", "two", "files.json.tmp", tmp_path.name]
    found = read_files(tmp_path)
    assert (found["files"], found["parts"]) == ({"one": 6, "two": 6}, [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files.json", "one", "two"]
    assert open_files() == before


def test_a_folder_that_cannot_be_synced_is_closed_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError("a network file system")

    before = open_files()
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    assert open_files() == before


def test_parts_and_texts_are_on_disk_when_they_are_there(tmp_path: Path, synced) -> None:
    before = open_files()
    write_parts(tmp_path, [Part(key="object", values=serialized([1]))], 3)
    write_atomically(tmp_path / "text", "words")
    assert names(synced) == ["__3_0.distcp", "text.tmp"]
    assert (tmp_path / "text").read_text() == "words" and not (tmp_path / "text.tmp").exists()
    assert open_files() == before


def test_a_checkpoint_is_on_disk_before_it_is_the_latest(tmp_path: Path, synced) -> None:
    """Catches a name that may be lost, while the latest file that holds it is not."""
    publish.begin(tmp_path, 7)
    stored = write_parts(publish.partial_folder(tmp_path, 7), [Part(key="object", values=serialized([1]))], 0)
    publish.publish(
        tmp_path, 7, stored, common=serialized({}), run_config="a: 1",
        write_assets=lambda folder: (folder.mkdir(), (folder / "tokenizer.json").write_text("{}")),
    )  # fmt: skip
    listed = ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "tokenizer.json"]
    assert {*listed, "run_config.yaml.tmp", "files.json.tmp"} <= {*names(synced)}
    assert names(synced).index("files.json.tmp") > max(names(synced).index(name) for name in listed)
    assert synced[-2] == (tmp_path.name, False) and names(synced)[-1] == "latest_checkpointed_iteration.txt.tmp"
    assert [*read_files(tmp_path / "iter_0000007")["files"]].count("hf_assets/tokenizer.json") == 1
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7\n"
