"""A result folder has one writer at a time, and what killed writers left behind goes."""

import subprocess
import sys
from pathlib import Path

import pytest

from hacl_megatron.checkpoint.hf.fresh_folder import fresh_folder
from hacl_megatron.platform.folder_lock import FolderInUse

WRITES = """
import sys, time
from pathlib import Path
from hacl_megatron.checkpoint.hf.fresh_folder import fresh_folder
with fresh_folder(Path(sys.argv[1]), 0, force=True, why_not=lambda out: None) as folder:
    (folder / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def write(out: Path, text: str, *, force: bool = False) -> None:
    with fresh_folder(out, 0, force=force, why_not=lambda _: None) as folder:
        (folder / "weights").write_text(text)


@pytest.fixture
def writer(tmp_path: Path):
    """A real process that is writing `tmp_path/out`."""
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_two_writers_of_one_folder_are_not_at_work_at_once(tmp_path: Path, writer) -> None:
    """Catches the later rename, which with --force replaces what the other has just finished, and both say it is done;
    and a clean-up that removes what a living process writes."""
    with pytest.raises(FolderInUse, match=rf"{tmp_path}/out is in use by process {writer.pid} "):
        write(tmp_path / "out", "mine")
    assert len(list(tmp_path.glob("out.partial-*/weights"))) == 1


def test_what_a_killed_writer_left_behind_goes(tmp_path: Path, writer) -> None:
    """Catches 14 GB a killed conversion."""
    (tmp_path / "out.partial-7").mkdir()
    (tmp_path / "outer.partial-7").mkdir()
    writer.kill()
    writer.wait()
    write(tmp_path / "out", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "outer.partial-7"]
    assert (tmp_path / "out" / "weights").read_text() == "mine"


def test_a_result_that_had_stepped_aside_comes_back(tmp_path: Path) -> None:
    """Catches losing the old result to a kill between the two renames of a replacement."""
    (tmp_path / "out.replaced-7").mkdir()
    (tmp_path / "out.replaced-7" / "weights").write_text("old")
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
