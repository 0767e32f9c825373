"""Files of a checkpoint that are small and would be gone through for ever, or large and hold nothing."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hacl_megatron.checkpoint.run.folder import iteration_folder, latest_iteration
from hacl_megatron.checkpoint.run.integrity import damage
from hacl_megatron.checkpoint.run.load import load_common_state
from hacl_megatron.checkpoint.run.stored import pickles
from hacl_megatron.checkpoint.run.stored.index import read_index
from tests.tiny import write_tiny_llava
from tests.tool_runs import run_tool, to_megatron

FIRST = 10**6
DEEP = b")" + b"\x85" * 100_000
"""A tuple in a tuple, and so on."""
DOUBLED = b")r" + struct.pack("<I", FIRST) + b"".join(
    b"j" + struct.pack("<I", FIRST + i) + b"\x86r" + struct.pack("<I", FIRST + i + 1) for i in range(60)
)  # fmt: skip
"""A tuple of the one before, twice: of 60 levels, a text of 10**18 brackets."""
TERABYTE = 1 << 40


def name(module: str, text: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, text)) + b"\x93"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endless")
    source = write_tiny_llava(folder / "hf", layers=1, vision_layers=2)
    return iteration_folder(to_megatron(source, folder / "save"), 0)


@pytest.fixture
def checkpoint(honest: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(honest, tmp_path / "save" / honest.name)
    (copy / "files.json").unlink()
    return copy


def with_hole(folder: Path, attribute: str, content: bytes) -> bytes:
    """The index of a checkpoint with a pickle of ours in place of where a part is."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    setattr(next(iter(metadata.storage_data.values())), attribute, "HOLE")
    whole = pickle.dumps(metadata, protocol=4)
    assert whole.count(b"\x8c\x04HOLE\x94") == 1 and whole[2:3] == b"\x95"
    return whole[:2] + whole[11:].replace(b"\x8c\x04HOLE\x94", content + b"r" + struct.pack("<I", FIRST - 1))


