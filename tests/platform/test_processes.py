"""How a process joins its group: alone without a port, and what is said where the launcher's address is of no use."""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.config.console import LaunchError
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.train import run
from tests.distributed import leave_groups, run_distributed
from tests.training.runs import layout_flags, make_inputs

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


def names_put_while_pictures_are_read(command: list[str]) -> list[tuple[set[str], set[str]]]:
    """Of a fresh run and of one that resumes: the environment variables that were set, and those of them that were new,
    from when its loader's threads start."""
    from hacl_megatron.training import build

    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]
    given: set[str] = set()
    new: set[str] = set()
    reading = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if reading and event == "os.putenv":
            given.add(name := os.fsdecode(arguments[0]))
            if name not in os.environ:
                new.add(name)

    sys.addaudithook(hear)
    open_loader = build.open_loader

    def open_and_hear(*arguments: Any, **named: Any) -> Any:
        nonlocal reading
        reading = True
        return open_loader(*arguments, **named)

    build.open_loader = open_and_hear
    found = []
    for steps in ("1", "2"):
        run([*command, "--train-iters", steps])
        leave_groups()
        found.append(({*given}, {*new}))
        given.clear(), new.clear()
        reading = False
    return found


def test_no_variable_is_added_while_threads_read_pictures(tmp_path: Path) -> None:
    """Catches the environment being moved under libjpeg, which looks into it at every picture: a crash once in some
    hundred starts. megatron-core sets three when the model is made, and a resumed run one."""
    folder = make_inputs(tmp_path)
    command = ["--config", str(folder / "pretrain.yaml"), *layout_flags("tp1")[1], "--save", str(folder / "run")]
    command += ["--load", str(folder / "run")]
    [[fresh, resumed]] = run_distributed(names_put_while_pictures_are_read, 1, command)
    assert "NVTE_FLASH_ATTN" in fresh[0] and "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" in resumed[0]
    assert fresh[1] == resumed[1] == set()
