"""Weights that do not train: hashed in blocks, and written beside a folder of theirs that has been damaged."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, load

from hacl_megatron.checkpoint.run import frozen
from hacl_megatron.checkpoint.run.integrity import damage, may_be_file_of_checkpoint
from hacl_megatron.checkpoint.run.part_files import Part
from hacl_megatron.checkpoint.run.save import CheckpointSaver
from tests.distributed import run_distributed


def save_and_damage(folder: Path) -> None:
    """Three saves of one frozen weight; before the second and the third, each file of it that is there is cut."""
    tower, weight = torch.arange(6.0), torch.zeros(2)
    saver = CheckpointSaver(folder, asynchronous=False)
    for iteration in (1, 2, 3):
        for file in folder.glob("frozen/*/*.distcp"):
            file.write_bytes(file.read_bytes()[:-1])
        state = {name: ShardedTensor.from_rank_offsets(name, value) for name, value in
                 {"tower": tower, "weight": weight.fill_(iteration)}.items()}  # fmt: skip
        saver.save(
            iteration,
            lambda state=state: state,
            frozen=frozenset({"tower"}),
            run_config="",
            write_assets=lambda to: None,
        )
        assert saver.wait() is None
    saver.close()


def test_a_save_over_a_damaged_frozen_part_is_one_that_is_read(tmp_path: Path) -> None:
    """Catches a second folder whose name an index must not hold."""
    run_distributed(save_and_damage, 1, tmp_path)
    assert len(list((tmp_path / "frozen").iterdir())) == 3
    for iteration in (1, 2, 3):
        reader = FileSystemReader(tmp_path / f"iter_{iteration:07d}")
        files = {info.relative_path for info in reader.read_metadata().storage_data.values()}
        assert len(files) == 2 and all(map(may_be_file_of_checkpoint, files)), files
        assert (damage(tmp_path / f"iter_{iteration:07d}") is None) == (iteration == 3)
    found = {"tower": torch.empty(6), "weight": torch.empty(2)}
    load(found, storage_reader=FileSystemReader(tmp_path / "iter_0000003"), no_dist=True)
    assert found["tower"].tolist() == [0, 1, 2, 3, 4, 5] and found["weight"].tolist() == [3, 3]


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_digest_does_not_depend_on_how_much_is_hashed_at_once(monkeypatch, shape, dtype) -> None:
    values = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to(dtype)
    parts = [Part(key="weight", values=values, offsets=(0,) * len(shape), global_shape=shape)]
    digest = frozen.digest_of([frozen.value_sums(parts)])
    for block in (1, 4, 6):
        monkeypatch.setattr(frozen, "_BLOCK", block)
        assert frozen.digest_of([frozen.value_sums(parts)]) == digest
    assert len(digest) == 16 and int(digest, 16)


def test_a_folders_name_stays_from_version_to_version() -> None:
    """Its content, not the code that wrote it, makes the name: runs that resume find what was written before."""
    whole, one, other = ({"tower": ((3, 2), "torch.float32", value)} for value in (7, 3, 4))
    assert frozen.digest_of([whole]) == frozen.digest_of([one, other]) == "7030ebdb1513c66e"