INDICES: dict[str, Callable[[Path], bytes]] = {
    "size-doubled": lambda _: b"\x80\x04" + name("torch", "Size") + DOUBLED + b"\x85R.",
    "size-deep": lambda _: b"\x80\x04" + name("torch", "Size") + DEEP + b"\x85R.",
    "lists": lambda _: b"\x80\x04" + b"]" * (4 << 20) + b".",
    "marks": lambda _: b"\x80\x04" + b"(" * (4 << 20) + b".",
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_endless_index_is_one_line(checkpoint: Path, kind: str) -> None:
    """Catches the message that shows all of it, and lists without number."""
    (checkpoint / ".metadata").write_bytes(INDICES[kind](checkpoint))
    with pytest.raises(ValueError, match=r"\.metadata: ") as error:
        read_index(checkpoint)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("attribute", ["length", "offset", "relative_path"])
@pytest.mark.parametrize("content", [DEEP, DOUBLED], ids=["deep", "doubled"])
def test_an_endless_place_of_a_part_is_one_line(checkpoint: Path, attribute: str, content: bytes) -> None:
    """Catches a RecursionError, which ended the command with a traceback, and a text without end."""
    whole = with_hole(checkpoint, attribute, content)
    (checkpoint / ".metadata").write_bytes(whole)
    with pytest.raises(ValueError, match=r"\.metadata: "):
        read_index(checkpoint)


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("a/data.pkl", content)
    return file.getvalue()


COMMONS = {
    "encoding": name("_codecs", "encode") + b"(\x8c\x01a" + DOUBLED + b"tR.",
    "storage": name("torch._utils", "_rebuild_tensor_v2")
    + b"((\x8c\x07storage" + name("torch", "FloatStorage") + DOUBLED + b"\x8c\x03cpuK\x01tQK\x00))tR.",
    "sizes": name("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00" + DOUBLED + b")tR.",
    "doubled": b"}\x8c\x08progress" + DOUBLED + b"s.",
    "deep": b"}\x8c\x08progress" + DEEP + b"s.",
    "itself": b"}\x94\x8c\x08progressh\x00s.",
    "wide": b"}\x8c\x01a]\x94(" + b"K\x01" * 5000 + b"e]\x94(" + b"h\x00" * 5000 + b"e\x86s.",
    "progress": b"}\x8c\x08progressK\x01s.",
    "iteration": b"}\x8c\x08progress}\x8c\x09iteration]ss.",
    "layout": b"}\x8c\x06layout(K\x01K\x01K\x00lBs.",
}  # fmt: skip


@pytest.mark.parametrize("kind", COMMONS)
def test_an_endless_common_state_is_one_line(checkpoint: Path, kind: str) -> None:
    """Catches what is read and then shown, compared or counted without end; and counters of another type."""
    (checkpoint / "common.pt").write_bytes(archive(b"\x80\x04" + COMMONS[kind]))
    with pytest.raises(ValueError, match=r"common\.pt: ") as error:
        load_common_state(checkpoint)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("file", [".metadata", "common.pt", "files.json", "latest_checkpointed_iteration.txt"])
def test_a_file_without_end_is_one_line(checkpoint: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a MemoryError, or an end by the system: a sparse file takes no disk, but memory when it is read."""
    path = (checkpoint.parent if file.startswith("latest") else checkpoint) / file
    path.touch()
    os.truncate(path, TERABYTE)
    assert run_tool("inspect_checkpoint", checkpoint.parent if file.startswith("latest") else checkpoint) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0]


def test_a_record_far_larger_than_its_values_is_refused(checkpoint: Path) -> None:
    """Catches memory that is made for whatever length the index states, where the file is sparse."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, TERABYTE
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    for file in checkpoint.glob("*.distcp"):
        os.truncate(file, TERABYTE)
    with pytest.raises(ValueError, match=f"{TERABYTE} bytes"):
        read_index(checkpoint)


def test_a_list_of_files_that_is_none_or_names_none_is_damage(checkpoint: Path) -> None:
    """Catches a pipe taken for a checkpoint without a list, and an error of Python's on a name of half a character."""
    os.mkfifo(checkpoint / "files.json")
    assert "files.json" in damage(checkpoint)
    (checkpoint / "files.json").unlink()
    (checkpoint / "files.json").write_text('{"files": {"\\ud800": 1}}')
    assert "is missing" in damage(checkpoint)


def test_the_latest_iteration_is_a_short_text(tmp_path: Path) -> None:
    """Catches a limit that refuses what people write by hand."""
    (tmp_path / "iter_0000012").mkdir()
    (tmp_path / "iter_0000012" / "run_config.yaml").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" 12 \n\n")
    assert latest_iteration(tmp_path) == 12


def test_a_link_to_another_files_settings_is_not_exported(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """Catches whatever a link leads to read as generation settings, and written into an export for all to see."""
    (tmp_path / "secret.json").write_text('{"password": "1234"}')
    (checkpoint / "hf_assets" / "generation_config.json").unlink()
    (checkpoint / "hf_assets" / "generation_config.json").symlink_to(tmp_path / "secret.json")
    assert run_tool("convert_megatron_to_hf", "--load", checkpoint, "--hf-path", tmp_path / "out") == 2
    assert "generation_config.json: a link to" in capsys.readouterr().err


def test_a_place_before_the_beginning_is_refused_and_the_beginning_is_one() -> None:
    memory = pickles._Memory(b"abc")
    assert memory.seek(-3, 2) == memory.seek(0) == 0 and memory.read() == b"abc"
    with pytest.raises(ValueError, match="before the beginning"):
        memory.seek(-4, 2)


@pytest.mark.parametrize("order", ["<", "|", ">", "", "x", "<|"])
def test_numbers_in_an_order_of_no_machine_are_refused(order: str) -> None:
    """They were read as if they were in this machine's."""
    dtype = SimpleNamespace(state=(3, order, None, None, None, -1, -1, 0), arguments=("f8", False, True))
    array = np.empty(0, dtype=np.int8)
    fill = partial(pickles._fill_array, array, (1, (2,), dtype, False, np.array([1.0, 2.0]).tobytes()))
    if order in ("<", "|"):
        fill()
        assert array.dtype == np.float64 and array.tolist() == [1, 2]
    else:
        with pytest.raises(ValueError, match="a NumPy array in the byte order "):
            fill()
