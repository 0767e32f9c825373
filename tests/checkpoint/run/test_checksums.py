"""Checksums of a checkpoint: a changed bit is found, wherever it is, and by whoever reads it; older ones still load."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.run.choose import choose_checkpoint
from hacl_megatron.checkpoint.run.frozen import finish_frozen, references
from hacl_megatron.checkpoint.run.integrity import damage, is_finite, read_whole, record_checksums, write_files
from hacl_megatron.checkpoint.run.part_files import Part, not_finite, write_index, write_parts
from hacl_megatron.checkpoint.run.publish import begin, partial_folder, publish
from hacl_megatron.checkpoint.run.retain import prune
from hacl_megatron.checkpoint.run.stored.parts import StoredParts
from hacl_megatron.checkpoint.run.whole import make_whole
from tests.distributed import run_distributed
from tests.tiny import write_tiny_llava
from tests.tool_runs import to_megatron


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checksums")
    return to_megatron(write_tiny_llava(root / "in"), root / "save") / "iter_0000000"


def flipped(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def read_all(checkpoint: Path) -> None:
    parts = StoredParts(checkpoint)
    for key, entry in parts.index.tensors.items():
        for chunk in entry.chunks:
            parts.values(key, chunk)


def test_a_flipped_bit_is_found_wherever_it_is(converted: Path, tmp_path: Path) -> None:
    """Of single bits in tensor files a quarter changed weights without a word."""
    copy = shutil.copytree(converted, tmp_path / converted.name)
    generator = random.Random(0)
    for path in sorted(path for path in copy.iterdir() if path.suffix == ".distcp" or path.name == ".metadata"):
        content = path.read_bytes()
        for _ in range(25):
            flipped(path, generator.randrange(len(content)), generator.randrange(8))
            with pytest.raises(ValueError, match=path.name) as refusal:
                read_all(copy)
            assert "\n" not in str(refusal.value)
            path.write_bytes(content)
    read_all(copy)


def test_a_changed_record_is_refused_with_what_was_found_and_expected(converted: Path, tmp_path: Path) -> None:
    """With the checkpoint before it named; by conversions to Hugging Face too."""
    shutil.copytree(converted, tmp_path / "iter_0000001")
    copy = shutil.copytree(converted, tmp_path / "iter_0000002")
    reader = ShardedReader(copy)
    name = reader.names()[0]
    chunk = StoredParts(copy).index.tensors[reader._stored(name)[0]].chunks[0]
    flipped(copy / chunk.file, chunk.offset + chunk.length // 2, 3)
    with pytest.raises(ValueError, match=r"has checksum [0-9a-f]{16}, but [0-9a-f]{16} was written.*iter_0000001"):
        ShardedReader(copy).read(name)


@pytest.mark.parametrize("file", ["common.pt", "metadata.json", ".metadata", "hf_assets/carried.safetensors"])
def test_small_files_are_compared_before_anything_loads(converted: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(converted, tmp_path / converted.name)
    flipped(copy / file, (copy / file).stat().st_size // 2, 0)
    assert re.search(rf"{re.escape(file)} has checksum \w+, but \w+ was written", damage(copy) or "")


def test_a_checkpoint_without_checksums_loads_with_a_line_said(converted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(converted, tmp_path / converted.name)
    assert choose_checkpoint(copy, fallback=False) == (copy, None)
    listed = json.loads((copy / "files.json").read_text())
    (copy / "files.json").write_text(json.dumps({"files": listed["files"]}))  # as versions before checksums wrote it
    assert damage(copy) is None
    read_all(copy)
    assert "has no checksums" in choose_checkpoint(copy, fallback=False)[1]


def saved(save: Path, iteration: int, values: torch.Tensor, *, frozen: bool = False) -> Path:
    """A checkpoint of one tensor, written as the saver writes it; `frozen` puts it beside the iterations."""
    begin(save, iteration)
    parts = [Part(key="w", values=values, offsets=(0, 0), global_shape=tuple(values.shape))]
    if frozen:
        partial = save / "frozen" / "0123456789abcdef.partial"
        partial.mkdir(parents=True)
        finish_frozen(partial, "0123456789abcdef", write_parts(partial, parts, 0))
        stored = references(save, "0123456789abcdef")
    else:
        stored = write_parts(partial_folder(save, iteration), parts, 0)
    publish(
        save, iteration, stored, common=b"", run_config="", write_assets=lambda folder: folder.mkdir(),
        not_finite=not_finite(parts),
    )  # fmt: skip
    return save / f"iter_{iteration:07d}"


def test_frozen_weights_have_checksums_and_keep_them_in_a_copy(tmp_path: Path) -> None:
    values = torch.arange(12.0).view(3, 4)
    checkpoint = saved(tmp_path / "save", 1, values, frozen=True)
    whole = make_whole(checkpoint, tmp_path / "whole")
    for folder, file in ((checkpoint, tmp_path / "save/frozen/0123456789abcdef/__0_0.distcp"), (whole, None)):
        read_all(folder)
        flipped(file or next(whole.glob("*.distcp")), 400, 1)
        with pytest.raises(ValueError, match="was written"):
            read_all(folder)


def test_checksums_of_records_are_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    """They are made as the bytes pass: a second sum over what is on the disk is the oracle."""
    import xxhash

    parts = [Part(key=f"w{i}", values=torch.randn(7, i + 1), offsets=(0, 0), global_shape=(7, i + 1)) for i in range(5)]
    stored = write_parts(tmp_path, [*parts, Part(key="object", values=b"123")], 0)
    content = (tmp_path / "__0_0.distcp").read_bytes()
    assert [part.checksum for part in stored] == [
        xxhash.xxh3_64_hexdigest(content[part.offset : part.offset + part.length]) for part in stored
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_last_finite_checkpoint_survives_those_that_are_not(tmp_path: Path, value: float) -> None:
    """--save-retain 1 kept NaN alone."""
    bad = torch.ones(2, 2)
    bad[1, 0] = value
    for iteration, values in ((1, torch.ones(2, 2)), (2, torch.ones(2, 2)), (3, bad), (4, bad)):
        saved(tmp_path, iteration, values)
    assert prune(tmp_path, latest=4, newest=1, every=None) == [1, 3]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    chosen, note = choose_checkpoint(tmp_path, fallback=False)
    assert chosen.name == "iter_0000004" and "not finite" in note and "iter_0000002" in note


@pytest.mark.parametrize("text", ["²", "9" * 5000, "9" * 18, "\udcff", "-1", "", "1e3"])
def test_a_latest_file_that_holds_no_number_is_one_line(tmp_path: Path, text: str) -> None:
    """`²` is a digit to Python, and no number."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match="expected an iteration number") as refusal:
        choose_checkpoint(tmp_path, fallback=False)
    assert "\n" not in str(refusal.value)


