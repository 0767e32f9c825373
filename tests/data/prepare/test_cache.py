"""Raw JSON is prepared once, by one process, in the first place that can be written, and again when it changes."""

import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import cache
from hacl_megatron.data.prepare.cache import CACHE_FOLDER
from tests.data.test_manifest import record, write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Where files are prepared, in order."""
    found: list[str] = []
    monkeypatch.setattr(cache, "_build", lambda *given, build=cache._build: found.append(given[1]) or build(*given))
    return found


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home and a temporary folder of the test's own."""
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def names(path: str, **options) -> list[str]:
    return [sample.name for sample in Manifest.read([path], version="v1", **options)]


def test_a_file_is_prepared_once_and_again_when_it_changes(tmp_path, builds):
    path = write(tmp_path, [record(id="a")])
    assert names(path) == names(path) == ["a"] and len(builds) == 1
    assert os.path.dirname(builds[0]) == str(tmp_path / CACHE_FOLDER)
    write(tmp_path, [record(id="b")])  # the same size: the time tells
    os.utime(path, ns=(1, 1))
    killed, at_work = (tmp_path / CACHE_FOLDER / f"{os.path.basename(builds[0])}.parts-{n}" for n in "ab")
    killed.mkdir()
    at_work.mkdir()
    os.utime(killed, ns=(1, 1))
    assert names(path) == ["b"] and len(builds) == 2
    # What was prepared from the file's earlier state is gone, and what a killed process left behind.
    left = {name for name in os.listdir(tmp_path / CACHE_FOLDER) if not name.endswith(".lock")}
    assert left == {os.path.basename(builds[1]), at_work.name}
    (tmp_path / "link.json").symlink_to(path)
    assert names(str(tmp_path / "link.json")) == ["b"]


def test_cache_dir_takes_the_place_of_all_others(tmp_path, builds):
    path = write(tmp_path, [record(id="a")])
    assert names(path, cache_dir=str(tmp_path / "deep" / "cache")) == ["a"]
    assert not (tmp_path / CACHE_FOLDER).exists() and (tmp_path / "deep" / "cache").is_dir()


def test_files_of_one_name_do_not_meet(tmp_path, builds):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [record(id=name)])
        os.utime(tmp_path / name / "data.json", ns=(5, 5))
    for _ in range(2):
        for name in ("x", "y"):
            assert names(str(tmp_path / name / "data.json"), cache_dir=str(tmp_path / "c")) == [name]
    assert len(builds) == 2


def test_a_damaged_cache_is_made_again(tmp_path, builds):
    path = write(tmp_path, [record(id="a")])
    names(path)
    with open(builds[0], "r+b") as file:
        file.truncate(100)
    assert names(path) == ["a"] and len(builds) == 2


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, [record(id="a")])
    read = cache.build_parts

    def grows(*given, **options):
        found = read(*given, **options)
        os.utime(path, ns=(7, 7))
        return found

    monkeypatch.setattr(cache, "build_parts", grows)
    with pytest.raises(ValueError, match="changed while it was read"):
        names(path)
    monkeypatch.undo()
    assert names(path) == ["a"]


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.json").write_text('[{"conversations": []}, {')
    for _ in range(2):
        with pytest.raises(ValueError, match="broken JSON"):
            names(str(tmp_path / "a.json"))
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / CACHE_FOLDER))


def _unprivileged(path: str, folder: str, queue) -> None:
    os.setuid(65534)
    os.environ["HOME"] = f"{folder}/home"
    cache.tempfile.tempdir = f"{folder}/tmp"
    found = names(path)
    made = [f"{root}/{file}" for root, _, files in os.walk(folder) for file in files if file.endswith(".arrow")]
    queue.put((found, made))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a process that may write less than it")
