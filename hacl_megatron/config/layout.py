"""How a run's processes and samples are divided."""

import os
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from hacl_megatron.config.checks.require import require
from hacl_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the processes and the samples of one optimiser step are divided."""

    world_size: int
    tp: int
    """Tensor-parallel size."""
    pp: int
    """Pipeline stages."""
    dp: int
    """Data-parallel replicas: world_size / (tp x pp)."""
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
        require(
            world_size > 0 and min(tp, pp) > 0 and world_size % (tp * pp) == 0,
            f"{world_size} processes cannot be divided into replicas of {tp} tensor-parallel ranks x {pp} pipeline "
            "stages",
            f"start a multiple of {tp * pp}, or change --tensor-model-parallel-size or --pipeline-model-parallel-size",
        )
        dp = world_size // (tp * pp)
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
            dp=dp,
            micro_batch_size=micro,
            global_batch_size=batch,
            num_micro_batches=None if by_tokens else batch // (micro * dp),
        )


def iterations_of_epochs(epochs: float, num_samples: int, batch: int, *, done: int = 0, drawn: int = 0) -> int:
    """The iteration at which `epochs` passes over `num_samples` are drawn, where `done` iterations have drawn `drawn`.

    Never less than `done`. 4 epochs of 16 samples, half of them drawn in 4 iterations of 8, the rest in 2 of 16: 6.
    """
    wanted = Fraction(str(epochs)) * num_samples  # as written: the float 1.1 times 10 is more than 11
    return done + max(0, ceil((wanted - drawn) / batch))


def world_size_from_environment() -> int:
    """Number of processes torchrun started; 1 without torchrun.

    Raises:
        ValueError: Slurm started several processes without torchrun; each would train alone, over the others' files.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and tasks != "1" and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks without torchrun: start one torchrun a node (srun -n NODES torchrun …)"
        )
    return int(os.environ.get("WORLD_SIZE", 1))
