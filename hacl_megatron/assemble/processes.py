"""megatron-core's process groups of a run."""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig


def initialize_parallelism(config: RunConfig, layout: Layout) -> ProcessGroupCollection:
    """Create megatron-core's process groups and seed every rank's generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    return ProcessGroupCollection.use_mpu_process_groups()
