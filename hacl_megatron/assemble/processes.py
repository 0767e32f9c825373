"""megatron-core's process groups: those of a run, and those of a model that is loaded to run forward alone."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from hacl_megatron.assemble.run import Run
from hacl_megatron.assemble.same_run import facts_of
from hacl_megatron.config.layout import Layout, world_size_from_environment
from hacl_megatron.config.run import RunConfig
from hacl_megatron.platform.host_groups import Groups
from hacl_megatron.platform.processes import start_platform


def initialize_parallelism(config: RunConfig, layout: Layout) -> Groups:
    """Create megatron-core's process groups and seed every rank's generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    return Groups.of_parallel_state(config.parallel.distributed_timeout_minutes)


def draw_apart(config: RunConfig, groups: Groups) -> None:
    """From here on each context-parallel rank drops out by masks of its own, as its rows are.

    Not before the model is built: its first values are the same on all of them.
    """
    if groups.cp.rank() > 0:
        model_parallel_cuda_manual_seed(config.training.seed + (groups.cp.rank() << 32))


@contextlib.contextmanager
def joined_processes(config: RunConfig, world_size: int | None = None) -> Iterator[Run]:
    """This process as part of megatron-core's groups, as long as the context lasts.

    Args:
        world_size: default: the number of processes that torchrun started.

    Raises:
        ValueError: the processes cannot be divided as the flags say, or the device is not there.
    """
    layout = Layout.of(config, world_size or world_size_from_environment())
    joined_already = dist.is_initialized()
    facts = facts_of(config) if layout.world_size > 1 else None
    device = start_platform(config.parallel.device, tensor_parallel=layout.tp, context_parallel=layout.cp, facts=facts)
    groups = initialize_parallelism(config, layout)
    yield Run(config=config, layout=layout, groups=groups, device=device)
    # Not after a failure: the other ranks may hang in a collective then, and all that helps is to leave.
    parallel_state.destroy_model_parallel()
    if not joined_already:
        dist.destroy_process_group()
