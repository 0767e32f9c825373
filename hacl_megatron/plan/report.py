"""A plan as text: tables, what binds, and what was assumed."""

from collections.abc import Sequence
from dataclasses import fields

from tabulate import tabulate

from hacl_megatron.assemble.parameters import PARTS
from hacl_megatron.plan.activations import recompute_of
from hacl_megatron.plan.compute import SentBytes
from hacl_megatron.plan.planner import Plan, StageMemory
from hacl_megatron.plan.workload import PUBLISHED_SAMPLES, PackShape, views_and_rows
from hacl_megatron.platform.hardware import GIB
from hacl_megatron.training.sample_cost import row_flops, view_flops

_PUBLISHED_HOURS = {
    ("plain", 4096, 32): ("7B", "pretrain", 3.5),
    ("plain", 5120, 40): ("13B", "pretrain", 5.5),
    ("v1", 4096, 32): ("7B", "finetune", 10.0),
    ("v1", 5120, 40): ("13B", "finetune", 20.0),
}
"""Hours on 8 A100 by template, hidden size and layers: README of haotian-liu/LLaVA (DeepSpeed ZeRO-2 and ZeRO-3)."""

_NOT_MODELLED = (
    "fp8_param_gather", "cpu_offloading", "distribute_saved_activations", "optimizer_cpu_offload",
    "use_precision_aware_optimizer", "nccl_ub",
)  # fmt: skip
"""Fields of megatron-core's configurations that change memory in ways that `state` and `activations` do not know."""


def report(plan: Plan) -> str:
    """Everything about one plan."""
    sections = [_head(plan), _parameters(plan), _memory(plan), _binding(plan), _traffic(plan), _time(plan)]
    return "\n\n".join([*sections, _checkpoints(plan), _assumptions(plan)])


def ranking(plans: Sequence[Plan], count: int = 8) -> str:
    """The best of `suggest_layouts`' plans as a table, best first."""
    if not plans:
        return "No layout of these GPUs fits: more GPUs, or GPUs with more memory, are needed."
    rows = [
        (
            number,
            plan.layout.tp,
            plan.layout.pp,
            plan.layout.dp,
            f"{plan.samples_per_micro_batch:.4g}",
            plan.layout.num_micro_batches,
            recompute_of(plan.config).label,
            f"{plan.memory / GIB:.1f}",
            f"{plan.time.total:.2f}",
            f"{plan.samples_per_second:.1f}",
            _hours(plan.seconds),
        )
        for number, plan in enumerate(plans[:count], 1)
    ]
    head = ("", "TP", "PP", "DP", "micro-batch", "of them", "recompute", "GiB a GPU", "s a step", "samples/s", "run")
    best = plans[0]
    flags = [
        f"--tensor-model-parallel-size {best.layout.tp}",
        f"--pipeline-model-parallel-size {best.layout.pp}",
        *([f"--context-parallel-size {best.layout.cp}"] if best.layout.cp > 1 else []),
        f"--sequence-parallel {str(best.config.parallel.sequence_parallel).lower()}",
        *([f"--vision-parallel {way}"] if (way := best.config.parallel.vision_parallel) else []),
        f"--micro-batch-size {best.layout.micro_batch_size}",
        f"--global-batch-size {best.layout.global_batch_size}",
    ]
    title = f"Layouts that fit: {len(plans)}; the fastest (memory and times are estimates)"
    recompute = {k: v for k, v in best.config.transformer.items() if k.startswith("recompute_")}
    section = (
        f"transformer: {{{', '.join(f'{k}: {v}' for k, v in recompute.items())}}}" if recompute else "no recompute"
    )
    table = tabulate(rows, head, disable_numparse=True, stralign="right")
    return f"{title}\n{table}\nThe first: {' '.join(flags)}, {section}"


