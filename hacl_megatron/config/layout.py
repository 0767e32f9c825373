"""How a run's processes and samples are divided."""

import os
import socket
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from hacl_megatron.config.checks.require import require
from hacl_megatron.config.console import LaunchError
from hacl_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes and the samples of one optimiser step are divided."""

    world_size: int
    tp: int
    """Tensor-parallel size."""
    pp: int
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel size: ranks that share the rows of a pack."""
    dp: int
    """Data-parallel replicas: world_size / (tp x cp x pp)."""
    micro_batch_size: int
    global_batch_size: int
    num_micro_batches: int | None
    """Micro-batches of one replica in one step: global_batch_size / (micro_batch_size x dp). None with
    `--micro-batch-tokens`: it varies."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Layout":
        """Divide `world_size` processes and the global batch as the flags say.

        Raises:
            ValueError: one of them does not divide; one line.
        """
        tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
        cp = config.parallel.context_parallel_size
        of_replica = tp * cp * pp
        or_cp, flag = (f" x {cp} context-parallel ranks", ", --context-parallel-size") if cp > 1 else ("", "")
        require(
            world_size > 0 and min(tp, cp, pp) > 0 and world_size % of_replica == 0,
            f"{world_size} processes cannot be divided into replicas of {tp} tensor-parallel ranks{or_cp} x {pp} "
            "pipeline stages",
            f"start a multiple of {of_replica}, or change --tensor-model-parallel-size{flag} or "
            "--pipeline-model-parallel-size",
        )
        dp = world_size // of_replica
        micro = config.training.micro_batch_size
        batch = micro * dp if config.training.global_batch_size is None else config.training.global_batch_size
        by_tokens = config.training.micro_batch_tokens is not None
        remedy = f"expected a multiple of {micro * dp}"
        if batch % dp == 0:
            divisors = (size for size in range(min(micro, batch // dp), 0, -1) if batch // dp % size == 0)
            remedy += f", or --micro-batch-size {next(divisors)}"
        require(
            by_tokens or batch % (micro * dp) == 0,
            f"--global-batch-size {batch} is no multiple of --micro-batch-size {micro} x {dp} data-parallel replicas",
            remedy,
        )
        return cls(
            world_size=world_size,
            tp=tp,
            pp=pp,
            cp=cp,
            dp=dp,
            micro_batch_size=micro,
            global_batch_size=batch,
            num_micro_batches=None if by_tokens else batch // (micro * dp),
        )

    def __str__(self) -> str:
        """`tensor x pipeline x data parallel 2 x 1 x 4`."""
        if self.cp == 1:
            return f"tensor x pipeline x data parallel {self.tp} x {self.pp} x {self.dp}"
        return f"tensor x pipeline x data x context parallel {self.tp} x {self.pp} x {self.dp} x {self.cp}"


def iterations_of_epochs(epochs: float, num_samples: int, batch: int, *, done: int = 0, drawn: int = 0) -> int:
    """The iteration at which `epochs` passes over `num_samples` are drawn, where `done` iterations have drawn `drawn`.

    Never less than `done`. 4 epochs of 16 samples, half of them drawn in 4 iterations of 8, the rest in 2 of 16: 6.
    """
    wanted = Fraction(str(epochs)) * num_samples  # as written: the float 1.1 times 10 is more than 11
    return done + max(0, ceil((wanted - drawn) / batch))


def launched_as() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, as a launcher (torchrun) has set them; None for a process alone.

    Raises:
        LaunchError: a variable is missing, no number, or out of its bounds.
    """
    found = {name: value for name in ("RANK", "WORLD_SIZE") if (value := os.environ.get(name, "").strip())}
    if not found or found == {"WORLD_SIZE": "1"}:
        return None
    world_size, rank = _whole("WORLD_SIZE", 1), _whole("RANK", 0)
    if rank >= world_size:
        raise LaunchError(f"RANK is {rank}, WORLD_SIZE {world_size}: expected a rank below it; {_REMEDY}")
    if "LOCAL_RANK" in os.environ:
        _whole("LOCAL_RANK", 0)
    if world_size == 1:  # nobody to meet
        return None
    port = _whole("MASTER_PORT", 1)
    if port >= 1 << 16:
        raise LaunchError(f"MASTER_PORT is {port}, expected a port, 1 to 65535; {_REMEDY}")
    host = os.environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise LaunchError(f"MASTER_ADDR is not set, but RANK is: expected rank 0's host; {_REMEDY}")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"MASTER_ADDR is {host!r}, which is no host that is known here ({error}); {_REMEDY}"
        ) from None
    return rank, world_size


_REMEDY = "start with torchrun, which sets it, or set it as torch.distributed's env:// wants it"


def _whole(name: str, least: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        others = [other for other in ("RANK", "WORLD_SIZE") if other != name and other in os.environ]
        raise LaunchError(f"{name} is not set, but {' and '.join(others)} is: expected a number; {_REMEDY}")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise LaunchError(f"{name} is {text[:40]!r}, expected a whole number from {least} on; {_REMEDY}")
    return int(text)


def world_size_from_environment() -> int:
    """Number of processes torchrun started; 1 without torchrun.

    Raises:
        LaunchError: see `launched_as`.
        ValueError: Slurm started several processes without torchrun; each would train alone, over the others' files.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and tasks != "1" and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks without torchrun: start one torchrun a node (srun -n NODES torchrun …)"
        )
    place = launched_as()
    return 1 if place is None else place[1]
