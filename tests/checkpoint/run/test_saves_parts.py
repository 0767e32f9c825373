"""What a rank writes, what is hashed, kept and deleted: the pieces of a save, without a model."""

import json
import math
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from hacl_megatron.checkpoint.run import save as saver
from hacl_megatron.checkpoint.run.choose import choose_checkpoint
from hacl_megatron.checkpoint.run.extra_states import take_out_scales
from hacl_megatron.checkpoint.run.frozen import digest_of, value_sums
from hacl_megatron.checkpoint.run.integrity import may_be_file_of_checkpoint, write_files
from hacl_megatron.checkpoint.run.local_parts import flat_blocks
from hacl_megatron.checkpoint.run.part_files import Part, write_index, write_parts
from hacl_megatron.checkpoint.run.retain import prune
from hacl_megatron.checkpoint.run.whole import make_whole
from tests.distributed import run_distributed


@pytest.mark.parametrize("shape", [(7,), (1,), (4, 3), (1, 5), (5, 1), (3, 1, 4), (2, 3, 4), (1, 2, 3, 2)])
def test_a_run_of_values_is_a_few_rectangles_of_its_tensor(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = torch.full_like(whole, -1)
            run = whole.flatten()[start:stop]
            blocks = list(flat_blocks(shape, start, stop))
            for offsets, sizes, position in blocks:
                place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                assert (found[place] == -1).all()
                found[place] = run[position : position + math.prod(sizes)].view(sizes)
            inside = (whole >= start) & (whole < stop)
            assert torch.equal(found, torch.where(inside, whole, -1)), (start, stop)
            assert len(blocks) <= 2 * len(shape) - 1


def part(values: torch.Tensor, *offsets: int, of: tuple[int, ...], key: str = "weight") -> Part:
    return Part(key=key, values=values, offsets=offsets, global_shape=of)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_digest_is_of_the_values_not_of_the_layout(dtype: torch.dtype) -> None:
    values = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)

    def digest(tensor: torch.Tensor, rows: int, columns: int, key: str = "weight") -> str:
        """Of a tensor that ranks hold in pieces of [1, rows, columns]."""
        return digest_of(
            value_sums([part(tensor[i : i + 1, j : j + rows, k : k + columns], i, j, k, of=(2, 6, 8), key=key)])
            for i in range(2)
            for j in range(0, 6, rows)
            for k in range(0, 8, columns)
        )

    whole = digest_of([value_sums([part(values, 0, 0, 0, of=(2, 6, 8))])])
    assert {digest(values, 6, 8), digest(values, 3, 8), digest(values, 6, 2), digest(values, 1, 1)} == {whole}
    others = [values.clone() for _ in range(5)]
    others[0][1, 2, 3] = -others[0][1, 2, 3]
    others[1][:, 4] = others[1][:, 4].flip(-1)
    others[2] = others[2].flip(0)
    others[3] = others[3].roll(1, 1)
    others[4].view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[0, 0, 0] ^= 1
    digests = [whole, digest(values, 6, 8, key="other"), *(digest(other, 3, 4) for other in others)]
    assert len(set(digests)) == len(digests)


def test_parts_that_do_not_make_up_their_tensor_are_no_checkpoint(tmp_path: Path) -> None:
    stored = write_parts(tmp_path, [part(torch.ones(2, 3), 0, 0, of=(4, 3))], number=1)
    assert [path.name for path in tmp_path.iterdir()] == ["__1_0.distcp"]
    with pytest.raises(RuntimeError, match="weight: 6 of 12 values"):
        write_index(tmp_path, stored)
    with pytest.raises(RuntimeError, match="weight: 12 of 12 values are in 2 parts"):
        write_index(tmp_path, stored * 2)


@pytest.mark.parametrize("name", ["../../frozen/0123456789abcdef/a", "../frozen/../a", "/etc/passwd", "../a", "a/b"])
def test_an_index_names_no_file_elsewhere(name: str) -> None:
    assert not may_be_file_of_checkpoint(name)
    assert may_be_file_of_checkpoint("__0_0.distcp")
    assert may_be_file_of_checkpoint("../frozen/0123456789abcdef/__0_0.distcp")


def make_checkpoints(save: Path, *iterations: int, latest: int) -> None:
    for iteration in iterations:
        folder = save / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        for name in (".metadata", "metadata.json", "run_config.yaml", "__0_0.distcp"):
            (folder / name).write_text(name)
        write_files(folder, [".metadata", "metadata.json", "__0_0.distcp"], records={})
    (save / "latest_checkpointed_iteration.txt").write_text(f"{latest}\n")


