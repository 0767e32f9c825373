"""A cache that another user made ready in a folder of the data: root trained on whatever it held."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import cache
from hacl_megatron.data.prepare.cache import CACHE_FOLDER
from tests.data.test_manifest import record, write

STRANGER = 12345

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path) -> str:
    """A JSON file of one record, and beside it a cache that says something else."""
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data", [record(id="true")])
    assert names(path) == ["true"]
    (ready,) = (tmp_path / "data" / CACHE_FOLDER).glob("*.arrow")
    other = write(tmp_path, [record(id="false")])
    cache._build(other, str(tmp_path / "false.arrow"))
    os.replace(tmp_path / "false.arrow", ready)
    assert names(path) == ["false"], "it is not used at all: the tests below would see nothing"
    return path


def names(path: str) -> list[str]:
    return [sample.name for sample in Manifest.read([path], version="v1")]


def ready_file(data: str) -> Path:
    (ready,) = (Path(data).parent / CACHE_FOLDER).glob("*.arrow")
    return ready


def owned_by_a_stranger(ready: Path) -> None:
    os.chown(ready, STRANGER, -1)


def writable_by_all(ready: Path) -> None:
    ready.chmod(0o666)


def a_link_to_theirs(ready: Path) -> None:
    os.replace(ready, ready.parent.parent / "theirs.arrow")
    ready.symlink_to(ready.parent.parent / "theirs.arrow")


def a_pipe(ready: Path) -> None:
    ready.unlink()
    os.mkfifo(ready)


@pytest.mark.parametrize("change", [owned_by_a_stranger, writable_by_all, a_link_to_theirs, a_pipe])
def test_it_is_not_used_and_that_is_said(data, change: Callable[[Path], None], capfd):
    change(ready_file(data))
    assert names(data) == ["true"]
    said = capfd.readouterr().out.splitlines()
    assert said and all(str(ready_file(data)) in line and "prepared anew" in line for line in said)


def test_in_a_strangers_folder_none_is_kept(data, home, capfd):
    """Who owns the folder could change what is written into it, while it is written."""
    for place in (ready_file(data), ready_file(data).parent):
        os.chown(place, STRANGER, -1)
    before = sorted(os.listdir(ready_file(data).parent))
    assert names(data) == ["true"]
    assert sorted(os.listdir(ready_file(data).parent)) == before
    assert len(list((home / ".cache" / "hacl_megatron").glob("*.arrow"))) == 1
    assert f"belongs to another user (uid {STRANGER}): no cache is kept in" in capfd.readouterr().out


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_in_a_folder_that_all_may_write_one_is_kept_where_names_are_their_owners(tmp_path, home, mode):
    """Without the sticky bit anyone may put another folder in the cache's place, as one can in a `chmod 777` folder."""
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", mode)
    assert names(write(tmp_path / "open", [record(id="a")])) == ["a"]
    assert (tmp_path / "open" / CACHE_FOLDER).exists() == (mode == 0o1777) or not any(
        (tmp_path / "open" / CACHE_FOLDER).glob("*.arrow")
    )
    assert any((home / ".cache").rglob("*.arrow")) == (mode == 0o777)


def _read_as(user: int, data: str, queue) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    queue.put(names(data))


@pytest.mark.parametrize("owner", ["root", "the data's", "a stranger"])
def test_root_and_the_owner_of_the_data_are_trusted(data, owner, tmp_path):
    """A cache made once for all users of shared data goes on being used; a third user's does not."""
    user, stranger = 20001, 20002
    os.chown(data, user + 7, -1)
    os.chown(ready_file(data), {"root": 0, "the data's": user + 7, "a stranger": stranger}[owner], -1)
    modes = {place: os.stat(place).st_mode for place in (tmp_path, *tmp_path.parents[:-2])}
    for place, mode in modes.items():
        os.chmod(place, mode | 0o055)
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", user, -1)
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_read_as, args=(user, data, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join()
    for place, mode in modes.items():
        os.chmod(place, mode)
    assert found == (["true"] if owner == "a stranger" else ["false"])
