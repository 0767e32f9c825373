"""Records of a checkpoint, written one by one as torch's own distributed checkpointing reads them; blocks of files."""

import io
import os
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.convert.stored_names import stored_name
from hacl_megatron.checkpoint.hf.safetensors_writer import bytes_of
from hacl_megatron.checkpoint.hf.weight_files import WeightFiles
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.checkpoint.run.part_files import Part, write_index, write_parts
from hacl_megatron.checkpoint.run.stored.index import read_index
from tests.tiny import write_tiny_llava
from tests.tool_runs import run_tool, to_megatron


def test_records_without_a_crc_are_read(tmp_path):
    """Conversions leave the CRC-32 out of a record: who checks it refuses all their checkpoints.

    The checksums of `files.json` are others; a folder without it is an older one.
    """
    checkpoint = locate_checkpoint(to_megatron(write_tiny_llava(tmp_path / "in"), tmp_path / "save"))
    reader = ShardedReader(checkpoint)
    name = next(name for name in reader.names() if name.startswith("connector.") and name.endswith("weight"))
    (chunk,) = reader._tensors[name].chunks
    values = reader.read(name)
    path = checkpoint / chunk.file
    path.write_bytes(path.read_bytes().replace(bytes(bytes_of(values)), bytes(bytes_of(2 * values))))
    (checkpoint / "files.json").unlink()
    reader = ShardedReader(checkpoint)
    record = path.read_bytes()[chunk.offset : chunk.offset + chunk.length]
    assert zipfile.ZipFile(io.BytesIO(record)).testzip() is not None  # the name of the first that is damaged
    assert torch.equal(reader.read(name), 2 * values)


@pytest.mark.parametrize("cut", [slice(None), slice(3, 9), slice(0, 12, 2)])
def test_a_part_of_a_storage_is_written_alone(tmp_path, cut):
    """torch.save writes the storage behind a tensor, which for a rank's part may be the whole of its model."""
    whole = torch.arange(12 * 1000, dtype=torch.float32).view(12, 1000)
    part = Part(key="weight", values=whole[cut], offsets=(0, 0), global_shape=tuple(whole[cut].shape))
    (stored,) = write_parts(tmp_path, [part], number=0)
    assert whole[cut].nbytes < stored.length < whole[cut].nbytes + 2000
    loaded = torch.load(tmp_path / stored.file, weights_only=True)
    assert torch.equal(loaded, whole[cut])


def test_parts_are_made_one_after_another(tmp_path):
    """A writer that lists what an iterator makes would hold a whole model."""
    alive = []

    def parts():
        for i in range(5):
            values = torch.full((1, 1000), float(i))
            alive.append(weakref.ref(values))
            assert sum(ref() is not None for ref in alive) <= 2, i
            yield Part(key="weight", values=values, offsets=(i, 0), global_shape=(5, 1000))
            del values

    stored = write_parts(tmp_path, parts(), number=0)
    write_index(tmp_path, stored)
    state = {"weight": torch.empty(5, 1000)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["weight"], torch.arange(5.0)[:, None].expand(5, 1000))


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
    index = read_index(tmp_path / "again")
    tensors = index.tensors
    assert list(index.objects) == ["counter"] and tensors.keys() == state.keys()
    for key, entry in tensors.items():
        assert (entry.size, entry.dtype) == (tuple(state[key].shape), state[key].dtype)
        (chunk,) = entry.chunks
        content = (tmp_path / "again" / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
        assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), state[key])


def test_calls_that_move_less_than_asked_are_repeated(tmp_path, monkeypatch):
    """As the system may, and does beyond 2 GB: at most 7 bytes a call."""
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:7]], at))
    source = write_tiny_llava(tmp_path / "in")
    weights = WeightFiles.of_folder(source)
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.numel() < 1000:
            assert torch.equal(weights.read(name), tensor), name


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