@pytest.mark.parametrize(
    ("newest", "every", "latest", "kept"),
    [
        (2, None, 50, [40, 50]),
        (1, 20, 50, [20, 40, 50]),
        (9, None, 50, [10, 20, 30, 40, 50]),
        (1, None, 30, [30, 40, 50]),  # resumed from 20: what lies beyond is another past's
    ],
)
def test_the_newest_and_every_kth_stay(tmp_path: Path, newest: int, every: int | None, latest: int, kept) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, 40, 50, latest=latest)
    others = [tmp_path / "frozen" / "0123456789abcdef", tmp_path / "iter_0000060.partial", tmp_path / "iter_5"]
    for folder in others:
        folder.mkdir(parents=True)
    prune(tmp_path, latest=latest, newest=newest, every=every)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"iter_{i:07d}" for i in kept} | {
        "frozen", "iter_0000060.partial", "iter_5", "latest_checkpointed_iteration.txt"
    }  # fmt: skip
    assert all(folder.is_dir() for folder in others)


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_offered(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, 30, 40, latest=40)
    newest, whole = tmp_path / "iter_0000040", tmp_path / "iter_0000020"
    assert choose_checkpoint(tmp_path, fallback=False) == (newest, None)
    (newest / "__0_0.distcp").write_text("cut")
    (tmp_path / "iter_0000030" / "metadata.json").unlink()
    for given in (tmp_path, newest):
        with pytest.raises(ValueError) as refusal:
            choose_checkpoint(given, fallback=False)
        line = str(refusal.value)
        assert f"{newest / '__0_0.distcp'} has 3 bytes, but 12 were written" in line and "\n" not in line
        assert f"--load {whole}" in line and "--load-fallback" in line
        chosen, note = choose_checkpoint(given, fallback=True)
        assert chosen == whole and str(newest) in note and str(whole) in note
    (whole / ".metadata").unlink()
    (tmp_path / "iter_0000010" / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"no older checkpoint in .* is whole"):
        choose_checkpoint(tmp_path, fallback=True)


def test_an_older_checkpoint_is_not_copied_for_a_damaged_one(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, latest=20)
    (tmp_path / "iter_0000020" / "__0_0.distcp").write_text("cut")
    with pytest.raises(ValueError, match="has 3 bytes, but 12 were written"):
        make_whole(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_of_another_precision_are_left_out_and_said() -> None:
    """FP8 scales that nothing would use, and a run in FP8 that finds none."""
    scales, none = torch.ones(3, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)
    held = {"a._extra_state": scales, "b._extra_state": none, "weight": scales}
    assert "starts with fresh ones" in take_out_scales({"b._extra_state": none, "weight": scales}, used=True)
    assert "FP8 scales are left out" in take_out_scales(held, used=False)
    assert held == {"a._extra_state": None, "b._extra_state": none, "weight": scales}
    assert take_out_scales({"b._extra_state": none, "weight": scales}, used=False) is None


def test_the_whole_one_is_found_where_the_latest_file_misleads(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 10, 20, latest=30)
    with pytest.raises(ValueError, match="names iteration 30"):
        choose_checkpoint(tmp_path, fallback=False)
    assert choose_checkpoint(tmp_path, fallback=True)[0] == tmp_path / "iter_0000020"
    (tmp_path / "iter_0000020" / "files.json").write_text(json.dumps([]))
    assert choose_checkpoint(tmp_path, fallback=True)[0] == tmp_path / "iter_0000010"


def save_while_weights_move(folder: str) -> None:
    """Two saves in the background on a slow disk; the weight is overwritten as soon as each call returns."""
    from megatron.core.dist_checkpointing import ShardedTensor

    weight, write = torch.zeros(4), saver.write_parts

    def write_late(*arguments):
        time.sleep(0.3)
        return write(*arguments)

    with mock.patch.object(saver, "write_parts", write_late):
        checkpoints = saver.CheckpointSaver(Path(folder))
        for iteration in (1, 2):
            weight.fill_(iteration)
            state = {"weight": ShardedTensor.from_rank_offsets("weight", weight)}
            checkpoints.save(iteration, lambda state=state: state, run_config="", write_assets=lambda to: None)
            (thread,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint")
            assert thread.daemon, "a process that must die would wait for its disk"
            weight.fill_(-1)
        checkpoints.close()


def test_a_save_in_the_background_holds_the_weights_of_its_iteration(tmp_path: Path) -> None:
    """Catches a save that writes, without a copy, what training has made of the weights meanwhile."""
    run_distributed(save_while_weights_move, 1, str(tmp_path))
    for iteration in (1, 2):
        found = {"weight": torch.empty(4)}
        load(found, storage_reader=FileSystemReader(tmp_path / f"iter_{iteration:07d}"), no_dist=True)
        assert torch.equal(found["weight"], torch.full([4], float(iteration)))


def test_why_a_save_failed_is_one_line() -> None:
    assert saver._one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert saver._one_line(ValueError("alone")) == "ValueError: alone"
    assert saver._one_line(ValueError()) == "ValueError"
