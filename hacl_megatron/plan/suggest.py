"""Tries every layout that a cluster allows and ranks those that fit by speed."""

import contextlib
import copy
import io
from collections.abc import Iterator

from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.plan.planner import Plan
from hacl_megatron.plan.vision_parallel import faster_way, plans_by_way
from hacl_megatron.plan.workload import Samples
from hacl_megatron.platform.hardware import Cluster

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def suggest_layouts(config: RunConfig, world_size: int, cluster: Cluster, samples: Samples) -> list[Plan]:
    """Plans of every layout with `config`'s global batch that fits, fastest first; of equals, the one with most room.

    Tensor-parallel sizes stay inside a node and are sequence parallel; pipeline stages are even; micro-batches are
    powers of two; activations are recomputed in every layer or in none. Everything else stays as it is, the
    context-parallel size too.

    Raises:
        ValueError: `world_size` cannot be divided by that size.
    """
    plans = []
    for candidate in _candidates(config, world_size, cluster.gpus_per_node):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # notes on each of a hundred candidates help nobody
                layout = check_flags(candidate, world_size, files=False)
            check_architecture(candidate, layout)
        except ValueError:
            continue
        ways = plans_by_way(candidate, layout, cluster, samples)
        plan = ways[faster_way(ways)]
        if plan.fits:
            plans.append(plan)
    return sorted(plans, key=lambda plan: (-round(plan.samples_per_second, 3), plan.memory))


def _candidates(config: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[RunConfig]:
    num_layers = config.architecture.language.num_layers
    context = config.parallel.context_parallel_size
    if world_size % context:
        alone = copy.deepcopy(config)
        alone.parallel.tensor_model_parallel_size = alone.parallel.pipeline_model_parallel_size = 1
        Layout.of(alone, world_size)  # refuses it
    world_size //= context
    batch = config.training.global_batch_size or config.training.micro_batch_size * world_size
    for tp in _powers_of_two(min(gpus_per_node, world_size)):
        for pp in range(1, min(world_size // tp, num_layers) + 1):
            if world_size % (tp * pp) or num_layers % pp:
                continue
            for micro_batch_size in _powers_of_two(max(1, batch * tp * pp // world_size)):
                for recompute in ({}, FULL_RECOMPUTE):
                    candidate = copy.deepcopy(config)
                    parallel = candidate.parallel
                    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size = tp, pp
                    parallel.sequence_parallel = tp > 1
                    parallel.decoder_first_pipeline_num_layers = parallel.decoder_last_pipeline_num_layers = None
                    candidate.training.global_batch_size = batch
                    candidate.training.micro_batch_size = micro_batch_size
                    candidate.training.micro_batch_tokens = None
                    others = {k: v for k, v in config.transformer.items() if not k.startswith("recompute_")}
                    candidate.transformer = {**others, **recompute}
                    yield candidate


def _powers_of_two(largest: int) -> Iterator[int]:
    size = 1
    while size <= largest:
        yield size
        size *= 2
