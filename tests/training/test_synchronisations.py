"""A step waits for its device once, to read its numbers: counted per layout and objective on real steps.

`tests.device_watch` says what counts as waiting.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from hacl_megatron.assemble.start_from import resolve_architecture
from hacl_megatron.batch import StepBatches
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import parse_run_config, with_architecture
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.platform import host_groups
from hacl_megatron.platform.processes import start_platform
from hacl_megatron.training.build import build_trainer
from hacl_megatron.training.optimizer.schedule import optimizer_parts
from hacl_megatron.training.trainee import Trainee
from tests.device_watch import HOST, DeviceWatch
from tests.distributed import run_distributed
from tests.selection import selected
from tests.training.runs import layout_flags, make_inputs

STEPS = 2
OBJECTIVES = {
    "one pool": ["--micro-batch-size", "4"],
    "each micro-batch": [
        "--micro-batch-size", "2", "--contrastive-negatives", "micro-batch", "--hallucination-negatives", "own",
    ],
    "full queue": ["--micro-batch-size", "2", "--contrastive-negatives", "queue", "--queue-size", "6"],
    "prompt": ["--micro-batch-size", "2", "--contrastive-image-context", "prompt"],
    "LoRA": ["--micro-batch-size", "2", "--lora-rank", "2"],
}  # fmt: skip
CASES = {
    "tp1": tuple(OBJECTIVES),
    "dp2-dist": ("one pool", "each micro-batch", "full queue"),
    "tp2-sp": ("prompt", "LoRA"),
    "pp2": ("one pool", "full queue"),
    "cp2": ("one pool", "prompt"),
    "pp2-dp2": ("each micro-batch", "prompt"),
    "tp2-pp2-sp": ("full queue",),
}
"""The objectives that are watched at each layout."""


def watched_steps(folder: str, stage: str, flags: list[str]) -> list[list[str]]:
    """What waits in each step of this rank, as trained by `Trainer` itself."""
    config = parse_run_config(["--config", f"{folder}/{stage}.yaml", "--train-iters", str(STEPS), *flags])
    layout = check_flags(config, dist.get_world_size())
    config = with_architecture(config, resolve_architecture(config, None))
    begins: list[int] = []
    with mock.patch.object(host_groups, "takes_host_tensors", return_value=False):  # groups for hosts alone, as on GPUs
        trainer = build_trainer(config, layout, None, start_platform("cpu"))
    groups = trainer.run.groups
    of_hosts = {group.group_name for group in (groups.mp_host, groups.dp_host, groups.replica_host)}
    watch = DeviceWatch(device_tensors(trainer.trainee), of_hosts)
    trainer.beat = lambda: begins.append(len(watch.events))
    if trainer.loader is not None:
        trainer.loader = _OnHost(trainer.loader, watch)
    with watch.watches():
        trainer.train()
    if trainer.loader is not None:
        trainer.loader.steps.close()
    trainer.close()
    parallel_state.destroy_model_parallel()
    return [watch.events[begin:end] for begin, end in pairwise(begins[: STEPS + 1])]  # behind them it saves


@dataclass
class _OnHost:
    """A loader whose tensors `watch` knows to be on the host."""

    steps: StepLoader
    watch: DeviceWatch

    def __iter__(self) -> Iterator[StepBatches]:
        for step in self.steps:
            for batch in step.micro_batches:
                for pack in (batch.main, batch.ahead):
                    for value in vars(pack).values() if pack is not None else ():
                        if isinstance(value, Tensor):
                            self.watch.put(value, HOST)
            yield step

    @property
    def wait_seconds(self) -> float:
        return self.steps.wait_seconds


def device_tensors(trainee: Trainee) -> Iterator[Tensor]:
    """Weights, gradients and what the optimiser made of them; the queue."""
    if trainee.queue is not None:
        yield trainee.queue.pairs.image  # an empty queue's three fields are one tensor
    for parameter in trainee.module.parameters():
        yield parameter
        if parameter.requires_grad:
            yield parameter.main_grad
    yield from trainee.module.buffers()
    for module in trainee.module.modules():  # megatron-core keeps some constants that are no buffers
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
    for buffer in trainee.model.buffers:
        yield from (part for part in (buffer.param_data, buffer.grad_data) if part is not None)
    for part in optimizer_parts(trainee.optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def watched_cases(folder: str, layouts: list[str]) -> dict[tuple[str, str], list[list[str]]]:
    return {
        (layout, objective): watched_steps(folder, "finetune", [*layout_flags(layout)[1], *OBJECTIVES[objective]])
        for layout in layouts
        for objective in CASES[layout]
    }


@pytest.fixture(scope="module")
def watched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[list[list[str]]]]:
    """By layout and objective: of each rank and step, what waits."""
    folder = make_inputs(tmp_path_factory.mktemp("synchronisations"))
    by_size: dict[int, list[str]] = {}
    for layout in selected(request, "layout", tuple(CASES)):
        by_size.setdefault(layout_flags(layout)[0], []).append(layout)
    found: dict[tuple[str, str], list[list[list[str]]]] = {}
    for size, layouts in by_size.items():
        of_ranks = run_distributed(watched_cases, size, str(folder), layouts)
        found |= {case: [of_rank[case] for of_rank in of_ranks] for case in of_ranks[0]}
    return found


@pytest.mark.parametrize("layout, objective", [(layout, name) for layout in CASES for name in CASES[layout]])
def test_a_step_reads_its_numbers_back_once(watched: dict, layout: str, objective: str) -> None:
    for rank, steps in enumerate(watched[layout, objective]):
        assert len(steps) == STEPS
        for step, events in enumerate(steps, 1):
            assert len(events) == 1 and "tolist in" in events[0] and "training/step.py" in events[0], (
                f"rank {rank}, step {step}: {len(events)}, {Counter(events).most_common()}"
            )
