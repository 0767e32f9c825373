"""Tensors stored and read in place, against torch.save, torch.load and torch's own distributed checkpointing."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from hacl_megatron.checkpoint.convert.metadata import read_metadata
from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.convert.tensor_records import Record, find_values, frame
from hacl_megatron.checkpoint.convert.writer import stored_name
from hacl_megatron.checkpoint.hf.file_blocks import BlockWriter, bytes_of, read_block
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from tests.checkpoint.hf.round_trip_files import assert_same, load_exactly
from tests.tiny import write_tiny_llava
from tests.tool_runs import run_tool, to_hf, to_megatron


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1, 7, 64), (2, 0)])
def test_a_framed_tensor_is_what_torch_load_reads(shape, dtype):
    tensor = random_tensor(shape, dtype)
    around = frame(dtype, shape)
    content = around.before + bytes(bytes_of(tensor)) + around.after
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape and torch.equal(loaded, tensor)


def test_values_are_found_where_torch_save_put_them(tmp_path):
    tensor = random_tensor((4, 33), torch.bfloat16)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"before")
        torch.save(tensor, file)
        length = file.tell() - 6
        file.write(b"behind")
    with (tmp_path / "file").open("rb") as file:
        found = find_values(io.BufferedReader(Record(file.fileno(), 6, length)))
        assert (found.dtype, found.shape) == (torch.bfloat16, (4, 33))
        read = torch.empty(4, 33, dtype=torch.bfloat16)
        read_block(file.fileno(), 6 + found.offset, bytes_of(read))
    assert torch.equal(read, tensor)


def test_what_is_no_plain_tensor_is_left_to_torch():
    tensor = random_tensor((4, 33), torch.float32)
    for value in (tensor.T, tensor[:, 1:], tensor[1:], {"a": tensor}, [tensor, tensor.clone()]):
        stream = io.BytesIO()
        torch.save(value, stream)
        assert find_values(stream) is None
    whole, packed = io.BytesIO(), io.BytesIO()
    torch.save(tensor, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert find_values(packed) is None
    assert find_values(io.BytesIO(whole.getvalue()[:-100])) is None
    assert find_values(io.BytesIO(b"no archive")) is None


def test_records_of_other_kinds_are_read_by_torch(tmp_path, monkeypatch):
    source = write_tiny_llava(tmp_path / "in")
    save = to_megatron(source, tmp_path / "save")
    monkeypatch.setattr("hacl_megatron.checkpoint.convert.reader.find_values", lambda record: None)
    assert_same(load_exactly(to_hf(save, tmp_path / "out")).state_dict(), load_exactly(source).state_dict())


def test_torch_reads_what_was_written_and_the_other_way_round(tmp_path, monkeypatch):
    """torch.distributed.checkpoint alone, in one process: names, sizes and values of every tensor of a conversion."""
    monkeypatch.setattr("hacl_megatron.checkpoint.convert.writer.SMALLEST_CHUNK", 256)
    source = write_tiny_llava(tmp_path / "in", heads=8, groups=4, hidden=64)
    checkpoint = locate_checkpoint(to_megatron(source, tmp_path / "save"))
    theirs = dcp.FileSystemReader(checkpoint).read_metadata()
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)
             for key, entry in theirs.state_dict_metadata.items()}  # fmt: skip
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    reader = ShardedReader(checkpoint)
    for name in reader.names():
        key, layer = stored_name(name)
        value = state[key] if layer is None else state[key][layer]
        assert torch.equal(value[: len(reader.read(name))], reader.read(name)), name

    dcp.save({**state, "counter": 3}, checkpoint_id=tmp_path / "again", no_dist=True)
    tensors, others = read_metadata(tmp_path / "again")
    assert others == ["counter"] and tensors.keys() == state.keys()
    for key, entry in tensors.items():
        assert (entry.size, entry.dtype) == (tuple(state[key].shape), state[key].dtype)
        (chunk,) = entry.chunks
        content = (tmp_path / "again" / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
        assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), state[key])


def test_calls_that_move_less_than_asked_are_repeated(tmp_path, monkeypatch):
    """As the system may: at most 7 bytes a call, in the middle of a buffer or across two."""
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, at: write(file, [b"".join(map(bytes, buffers))[:7]], at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:7]], at))
    parts = [b"abc", b"", bytes(range(50)), b"z" * 15]
    with BlockWriter(tmp_path / "file") as writer:
        assert writer.write(4, parts) == 72
        assert writer.write(0, [b"1234"]) == 4
    assert (tmp_path / "file").read_bytes() == b"1234" + b"".join(parts)
    with (tmp_path / "file").open("rb") as file:
        buffer = bytearray(60)
        read_block(file.fileno(), 5, buffer)
        assert bytes(buffer) == (b"1234" + b"".join(parts))[5:65]
        with pytest.raises(EOFError, match="ends at byte 72, 8 bytes before"):
            read_block(file.fileno(), 20, buffer)


def test_a_file_cut_while_it_is_read_is_one_line(tmp_path, capsys, monkeypatch):
    source = write_tiny_llava(tmp_path / "in")
    path: Path = source / "model.safetensors"
    names = list(load_file(path))
    from hacl_megatron.checkpoint.convert import hf_to_megatron as hf_to_sharded

    plan = hf_to_sharded.plan_chunks

    def cut_then_plan(*arguments):
        os.truncate(path, path.stat().st_size // 2)
        return plan(*arguments)

    monkeypatch.setattr(hf_to_sharded, "plan_chunks", cut_then_plan)
    assert run_tool("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the file may be cut" in line and any(name in line for name in names)
    assert not list(tmp_path.glob("save*"))
