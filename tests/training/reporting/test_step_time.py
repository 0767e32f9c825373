"""Per-rank numbers of a step: a rank that is slow on purpose is named, by work or by reading; memory, MFU."""

import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.data.loader import StepLoader
from hacl_megatron.model.hacl import HaclModel
from hacl_megatron.platform.device import Stopwatch
from hacl_megatron.platform.hardware import peak_flops
from hacl_megatron.train import run
from hacl_megatron.training.reporting.step_time import OwnTime, RankNumbers, rank_scalars
from tests.training.runs import layout_flags, make_inputs, metrics, train

SLOW = 1
SECONDS = 1000.0


def _with_slow_rank(arguments: list[str], what: type, name: str) -> None:
    """Train, with a method that takes `SECONDS` longer on rank `SLOW`, by the clock that this rank reads.

    They do not pass, so the test is quick, and no busy machine delays the other rank by as much.
    """
    method, clock, lost = getattr(what, name), time.perf_counter, 0.0

    def slow(self, *inputs, **named):
        nonlocal lost
        lost += SECONDS
        return method(self, *inputs, **named)

    if dist.get_rank() != SLOW:
        return run(arguments)
    with mock.patch.object(what, name, slow), mock.patch.object(time, "perf_counter", lambda: clock() + lost):
        run(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("step_time"))

    def command(save: str, layout: str, *extra: str) -> list[str]:
        flags = ["--config", str(folder / "pretrain.yaml"), *layout_flags(layout)[1], "--train-iters", "3"]
        return [*flags, "--save", str(folder / save), *extra]

    train(
        [
            partial(_with_slow_rank, command("model", "dp2"), HaclModel, "forward"),
            partial(_with_slow_rank, command("stage", "pp2"), HaclModel, "forward"),
            partial(_with_slow_rank, command("reader", "dp2"), StepLoader, "__next__"),
            command("seldom", "dp2", "--log-interval", "2"),
        ],
        2,
    )
    return folder


@pytest.mark.parametrize("name", ["model", "stage", "reader"])
def test_the_slow_rank_is_named(folder: Path, name: str) -> None:
    rows = metrics(folder / name)
    assert len(rows) == 3 and all(row["slowest-rank"] == SLOW for row in rows), rows
    assert all(row["rank-time-spread"] > 2 for row in rows), rows


def test_the_wait_for_data_is_that_of_the_slowest_reader(folder: Path) -> None:
    """Rank 0, which logs, has its data at once."""
    for row in metrics(folder / "reader"):
        assert row["data-wait-share"] * row["iteration-time"] >= SECONDS - 0.01
    # Where the model is what is slow, it is not taken for the data.
    assert all(row["data-wait-share"] * row["iteration-time"] < SECONDS for row in metrics(folder / "model"))


def test_numbers_of_ranks_are_gathered_at_the_steps_that_are_logged(folder: Path) -> None:
    rows = metrics(folder / "seldom")
    assert [row["iteration"] for row in rows] == [2, 3]
    for row in rows:
        assert row["slowest-rank"] in (0, 1) and row["rank-time-spread"] >= 1
        # A process that has imported torch, in bytes; no GPU, no peak.
        assert 50e6 < row["mem-resident-bytes"] < 50e9
        assert "mfu" not in row and "mem-max-allocated-bytes" not in row


def test_scalars_of_ranks_worked_out_by_hand() -> None:
    ranks = [
        RankNumbers(flops=1e12, own_seconds=1.0, data_wait=0.0, memory=5),
        RankNumbers(flops=2e12, own_seconds=2.5, data_wait=0.5, memory=7),
        RankNumbers(flops=3e12, own_seconds=1.2, data_wait=0.8, memory=6),
    ]
    sums = [sum(column) for column in zip(*(one.slots(rank, 3) for rank, one in enumerate(ranks)), strict=True)]
    assert RankNumbers.of_slots(sums) == ranks
    assert rank_scalars(ranks, 4.0, memory_tag="memory", peak_flops=5e12) == {
        "throughput": 0.5, "model-tflops-per-gpu": 0.5, "mfu": pytest.approx(0.1), "data-wait-share": 0.2,
        "rank-time-spread": 1.5, "slowest-rank": 1, "memory": 7,
    }  # fmt: skip


def test_own_time_is_what_runs_between_start_and_stop() -> None:
    own = OwnTime(torch.device("cpu"))
    with own.forward():
        time.sleep(0.05)
    assert own.take() == 0.0, "off"
    own.is_on = True
    with own.forward():
        time.sleep(0.05)
    waiting = own("forward-recv", log_level=2)
    waiting.start(barrier=False)
    time.sleep(0.3)
    waiting.stop()
    backward = own("backward-compute", log_level=2)
    backward.start()
    time.sleep(0.05)
    backward.stop()
    assert own.take() >= 0.1 and not own.is_on and own.take() == 0.0


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12), ("NVIDIA A100-SXM4-40GB", True, 312e12),
        ("NVIDIA A100 80GB PCIe", False, 19.5e12), ("NVIDIA H200", True, 989e12), ("NVIDIA H100 PCIe", True, None),
        ("NVIDIA GeForce RTX 4090", True, None), (None, True, None),
    ],
)  # fmt: skip
def test_peaks_of_devices_by_their_drivers_names(name: str | None, bf16: bool, peak: float | None) -> None:
    assert peak_flops(name, bf16=bf16) == peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events need a GPU")
def test_a_stopwatch_on_a_gpu_times_the_kernels() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(device)
    square = torch.randn(8192, 8192, device=device)
    watch.start()
    for _ in range(20):
        square @ square
    watch.stop()
    assert watch.take() > 20 * 2 * 8192**3 / 2e15 and watch.take() == 0.0
