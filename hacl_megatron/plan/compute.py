"""FLOPs, bytes sent and seconds of one optimiser step: estimates.

FLOPs are counted as `training.flops` does (2 per multiply-add of matrix products; forward once, input gradients once,
weight gradients once where they train) but by pipeline stage, and with what is computed twice beside them. Rank order
is megatron-core's: tensor-parallel ranks are neighbours, then context-parallel, data-parallel, then pipeline stages.
"""

import math
from dataclasses import dataclass

from hacl_megatron.assemble.parameters import PlannedParameter, layers_by_stage
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import Lora
from hacl_megatron.config.run import RunConfig
from hacl_megatron.plan.activations import recompute_of
from hacl_megatron.plan.image_parts import image_ranks, sent_for_images
from hacl_megatron.plan.state import FP32, StateBytes
from hacl_megatron.plan.workload import MicroBatchShape, Segments
from hacl_megatron.platform.hardware import Cluster
from hacl_megatron.training.flops import lora_flops, view_flops


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """FLOPs of one micro-batch on one pipeline stage, over all its tensor- and context-parallel ranks."""

    model: float
    repeated: float
    """Forward passes of recomputed layers, the tower's too, and of attention among context-parallel ranks, what
    gradient caching runs ahead of the main pass, and the connector on each of the tensor-parallel ranks that split the
    tower."""
    waited: float = 0.0
    """What ranks could compute while they wait for the one with most images, where they share these out."""

    @property
    def hardware(self) -> float:
        return self.model + self.repeated


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """Bytes that one GPU sends in one optimiser step."""

    tensor_parallel: float
    context_parallel: float
    """Keys and values of every layer, rows of images, and rows that losses are made of; and the gradients of each."""
    pipeline: float
    data_parallel: float
    contrastive: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step, by what it is spent on (the slowest stage)."""

    compute: float
    weights: float
    """Reading the weights in every pass and adding up their gradients, once a micro-batch: what small ones cost."""
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    """Sending between stages."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""
    data_parallel: float
    contrastive: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def stage_flops(config: RunConfig, micro_batch: MicroBatchShape, stage: int) -> StageFlops:
    """Of one micro-batch on pipeline stage `stage`."""
    model, parallel = config.architecture, config.parallel
    language = model.language
    stages = parallel.pipeline_model_parallel_size
    layers = layers_by_stage(parallel, language.num_layers)[stage]
    is_first, is_last = stage == 0, stage == stages - 1
    passes = 2 if config.language_model_is_frozen else 3
    main, recompute = micro_batch.main, recompute_of(config)
    last, lora = layers - 1 if is_last else None, Lora.of(config.lora)

    def of_layers(segments: tuple[Segments, ...], passes: int, first: int = 0, end: int = layers) -> float:
        return sum(_layer_flops(model, segments, passes, lora, reads=index == last) for index in range(first, end))

    total = of_layers(main.segments, passes)
    repeated = waited = 0.0
    if recompute.granularity == "full":
        end = min(recompute.num_layers, layers) if recompute.method == "block" else layers
        repeated += of_layers(main.segments, 1, end=end)
    if parallel.context_parallel_size > 1:  # attention gathers and runs once more backward
        repeated += sum(_scores_flops(model, main.segments, reads=index == last) for index in range(layers))
    total += of_layers(micro_batch.runs_once_ahead, 1)
    repeated += of_layers(micro_batch.runs_twice, 1)
    if is_first:
        tower_trained, qformer_trained = not config.model.freeze_ViT, not config.model.freeze_qformer
        runs_ahead = micro_batch.ahead is not None and micro_batch.ahead.image_rows > 0
        trains = {"trained": tower_trained, "trains_qformer": qformer_trained}
        once = sum(view_flops(model, **trains))
        tower, connector = view_flops(model, **trains, again=runs_ahead, recompute=config.recomputes_tower)
        total += once * main.images
        repeated += (tower + connector - once) * main.images
        ranks = image_ranks(config)
        if ranks > 1:
            everyone = ranks * parallel.context_parallel_size
            waited = (tower + connector) * (_places(main.images, everyone) - main.images)
        else:
            repeated += connector * main.images * (parallel.tensor_model_parallel_size - 1)
    if is_last:
        total += 2 * main.target_rows * language.hidden_size * language.vocab_size * passes
    return StageFlops(model=total, repeated=repeated, waited=waited)


