"""`--vision-parallel` where it is not given: the way in which a planned step takes less time.

The count is of one machine and of the assumed averages of the data, whatever cluster and data are: so every rank of a
run, its dry run and its plan come to the same.
"""

from dataclasses import replace

from hacl_megatron.config.image_sharing import possible_ways
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.plan.planner import Plan, make_plan
from hacl_megatron.plan.workload import Samples, assumed_samples
from hacl_megatron.platform.hardware import Cluster

COUNTED_ON = Cluster(gpu_name="h100-80g", gpus_per_node=8)
CLEARLY = 0.0025
"""By so much of a step's time an estimate must differ to count."""


def with_vision_parallel(config: RunConfig, layout: Layout) -> tuple[RunConfig, str | None]:
    """A checked configuration with `--vision-parallel` filled in; a line for the user, where there was a choice."""
    if layout.tp == 1 or config.parallel.vision_parallel is not None:
        return config, None
    ways = possible_ways(config.architecture, layout.tp)
    if len(ways) == 1:
        return _chosen(config, ways[0]), None
    plans = plans_by_way(config, layout, COUNTED_ON, assumed_samples(config))
    chosen = faster_way(plans)
    others = ", ".join(f"with {way} {plan.time.total:.4g} s" for way, plan in plans.items() if way != chosen)
    return _chosen(config, chosen), (
        f"--vision-parallel {chosen} is chosen: by the plan (plan_run.py's, of {COUNTED_ON.gpu_name}, "
        f"{plans[chosen].micro_batch.main.images:.3g} views of images a micro-batch) a step takes "
        f"{plans[chosen].time.total:.4g} s, {others}"
    )


def _chosen(config: RunConfig, way: str) -> RunConfig:
    parallel = replace(config.parallel, vision_parallel=way)
    return replace(config, parallel=parallel, vision_parallel_is_chosen=True)


def plans_by_way(config: RunConfig, layout: Layout, cluster: Cluster, samples: Samples) -> dict[str | None, Plan]:
    """A plan for each value that `--vision-parallel` may have: the one that is given, or what is possible."""
    given = config.parallel.vision_parallel
    return {
        way: make_plan(
            replace(config, parallel=replace(config.parallel, vision_parallel=way)), layout, cluster, samples
        )
        for way in ([given] if given or layout.tp == 1 else possible_ways(config.architecture, layout.tp))
    }


def faster_way(plans: dict[str, Plan]) -> str:
    """Of those that fit, if any does. The first, which takes less memory, unless another is faster by `CLEARLY`."""
    first, *others = sorted(plans, key=lambda way: not plans[way].fits)
    for way in others:
        if plans[way].fits == plans[first].fits and plans[way].time.total < (1 - CLEARLY) * plans[first].time.total:
            first = way
    return first
