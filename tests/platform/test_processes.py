"""How a process joins its group: alone without a port, and what is said where the launcher's address is of no use."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.config.console import LaunchError
from hacl_megatron.platform.processes import start_platform
from tests.distributed import run_distributed

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def alone_without_a_network() -> float:
    """A group of one with every socket refused; sums over it and over one more group of its own."""
    dist.destroy_process_group()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    bind, socket.socket.bind = socket.socket.bind, None
    try:
        start_platform("cpu")
    finally:
        socket.socket.bind = bind
    assert "MASTER_PORT" not in os.environ
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.all_reduce(value, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=10)))
    return value.item()


def test_a_process_alone_takes_no_port() -> None:
    """Catches asking for a free port and binding it later, when another process may have it."""
    assert run_distributed(alone_without_a_network, 1) == [1.0]


def port_in_use() -> tuple[str, float]:
    dist.destroy_process_group()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(other.getsockname()[1]))
        started = time.monotonic()
        with pytest.raises(LaunchError) as refusal:
            start_platform("cpu")
        seconds = time.monotonic() - started
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # `run_distributed` takes it down
    return str(refusal.value), seconds


def test_a_port_in_use_is_one_line_within_seconds() -> None:
    """Catches the page that torch prints of it."""
    ((line, seconds),) = run_distributed(port_in_use, 1)
    assert "\n" not in line and "MASTER_PORT" in line and "in use by another process" in line and seconds < 10


def twice_rank_1(ranks: list[int]) -> str:
    """Three processes of which two are told to be rank 1."""
    from hacl_megatron.platform.agreement import agree, default_store

    own = dist.get_rank()
    with pytest.raises(ValueError) as refusal:
        agree(default_store(), ranks[own], 3, "configuration", {"--lr": "1"})
    return str(refusal.value)


def test_a_rank_that_is_there_twice_is_named_on_all() -> None:
    """Catches a run that waits for the missing rank until its time-out."""
    lines = run_distributed(twice_rank_1, 3, [0, 1, 1])
    assert len({*lines}) == 1 and "two processes are rank 1 (RANK)" in lines[0]