def _places(images: float, ranks: int) -> float:
    """What as many ranks as these have time for, when the one with most images is through: ranks times its images.

    Of an average: micro-batches are dealt out evenly, so each is taken to have the whole number below it or above it.
    Nine samples of which 94 % have an image (8.46), over 8 ranks: 11.7, where a step's balanced micro-batches have
    12.0, unbalanced ones 12.4, and the average itself, rounded up, 16.
    """
    below = math.floor(images)
    fewer, more = (math.ceil(number / ranks) * ranks for number in (below, below + 1))
    return fewer + (images - below) * (more - fewer)


def _layer_flops(
    model: ModelConfig, segments: tuple[Segments, ...], passes: int, lora: Lora | None, *, reads: bool
) -> float:
    """One layer over `segments`; `reads`: the last, which goes on with the read rows alone behind keys and values.

    Scores and values of attention cost the backward pass twice the forward, whatever trains.
    """
    language = model.language
    width = language.head_dim * language.num_attention_heads
    keys = 2 * language.hidden_size * language.head_dim * language.num_query_groups
    rest = 2 * language.hidden_size * width + 3 * language.hidden_size * language.ffn_hidden_size
    linear = adapters = 0.0
    for part in segments:
        asking = part.read if reads else part.length
        linear += part.count * (part.length * keys + asking * rest)
        if lora is not None:
            each = lora_flops(model, lora, part.length, asking)
            adapters += part.count * (each if passes > 1 else each / 3)
    attention = _scores_flops(model, segments, reads=reads)
    return 2 * passes * linear + adapters + attention * (3 if passes > 1 else 1)


def _scores_flops(model: ModelConfig, segments: tuple[Segments, ...], *, reads: bool) -> float:
    """Scores and values of one layer's attention, forward once."""
    width, seen = model.language.head_dim * model.language.num_attention_heads, 0.0
    for part in segments:
        asking = part.read if reads else part.length
        # The last query sees its whole segment, the one before it a row less; a branch's see its prefix besides.
        prefix = part.context - part.length if part.context else 0
        seen += part.count * asking * (part.length - (asking - 1) / 2 + prefix)
    return 4 * width * seen


def sent_bytes(
    config: RunConfig,
    layout: Layout,
    micro_batch: MicroBatchShape,
    stage: int,
    parameters: list[PlannedParameter],
) -> SentBytes:
    """By ring algorithms: an all-gather or reduce-scatter of n bytes over r ranks sends n (r - 1) / r a rank."""
    e, model = 2 if config.model.bf16 else 4, config.architecture
    tp, cp, dp, hidden = layout.tp, layout.cp, layout.dp, model.language.hidden_size
    layers = layers_by_stage(config.parallel, model.language.num_layers)[stage]
    rows = micro_batch.main.rows * e * hidden / cp
    ahead = micro_batch.ahead.rows * e * hidden / cp if micro_batch.ahead is not None else 0.0
    # Each layer: one all-reduce (or a gather and a scatter) behind attention and MLP, forward and backward each.
    recomputes = recompute_of(config).granularity
    passes = 2 + (recomputes == "full")
    tensor = layers * 2 * 2 * (passes * rows + ahead) * (tp - 1) / tp * layout.num_micro_batches
    if stage == 0:
        of_images, once = sent_for_images(config, micro_batch, parameters, e)
        tensor += of_images * layout.num_micro_batches + once
    # Keys and values are gathered in every pass, backward too, where their gradients are scattered besides.
    pairs = 2 * model.language.head_dim * model.language.num_query_groups / tp / hidden
    gathers = 2 + (recomputes == "full" or "core_attn" in recompute_of(config).modules * (recomputes == "selective"))
    context = layers * pairs * ((gathers + 1) * rows + ahead) * (cp - 1) * layout.num_micro_batches
    # Features of images, and what becomes logits or embeddings: an all-reduce forward and one backward.
    is_first, is_last = stage == 0, stage == layout.pp - 1
    placed = is_first * micro_batch.main.image_rows + is_last * (micro_batch.main.target_rows + micro_batch.eos_rows)
    context += 2 * 2 * placed * e * hidden * (cp - 1) / cp * layout.num_micro_batches
    to_next, to_previous = stage < layout.pp - 1, stage > 0
    shard = tp if config.parallel.sequence_parallel else 1
    pipeline = ((to_next + to_previous) * rows + to_next * ahead) / shard * layout.num_micro_batches
    trained = [p for p in parameters if p.trained]
    gradients = sum(p.numel for p in trained) * FP32
    gathered = sum(p.num_bytes for p in trained) if config.parallel.use_distributed_optimizer else gradients
    data = (gradients + gathered) * (dp * cp - 1) / (dp * cp)
    contrastive = 0.0
    if stage == layout.pp - 1:
        pool = micro_batch.eos_rows * layout.num_micro_batches * dp * model.projection_size * FP32
        contrastive = 2 * pool * (dp - 1) / dp  # embeddings forward, their gradients backward
    return SentBytes(
        tensor_parallel=tensor,
        context_parallel=context,
        pipeline=pipeline,
        data_parallel=data,
        contrastive=contrastive,
    )