@pytest.mark.parametrize("home_mode", [0o777, 0o555])
def test_read_only_data_is_prepared_elsewhere(home_mode):
    """Beside the file is forbidden: at home, else in a folder of one's own in the temporary one."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        for name, mode in (("home", home_mode), ("tmp", 0o777)):
            os.mkdir(f"{folder}/{name}")
            os.chmod(f"{folder}/{name}", mode)
        path = write(Path(folder), [record(id="a")])
        queue = multiprocessing.get_context("fork").Queue()
        child = multiprocessing.get_context("fork").Process(target=_unprivileged, args=(path, folder, queue))
        child.start()
        found, made = queue.get(timeout=300)
        child.join()
        assert found == ["a"] and len(made) == 1
        assert made[0].startswith(f"{folder}/home/.cache/hacl_megatron/" if home_mode == 0o777 else f"{folder}/tmp/")
        if home_mode != 0o777:
            assert stat.S_IMODE(os.stat(os.path.dirname(made[0])).st_mode) == 0o700


def test_a_full_disk_sends_it_on_and_the_last_place_says_what_to_do(tmp_path, monkeypatch):
    path = write(tmp_path, [record(id="a")])
    merge, full = cache.merge_parts, [str(tmp_path / CACHE_FOLDER)]

    def until_full(parts, output, *more):
        if any(output.startswith(place) for place in full):
            raise OSError(28, "No space left on device")
        merge(parts, output, *more)

    monkeypatch.setattr(cache, "merge_parts", until_full)
    assert names(path) == ["a"]
    assert len(list((tmp_path / "home" / ".cache" / "hacl_megatron").glob("*.arrow"))) == 1
    full.append(str(tmp_path))
    os.utime(path, ns=(9, 9))
    with pytest.raises(ValueError, match=r"nowhere to keep its prepared form .*No space left.*--data-cache-dir"):
        names(path)


def test_another_users_temporary_folder_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "tmp" / f"hacl_megatron-{os.geteuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(cache, "_default_folders", lambda path: [])
    with pytest.raises(ValueError, match="belongs to another user"):
        names(write(tmp_path, [record(id="a")]))


START = """
import os, sys, time
from hacl_megatron.data.prepare import cache
from hacl_megatron.data.manifest import Manifest
build = cache._build
def slow(*given):
    os.write(1, b"prepared\\n")
    time.sleep(1.0)  # long enough for all to have come
    build(*given)
cache._build = slow
manifest = Manifest.read([sys.argv[1]], version="v1")
os.write(1, f"{len(manifest)} {manifest.digest}\\n".encode())
"""


def test_of_several_ranks_one_prepares_and_the_others_wait(tmp_path):
    path = write(tmp_path, [record(id=str(number)) for number in range(50)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", START, path], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]  # fmt: skip
    lines = [line for rank in ranks for line in rank.communicate(timeout=300)[0].splitlines()]
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert lines.count("prepared") == 1
    assert len({line for line in lines if line != "prepared"}) == 1 and len(lines) == 5


def test_a_rank_that_dies_while_it_prepares_does_not_block_the_others(tmp_path):
    path = write(tmp_path, [record(id="a")])
    dying = START.replace("time.sleep(1.0)", "os._exit(9)")
    done = subprocess.run([sys.executable, "-c", dying, path], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 9 and (tmp_path / CACHE_FOLDER).is_dir()
    assert names(path) == ["a"]


def test_without_locks_every_process_prepares_for_itself(tmp_path, monkeypatch, builds):
    def no_locks(*_):
        raise OSError(cache.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert names(write(tmp_path, [record(id="a")])) == ["a"] and len(builds) == 1


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_processes_left_is_removed_by_the_next(tmp_path, monkeypatch, locks):
    """At once where the lock says that nobody is at work; without locks another may be, unless it is long ago."""

    def no_locks(*_):
        raise OSError(cache.errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    path = write(tmp_path, [record(id="a")])
    folder = tmp_path / CACHE_FOLDER
    name = cache._cache_name(path)
    (folder / f"{name}.parts-dead").mkdir(parents=True)
    (folder / f"{name}.parts-dead" / "000000-x.arrow").write_bytes(b"half")
    (folder / f"{name}.tmp-4711").write_bytes(b"half")
    assert names(path) == ["a"]
    left = {entry.name for entry in folder.iterdir()} - {name, f"{name}.lock"}
    assert left == (set() if locks else {f"{name}.parts-dead", f"{name}.tmp-4711"})


def test_a_large_files_start_is_told_and_its_form_named_after_it(tmp_path, monkeypatch, capsys):
    """A start that takes minutes without a word looks like one that hangs."""
    path = write(tmp_path, [record(id="a")])
    size = os.path.getsize
    monkeypatch.setattr(cache.os.path, "getsize", lambda file: 3_000_000_000 if file == path else size(file))
    assert names(path) == ["a"]
    said = capsys.readouterr().out
    assert f"preparing {path} (3.0 GB), once: {tmp_path / CACHE_FOLDER}" in said
    (found,) = (tmp_path / CACHE_FOLDER).glob("*.arrow")
    assert found.name.startswith(f"{os.path.basename(path)}-")
    capsys.readouterr()
    write(tmp_path, [record(id="b"), record(id="c")])
    monkeypatch.undo()
    assert (
        names(path, cache_dir=str(tmp_path / "elsewhere")) == ["b", "c"] and "preparing" not in capsys.readouterr().out
    )
