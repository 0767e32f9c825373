"""The cache of a node: shared, bounded, and never trusted blindly."""

import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hacl_megatron.data.node_cache import NodeCache

FORK = multiprocessing.get_context("fork")  # at once; nothing of torch is used
DATA = {f"key {index}": random.Random(index).randbytes(900 + index % 200) for index in range(600)}


def reader(cache: NodeCache):
    """Reads keys of DATA, which do not change."""
    return lambda key: cache.read(key, lambda _: (DATA[key], ""), fixed=True)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_fetched_once_is_there_for_every_cache_of_the_folder(tmp_path) -> None:
    """Catches keys that meet, and bytes that are not those that were fetched."""
    assert all(reader(NodeCache(str(tmp_path), 10**8))(key) == data for key, data in DATA.items())
    other = NodeCache(str(tmp_path), 10**8)
    assert all(other.read(key, lambda _: pytest.fail("was there"), fixed=True) == data for key, data in DATA.items())
    assert other.hits == len(DATA) and other.fetches == 0


def test_threads_and_caches_that_want_the_same_fetch_it_once(tmp_path) -> None:
    """Tensor ranks read the same images at the same time: without a lock each would fetch them."""
    fetched: list[str] = []

    def read(number: int) -> bytes:
        cache, key = caches[number % 2], f"key {number // 8}"

        def fetch(_: str | None) -> tuple[bytes, str]:
            fetched.append(key)
            time.sleep(0.01)
            return DATA[key], ""

        assert cache.read(key, fetch, fixed=True) == DATA[key]

    caches = [NodeCache(str(tmp_path), 10**8) for _ in range(2)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(read, range(160)))
    assert sorted(fetched) == sorted({*fetched}) and len(fetched) == 20
    assert not [*(tmp_path / caches[0].folder / "part").iterdir()]


def _fetch_slowly(folder: str, log: str) -> None:
    for key in list(DATA)[:12]:

        def fetch(_: str | None, key: str = key) -> tuple[bytes, str]:
            with open(log, "a") as file:
                file.write(f"{key}\n")
            time.sleep(0.05)
            return DATA[key], ""

        assert NodeCache(folder, 10**8).read(key, fetch, fixed=True) == DATA[key]


def test_ranks_of_a_node_fetch_it_once(tmp_path) -> None:
    """The lock holds between processes, not only between threads of one."""
    ranks = [FORK.Process(target=_fetch_slowly, args=(str(tmp_path / "cache"), str(tmp_path / "log"))) for _ in "ab"]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(list(DATA)[:12])


def test_the_bound_holds_and_epochs_find_what_the_first_one_kept(tmp_path) -> None:
    """A cache of half the data that evicts what was read longest ago has no hit in an epoch of the same order."""
    size = sum(map(len, DATA.values()))
    cache = NodeCache(str(tmp_path), size // 2)
    for _ in range(3):
        before = cache.hits
        assert all(reader(cache)(key) == data for key, data in DATA.items())
        assert bytes_in(tmp_path) <= size // 2
    assert cache.hits - before > len(DATA) * 0.2, cache.hits - before
    assert bytes_in(tmp_path) > size * 0.2


def test_caches_of_several_processes_keep_one_bound(tmp_path) -> None:
    """Each sees the files of the others only now and then."""
    size = sum(map(len, DATA.values()))
    caches = [NodeCache(str(tmp_path), size // 2) for _ in range(8)]
    for number, key in enumerate(DATA):
        reader(caches[number % 8])(key)
    assert bytes_in(tmp_path) <= size // 2


def test_what_nobody_has_read_for_a_day_makes_room(tmp_path) -> None:
    """Else the data of a run of last month would fill the cache for ever."""
    size = sum(map(len, DATA.values()))
    for key in list(DATA):
        reader(NodeCache(str(tmp_path), size // 2))(key)
    old = time.time() - 2 * 24 * 3600
    for path in tmp_path.rglob("kept/*/*"):
        os.utime(path, (old, old))
    cache = NodeCache(str(tmp_path), size // 2)
    for index in range(100):
        cache.read(f"new {index}", lambda _: (b"new" * 300, ""), fixed=True)
    assert sum(path.stat().st_size < 920 for path in tmp_path.rglob("kept/*/*")) > 80


def test_a_newer_version_takes_the_place_of_what_is_there(tmp_path) -> None:
    """A replaced image must not be trained on as it was."""
    cache, newest = NodeCache(str(tmp_path), 10**8), ["1", b"one"]

    def fetch(version: str | None) -> tuple[bytes, str] | None:
        return None if version == newest[0] else (newest[1], newest[0])

    assert [cache.read("key", fetch, fixed=False) for _ in range(2)] == [b"one", b"one"]
    assert (cache.hits, cache.fetches) == (1, 1)
    newest[:] = ["2", b"two"]
    assert [cache.read("key", fetch, fixed=False) for _ in range(2)] == [b"two", b"two"]
    assert (cache.hits, cache.fetches) == (2, 2)


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"?", lambda data: data[:20], lambda data: b""])
def test_damaged_files_are_fetched_again(tmp_path, damage) -> None:
    cache = NodeCache(str(tmp_path), 10**8)
    reader(cache)("key 1")
    (path,) = tmp_path.rglob("kept/*/*")
    path.write_bytes(damage(path.read_bytes()))
    assert [reader(cache)("key 1") for _ in range(2)] == [DATA["key 1"]] * 2
    assert cache.fetches == 2 and cache.hits == 1


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path) -> None:
    cache = NodeCache(str(tmp_path), 10**8)
    reader(cache)("key 1")
    (path,) = tmp_path.rglob("kept/*/*")
    path.rename(Path(cache.folder) / "part" / path.name)
    assert [reader(cache)("key 1") for _ in range(2)] == [DATA["key 1"]] * 2 and cache.hits == 1


def test_a_fetch_that_fails_leaves_nothing_and_holds_nobody(tmp_path) -> None:
    cache = NodeCache(str(tmp_path), 10**8)

    def fails(_: str | None) -> tuple[bytes, str]:
        raise ValueError("away")

    with pytest.raises(ValueError, match="away"):
        cache.read("key 1", fails, fixed=True)
    done = threading.Event()
    threading.Thread(target=lambda: (reader(cache)("key 1"), done.set()), daemon=True).start()
    assert done.wait(10)


@pytest.mark.parametrize("fault", ["open to others", "a link", "a file"])
def test_a_folder_that_others_may_enter_is_not_used_which_is_said(tmp_path, capsys, fault) -> None:
    """Whoever may write there would choose what is trained on."""
    cache = NodeCache(str(tmp_path), 10**8)
    folder, elsewhere = Path(cache.folder), tmp_path / "elsewhere"
    elsewhere.mkdir()
    if fault == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "a link":
        folder.symlink_to(elsewhere)
    else:
        folder.write_text("")
    assert [reader(cache)(key) for key in ("key 1", "key 1")] == [DATA["key 1"]] * 2
    assert cache.hits == 0 and not [*elsewhere.iterdir()]
    assert capsys.readouterr().out.count("images are not kept") == 1


def test_without_a_bound_nothing_is_written(tmp_path) -> None:
    """`--data-cache-gb 0`."""
    cache = NodeCache(str(tmp_path), 0)
    assert reader(cache)("key 1") == DATA["key 1"] and not [*tmp_path.iterdir()]
