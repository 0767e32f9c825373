"""`--dry-run`: builds the parts of a run of any size in one process, on meta tensors and a fake process group.

What a rank builds is built here by the same code: the model's stage, the data-parallel wrap with its buffers, the
optimiser and the schedule. Nothing takes memory, nothing is loaded, no collective does anything. So what megatron-core
or this trainer refuses is refused on a laptop, seconds after it was written down.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tabulate import tabulate

from hacl_megatron.assemble.module import build_module
from hacl_megatron.assemble.parameters import PARTS, layers_by_stage, part_of
from hacl_megatron.assemble.processes import initialize_parallelism
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.plan.planner import make_plan
from hacl_megatron.plan.workload import assumed_samples
from hacl_megatron.platform.hardware import GIB, GPUS, Cluster
from hacl_megatron.platform.processes import prepare_device
from hacl_megatron.training.trainee import build_trainee

PACKAGE = Path(__file__).parents[1]
META = torch.device("meta")


def dry_run(config: RunConfig, layout: Layout, *, rank: int | None = None) -> str:
    """Build `rank`'s part, or one rank of each kind of pipeline stage; returns what to tell the user.

    Raises:
        ValueError: there is no such rank.
    """
    if rank is not None and rank >= layout.world_size:
        raise ValueError(f"--dry-run-rank is {rank}, expected less than --world-size {layout.world_size}; change it")
    prepare_device(torch.device("cpu"))  # megatron-core's CUDA calls get host meanings; META is where tensors go
    ranks = [rank] if rank is not None else _one_of_each_kind(config, layout)
    counts = {one: _build(config, layout, one) for one in ranks}
    lines = [
        f"{layout} = {layout.world_size} processes, "
        f"{layout.global_batch_size} samples a step, micro-batches {_micro_batches(config, layout)} a replica",
        _table(counts, config, layout),
        _trained(counts),
        *_memory(config, layout),
    ]
    return "\n".join(lines)


def _micro_batches(config: RunConfig, layout: Layout) -> str:
    if layout.num_micro_batches is None:
        return f"of up to {config.training.micro_batch_tokens:,} rows"
    return f"{layout.num_micro_batches} x {layout.micro_batch_size}"


def _one_of_each_kind(config: RunConfig, layout: Layout) -> list[int]:
    """First rank of the first pipeline stage, of the last, and of every other that differs in its layers.

    Tensor- and data-parallel ranks of one stage build the same shapes.
    """
    layers = layers_by_stage(config.parallel, config.architecture.language.num_layers)
    kinds = {
        (stage == 0, stage == layout.pp - 1, layers[stage]): stage for stage in reversed(range(layout.pp))
    }  # fmt: skip
    return [stage * layout.tp * layout.cp * layout.dp for stage in sorted(kinds.values())]


def _build(config: RunConfig, layout: Layout, rank: int) -> dict[str, tuple[int, int]]:
    """(trained, frozen) parameters of this rank, by part."""
    with _as_rank(rank, layout.world_size), _refusals_in_one_line(rank):
        groups = initialize_parallelism(config, layout)
        module = build_module(config, groups, META)
        build_trainee(module, config, config.training.train_iters or 1)
        counts: dict[str, list[int]] = {}
        for name, parameter in module.named_parameters():
            assert parameter.device == META, name
            counts.setdefault(part_of(name), [0, 0])[not parameter.requires_grad] += parameter.numel()
    return {part: (counts[part][0], counts[part][1]) for part in PARTS if part in counts}


@contextmanager
def _refusals_in_one_line(rank: int) -> Iterator[None]:
    """What megatron-core refuses, as this project's errors are; it raises these four kinds, often without a message."""
    try:
        yield
    except (ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and Path(frame.filename).is_relative_to(PACKAGE):
            raise ValueError(f"rank {rank} cannot be built: {error}") from error
        reason = str(error) or f"{type(error).__name__}, {frame.line}"
        raise ValueError(
            f"rank {rank} cannot be built: {reason} ({Path(frame.filename).name}, line {frame.lineno}); change the "
            "flag or the transformer:, ddp: or optimizer: section that this is about"
        ) from error


@contextmanager
def _as_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process is one of `world_size`, which exist in name only, and creates tensors without memory."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a dry run makes its own process group"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    new_group, type_of = dist.new_group, torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, dtype=None, *args, **kwargs):
        """The optimisers take only tensors that say they are CUDA's."""
        return type_of(tensor).replace(".meta.", ".cuda.") if dtype is None else type_of(tensor, dtype, *args, **kwargs)

    try:
        with (
            mock.patch.object(torch.cuda, "current_device", lambda: META),
            # megatron-core asks for gloo groups by name beside the others
            mock.patch.object(dist, "new_group", lambda **options: new_group(**{**options, "backend": "fake"})),
            mock.patch.object(torch.Tensor, "type", cuda_type),
            META,
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _table(counts: dict[int, dict[str, tuple[int, int]]], config: RunConfig, layout: Layout) -> str:
    layers = layers_by_stage(config.parallel, config.architecture.language.num_layers)
    columns = [part for part in PARTS if part != "lora" or config.lora.lora_rank is not None]
    rows = []
    for rank, parts in counts.items():
        stage = rank // (layout.tp * layout.cp * layout.dp)
        trained, frozen = (sum(column) for column in zip(*parts.values(), strict=True))
        each = [f"{sum(parts[part]):,}" if part in parts else "" for part in columns]
        rows.append((rank, stage, layers[stage], *each, f"{trained:,}", f"{frozen:,}"))
    head = ("rank", "stage", "layers", *(PARTS[part] for part in columns), "trained", "frozen")
    return "parameters of one rank:\n" + tabulate(rows, head, disable_numparse=True, stralign="right")


def _trained(counts: dict[int, dict[str, tuple[int, int]]]) -> str:
    parts = [part for part in PARTS if any(part in one and one[part][0] for one in counts.values())]
    return f"would train: {', '.join(PARTS[part] for part in parts) or 'nothing on this rank'}"


def _memory(config: RunConfig, layout: Layout) -> list[str]:
    """The planned memory, and a warning where no known GPU has as much."""
    name, largest = max(GPUS.items(), key=lambda item: item[1].memory)
    cluster = Cluster(gpu_name=name, gpus_per_node=8)
    plan = make_plan(config, layout, cluster, assumed_samples(config))
    need = f"{plan.memory / GIB:.0f} GiB a GPU (estimate, stage {plan.fullest})"
    if plan.fits:
        able = {name: gpu for name, gpu in GPUS.items() if gpu.fp8_flops or not config.transformer.get("fp8")}
        fitting = [name for name, gpu in able.items() if plan.memory <= gpu.memory]
        return [f"memory: {need}; fits {', '.join(fitting)}"]
    return [
        f"warning: {need} is more than the {largest.memory / GIB:.0f} GiB of {name}; see layouts that fit with "
        "python tools/plan_run.py --suggest"
    ]