def _head(plan: Plan) -> str:
    layout, nodes = plan.layout, plan.layout.world_size / plan.cluster.gpus_per_node
    precision = "bf16" if plan.config.model.bf16 else "fp32"
    how = "images shared out" if plan.config.shares_images else "vision tower split"
    vision = "" if layout.tp == 1 else f", {how} over tensor-parallel ranks"
    micro_batches = f"{layout.num_micro_batches} x {plan.samples_per_micro_batch:.4g}"
    if (tokens := plan.config.training.micro_batch_tokens) is not None:
        micro_batches += f" (on average, of up to {tokens:,} rows)"
    return (
        f"{layout.world_size} x {plan.cluster.gpu_name} ({nodes:g} node{'s' * (nodes != 1)}): "
        f"{layout}, "
        f"{layout.global_batch_size} samples a step, micro-batches {micro_batches}, "
        f"recompute {recompute_of(plan.config).label}, {precision}{vision}"
    )


def _parameters(plan: Plan) -> str:
    rows = [(PARTS[part], f"{trained:,}", f"{frozen:,}") for part, (trained, frozen) in plan.parts.items()]
    totals = [sum(column) for column in zip(*plan.parts.values(), strict=True)]
    rows.append(("total", *(f"{total:,}" for total in totals)))
    return tabulate(
        rows, ("parameters", "trained", "frozen"), disable_numparse=True, colalign=("left", "right", "right")
    )


def _memory(plan: Plan) -> str:
    kinds = [item.name for item in fields(StageMemory)]
    rows = []
    for index, stage in enumerate(plan.stages):
        values = [f"{getattr(stage.memory, kind) / GIB:.2f}" for kind in kinds]
        rows.append((index, stage.layers, stage.micro_batches_in_flight, *values, f"{stage.memory.total / GIB:.1f}"))
    head = ("stage", "layers", "in flight", *kinds, "total")
    note = "GiB a GPU; weights, gradients and optimizer are exact, the rest are estimates"
    return f"{note}\n{tabulate(_merged(rows), head, disable_numparse=True, stralign='right')}"


def _merged(rows: list[tuple]) -> list[tuple]:
    """Neighbouring stages that need the same, as one row."""
    merged: list[tuple] = []
    spans: list[list] = []
    for row in rows:
        if merged and merged[-1][1:] == row[1:]:
            spans[-1].append(row[0])
        else:
            merged.append(row)
            spans.append([row[0]])
    names = [f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans]
    return [(name, *row[1:]) for name, row in zip(names, merged, strict=True)]


def _binding(plan: Plan) -> str:
    stage = plan.stages[plan.fullest].memory
    have, need = plan.cluster.gpu.memory / GIB, plan.memory / GIB
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    time = vars(plan.time)
    slowest = max(time, key=time.__getitem__)
    share = time[slowest] / plan.time.total
    return (
        f"{verdict}: stage {plan.fullest} needs {need:.1f} of {have:.1f} GiB, most of it {stage.largest} "
        f"({getattr(stage, stage.largest) / GIB:.1f}); time goes to {slowest.replace('_', ' ')} ({share:.0%})"
    )


def _traffic(plan: Plan) -> str:
    kinds = [item.name for item in fields(SentBytes) if _is_there(plan, item.name)]
    rows = [
        (kind.replace("_", " "), f"{max(getattr(stage.sent, kind) for stage in plan.stages) / 1e9:,.3f}")
        for kind in kinds
    ]
    return tabulate(rows, ("GB sent a GPU a step", "at most"), disable_numparse=True, colalign=("left", "right"))


def _time(plan: Plan) -> str:
    time = plan.time
    rows = [
        (name.replace("_", " "), f"{value:.3f}", f"{value / time.total:.0%}")
        for name, value in vars(time).items()
        if _is_there(plan, name)
    ]
    rows.append(("step", f"{time.total:.3f}", ""))
    table = tabulate(
        rows, ("seconds a step", "estimate", ""), disable_numparse=True, colalign=("left", "right", "right")
    )
    per_gpu = plan.model_flops / time.total / plan.layout.world_size / 1e12
    nodes = plan.layout.world_size / plan.cluster.gpus_per_node
    images = plan.samples_per_second * plan.samples.image_share * plan.samples.images_per_sample / nodes
    repeated = sum(stage.flops.repeated for stage in plan.stages) / sum(stage.flops.hardware for stage in plan.stages)
    again = f" ({repeated:.0%} of what is computed is computed again)" if repeated else ""
    lines = [
        table,
        f"{plan.model_flops:.3g} model FLOPs a step, {per_gpu:.0f} TFLOP/s a GPU{again}; {plan.samples_per_second:.1f} "
        f"samples/s, {images:.0f} images/s to decode a node",
    ]
    if plan.iterations is None:
        lines.append("run: length unknown; give --num-samples, the entries of --data-path")
    else:
        lines.append(f"run: {plan.iterations:,} iterations, {_hours(plan.seconds)}")
    published = _published(plan)
    return "\n".join([*lines, published] if published else lines)


