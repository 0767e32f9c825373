"""How a run's processes and samples are divided."""

from dataclasses import dataclass


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
