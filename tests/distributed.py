"""Run a function on several real gloo processes inside pytest.

Processes come from a fork server that has imported torch, megatron-core, the trainer and the tiny models' classes once,
so that a group of ranks starts in a fraction of a second instead of paying the imports again.
"""

import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TIMEOUT_S = 300
# A CUDA context does not survive a fork, and megatron-core opens one on import; so with a GPU each rank imports anew.
context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if context.get_start_method() == "forkserver":
    context.set_forkserver_preload(["torch.distributed.run", "megatron.core", "pytest", "tests.training.runs"])


def _free_port() -> int:
    """Below those that the system hands out to whoever asks, gloo's own sockets among them; each process of tests has a
    thousand of its own, so that two never take the same."""
    first = 16_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(first, first + 1_000)  # tests seed the other
        with socket.socket() as found:
            try:
                found.bind(("localhost", port))
            except OSError:
                continue
            return port


def _rank_main(rank: int, world_size: int, port: int, function: Callable, args: tuple, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        outcome = ("ok", function(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(outcome, file)
    if outcome[0] == "error":  # the others may wait in a collective: leave at once so that gloo tells them
        os._exit(1)
    torch.distributed.destroy_process_group()


def leave_groups() -> None:
    """On all ranks at once: take apart what one case has made, all groups but that of all ranks.

    Three threads stand behind each gloo group, one of which wakes up a hundred times a second, for as long as its
    process lives: hundreds of cases in one process would leave the machine little time for anything else.
    """
    from megatron.core import parallel_state

    torch.distributed.barrier()
    world = torch.distributed.group.WORLD
    for group in [group for group in torch.distributed.distributed_c10d._world.pg_map if group is not world]:
        torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def run_distributed(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world_size` gloo ranks with `torch.distributed` initialised.

    Returns each rank's return value, rank 0 first. `function` must be a module-level function; raises
    AssertionError with the first failing rank's traceback when a rank fails or hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, port, function, args, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S)
        hung = [process for process in ranks if process.is_alive()]
        for process in hung:
            process.kill()
        outcomes = {
            int(path.stem): pickle.loads(path.read_bytes())  # written by our own children just now
            for path in Path(folder).glob("*.pkl")
        }
    # A rank whose peer died reports a lost connection; the reason is on a rank that reports something else.
    errors = {rank: text for rank, (status, text) in outcomes.items() if status == "error"}
    if errors:
        first = min(errors, key=lambda rank: ("Connection" in errors[rank] or "gloo" in errors[rank], rank))
        raise AssertionError(f"rank {first} of {world_size} failed:\n{errors[first]}")
    assert not hung and len(outcomes) == world_size, f"ranks answered: {sorted(outcomes)} of {world_size}"
    return [outcomes[rank][1] for rank in range(world_size)]