def _is_there(plan: Plan, kind: str) -> bool:
    return kind != "context_parallel" or plan.layout.cp > 1


def _published(plan: Plan) -> str | None:
    language = plan.config.architecture.language
    found = _PUBLISHED_HOURS.get((plan.config.data.version, language.hidden_size, language.num_layers))
    is_theirs = plan.samples.num_samples in PUBLISHED_SAMPLES.values() and plan.config.objective.contrastive_weight == 0
    if not (found and is_theirs and plan.layout.world_size == 8 and plan.cluster.gpu_name.startswith("a100")):
        return None
    size, stage, hours = found
    return f"published for LLaVA-1.5 {size} {stage} on 8 A100 (DeepSpeed): {hours:g} h"


def _checkpoints(plan: Plan) -> str:
    weights, optimizer = plan.weights_checkpoint / 1e9, plan.optimizer_checkpoint / 1e9
    return f"checkpoint: {weights:.1f} GB weights + {optimizer:.1f} GB optimiser = {weights + optimizer:.1f} GB each"


def _assumptions(plan: Plan) -> str:
    samples, cluster = plan.samples, plan.cluster
    overrides = {**plan.config.transformer, **plan.config.ddp, **plan.config.optimizer_overrides}
    unknown = [name for name in _NOT_MODELLED if overrides.get(name)]
    lines = [
        f"assumed of the data (averages): {samples.text_tokens:g} text rows a dialogue, {samples.target_tokens:g} "
        f"targets, {_images(plan)} in {samples.image_share:.0%}, pairs {samples.pair_share:.0%}, captions of "
        f"{samples.caption_tokens:g} rows, {samples.hallucinated_per_pair:g} hallucinated a pair",
        f"a micro-batch: {_pack('with gradients', plan.micro_batch.main)}"
        + (f"; {_pack('ahead of it, forward only', plan.micro_batch.ahead)}" if plan.micro_batch.ahead else ""),
        f"assumed of the machine: {_efficiency(plan)} in matrix products, "
        f"{cluster.bandwidth_efficiency:.0%} of the links' bandwidth, {cluster.reserve / GIB:g} GiB reserve; "
        "data are never waited for; no saving, no validation",
    ]
    if plan.layout.dp > 1:
        weight = view_flops(plan.config) / row_flops(plan.config)
        lines.append(
            "replicas are taken to have equal work (samples that differ in views are dealt out by it): a view costs "
            f"the tower as much as {weight:,.1f} rows the language model"
        )
    if unknown:
        lines.append(f"not in the plan, although the file sets it: {', '.join(unknown)}")
    return "\n".join(lines)


def _images(plan: Plan) -> str:
    number = plan.samples.images_per_sample
    of_sample = "an image" if number == 1 else f"{number:g} images"
    if plan.config.architecture.tiles is None:
        return of_sample
    views, rows = views_and_rows(plan.config, plan.samples)
    width, height = plan.samples.image_size
    return f"{of_sample} of {width} x {height} pixels ({views} views, {rows:,} rows)"


def _efficiency(plan: Plan) -> str:
    if plan.config.transformer.get("fp8"):
        return f"{plan.cluster.fp8_efficiency:.0%} of the peak FLOP/s of FP8"
    return f"{plan.cluster.compute_efficiency:.0%} of the peak FLOP/s"


def _pack(label: str, pack: PackShape) -> str:
    names = {"dialogue": "dialogues", "image": "image + EOS", "text": "captions", "rejected": "twins"}
    parts = [f"{names[part.kind]} {part.rows / pack.rows:.0%}" for part in pack.segments]
    return f"{pack.rows:,.0f} rows {label} ({', '.join(parts)})"


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.1f} h"
