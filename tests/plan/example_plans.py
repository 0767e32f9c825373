"""Plans of the shipped examples, for the tests of plans and of dry runs."""

from pathlib import Path

import yaml

from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import RunConfig, from_yaml
from hacl_megatron.plan.planner import Plan, make_plan
from hacl_megatron.plan.workload import MicroBatchShape, assumed_samples
from hacl_megatron.platform.hardware import Cluster

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "llava_1_5"


def example(name: str) -> RunConfig:
    return from_yaml((EXAMPLES / f"{name}.yaml").read_text(), name)


def plan_of(
    config: RunConfig,
    world_size: int,
    gpu: str = "a100-80g",
    micro_batch: MicroBatchShape | None = None,
    **assumed: float,
) -> Plan:
    layout = check_flags(config, world_size, files=False)
    check_architecture(config, layout)
    cluster, samples = Cluster(gpu_name=gpu, gpus_per_node=8, **assumed), assumed_samples(config)
    return make_plan(config, layout, cluster, samples, micro_batch)


def seventy_billion() -> dict:
    """The 7B example with Llama-2 70B's sizes (grouped-query attention)."""
    values = yaml.safe_load((EXAMPLES / "finetune_7b.yaml").read_text())
    values["model"]["language"].update(
        {"num-layers": 80, "hidden-size": 8192, "ffn-hidden-size": 28672, "num-attention-heads": 64,
         "num-query-groups": 8}
    )  # fmt: skip
    return values