def test_lists_that_lie_are_refused(tmp_path: Path) -> None:
    """Names that lead elsewhere, and pipes, which would never answer."""
    import os

    (tmp_path / "files.json").write_text(json.dumps({"files": {"/etc/passwd": 3}}))
    assert "no list of files" in damage(tmp_path)
    (tmp_path / "files.json").write_text("[" * 100_000)
    assert "no list of files" in damage(tmp_path)
    (tmp_path / "files.json").unlink()
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(ValueError, match="no such file"):
        StoredParts(tmp_path)
    write_files(tmp_path, [])
    assert damage(tmp_path) is None


def test_an_index_whose_parts_do_not_fit_is_refused_before_there_is_room_made(tmp_path: Path) -> None:
    """A tensor of terabytes in a record of bytes."""
    (stored,) = write_parts(tmp_path, [Part(key="w", values=torch.ones(4), offsets=(0,), global_shape=(4,))], 0)
    from dataclasses import replace

    write_index(tmp_path, [replace(stored, sizes=[10**12], global_shape=[10**12])])
    with pytest.raises(ValueError, match="a part of w of sizes"):
        StoredParts(tmp_path)


def save_nan(folder: Path) -> list[str]:
    """Three asynchronous saves, the last two with a NaN; what the saver says."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from hacl_megatron.checkpoint.run.load import load_checkpoint
    from hacl_megatron.checkpoint.run.save import CheckpointSaver

    saver, weight = CheckpointSaver(folder, newest=1), torch.ones(4)
    for iteration in (1, 2, 3):
        weight[1] = 1 if iteration == 1 else float("nan")
        state = {"weight": ShardedTensor.from_rank_offsets("weight", weight)}
        saver.save(iteration, lambda state=state: state, run_config="", write_assets=lambda to: None)
    saver.close()
    wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(4))}
    assert torch.equal(load_checkpoint(wanted, folder / "iter_0000001")["weight"], torch.ones(4))
    return saver.notes()


def test_a_run_says_that_it_saves_nan_and_keeps_what_was_before(tmp_path: Path) -> None:
    """Steps are skipped then, and each save pushed one more finite checkpoint out."""
    (notes,) = run_distributed(save_nan, 1, tmp_path)
    assert (
        sum("not finite, the first in weight: the last finite one, iteration 1, is kept" in note for note in notes) == 2
    )
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000003"]
    assert json.loads((tmp_path / "iter_0000003" / "files.json").read_text())["not_finite"] == "weight"


def test_checksums_of_another_kind_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Each record would be called damaged, or none looked at."""
    write_files(tmp_path, [], {"__0_0.distcp": {0: "0" * 16}})
    assert record_checksums(tmp_path) == {"__0_0.distcp": {0: "0" * 16}}
    files = tmp_path / "files.json"
    files.write_text(json.dumps(json.loads(files.read_text()) | {"checksum": "crc32"}))
    with pytest.raises(ValueError, match=r"files\.json has checksums of kind 'crc32', not "):
        record_checksums(tmp_path)


def test_a_checkpoint_whose_list_is_damaged_does_not_count_as_finite(tmp_path: Path) -> None:
    """It would be kept as the last finite one, and a whole one deleted."""
    assert is_finite(tmp_path)
    write_files(tmp_path, [])
    assert is_finite(tmp_path)
    (tmp_path / "files.json").write_text("[" * 100_000)
    assert not is_finite(tmp_path)


def test_a_file_of_just_the_most_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "five").write_bytes(b"12345")
    assert read_whole(tmp_path / "five", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, expected at most 4"):
        read_whole(tmp_path / "five", 4)