def _flops_a_second(config: RunConfig, cluster: Cluster) -> float:
    gpu = cluster.gpu
    if config.transformer.get("fp8"):
        if gpu.fp8_flops is None:
            raise ValueError(f"transformer: fp8 is set, and {cluster.gpu_name} has no FP8 units; leave it out")
        return gpu.fp8_flops * cluster.fp8_efficiency
    return (gpu.bf16_flops if config.model.bf16 else gpu.fp32_flops) * cluster.compute_efficiency


def step_time(
    config: RunConfig,
    layout: Layout,
    cluster: Cluster,
    flops: list[StageFlops],
    sent: list[SentBytes],
    states: list[StateBytes],
    *,
    runs_ahead: bool,
) -> StepTime:
    """1F1B: the slowest stage runs every micro-batch, and waits for stages - 1 of them besides.

    Data-parallel communication is taken to hide behind the last micro-batch's backward pass (`--overlap-grad-reduce`)
    and the next forward pass (`--overlap-param-gather`) as far as that is long enough.
    """
    gpu, nodes = cluster.gpu, cluster.gpus_per_node
    reached = _flops_a_second(config, cluster)

    def seconds(num_bytes: float, reach: int) -> float:
        """`reach`: processes from the first to the last of a group."""
        link = gpu.node_bandwidth if reach <= nodes else gpu.network_bandwidth
        return num_bytes / (link * cluster.bandwidth_efficiency)

    of_replica = layout.tp * layout.cp
    a_stage = of_replica * layout.dp
    compute = [(one.hardware + one.waited) * layout.num_micro_batches / of_replica / reached for one in flops]
    tensor = [seconds(one.tensor_parallel, layout.tp) for one in sent]
    context = [seconds(one.context_parallel, of_replica) for one in sent]
    pipeline = [seconds(one.pipeline, a_stage * 2) for one in sent]
    passes = 2 + (recompute_of(config).granularity == "full") + runs_ahead
    weights = [
        layout.num_micro_batches * (passes * one.weights + 2 * one.gradients) / gpu.memory_bandwidth for one in states
    ]
    busy = [sum(times) for times in zip(compute, weights, tensor, context, pipeline, strict=True)]
    slowest = max(range(layout.pp), key=busy.__getitem__)
    bubble = busy[slowest] * (layout.pp - 1) / layout.num_micro_batches
    data = max(seconds(one.data_parallel, a_stage) for one in sent)
    one_micro_batch = compute[slowest] / layout.num_micro_batches
    if config.parallel.overlap_grad_reduce:
        hidden = data / 2 * (1 + config.parallel.overlap_param_gather)
        data -= min(hidden, one_micro_batch)
    return StepTime(
        compute=compute[slowest],
        weights=weights[slowest],
        tensor_parallel=tensor[slowest],
        context_parallel=context[slowest],
        pipeline=pipeline[slowest],
        bubble=bubble,
        data_parallel=data,
        contrastive=seconds(sent[-1].contrastive, a_stage),
        optimizer=max(2 * one.optimizer for one in states) / gpu.memory_bandwidth,
    )
