"""FLOPs, bytes sent and seconds of one optimiser step: estimates.

FLOPs are counted as `training.flops` does (2 per multiply-add of matrix products; forward once, input gradients once,
weight gradients once where they train) but by pipeline stage, and with recomputation beside them. Rank order is
megatron-core's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
"""

from dataclasses import dataclass

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks import Layout, padded_vocab_size
from hacl_megatron.config.run import RunConfig
from hacl_megatron.training.flops import vision_flops
from hacl_megatron.training.plan.activations import recompute_of
from hacl_megatron.training.plan.hardware import Cluster
from hacl_megatron.training.plan.parameters import PlannedParameter, layers_by_stage
from hacl_megatron.training.plan.state import FP32, StateBytes
from hacl_megatron.training.plan.workload import STEP, PackShape, StepRules


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """FLOPs of one micro-batch on one pipeline stage, over all its tensor-parallel ranks."""

    model: float
    recomputed: float

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """Bytes that one GPU sends in one optimiser step."""

    tensor_parallel: float
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


def stage_flops(
    config: RunConfig, model: ModelConfig, pack: PackShape, stage: int, rules: StepRules = STEP
) -> StageFlops:
    language, parallel = model.language, config.parallel
    stages = parallel.pipeline_model_parallel_size
    layers = layers_by_stage(parallel, language.num_layers)[stage]
    is_last, width = stage == stages - 1, language.head_dim * language.num_attention_heads
    keys = 2 * language.hidden_size * language.head_dim * language.num_query_groups
    rest = 2 * language.hidden_size * width + 3 * language.hidden_size * language.ffn_hidden_size
    trained = not config.model.freeze_LM
    total = forward_again = 0.0
    recompute = recompute_of(config)
    recomputed_layers = 0
    if recompute.granularity == "full":
        recomputed_layers = min(recompute.num_layers, layers) if recompute.method == "block" else layers
    for part in pack.segments:
        passes = 1 + part.autograd * (1 + trained)
        attention_passes = 3 if part.autograd else 1
        read_share = 1.0
        if rules.last_layer_read_rows_only and is_last and pack.rows:
            read_share = pack.read_rows / pack.rows
        attention = 2 * part.count * part.length**2 * width  # causal: half of the square, twice for scores and values
        for share, times in ((1.0, layers - 1), (read_share, 1)):
            linear = 2 * part.rows * (keys + share * rest)
            total += times * (linear * passes + share * attention * attention_passes)
        if part.autograd:
            forward_again += recomputed_layers * (2 * part.rows * (keys + rest) + attention)
    if stage == 0:
        total += vision_flops(model, 1, trained=not config.model.freeze_ViT) * pack.images
    if is_last:
        vocab = padded_vocab_size(language.vocab_size, parallel)
        total += 2 * pack.target_rows * language.hidden_size * vocab * (2 + trained)
    return StageFlops(model=total, recomputed=forward_again)


def sent_bytes(
    config: RunConfig,
    model: ModelConfig,
    layout: Layout,
    pack: PackShape,
    stage: int,
    parameters: list[PlannedParameter],
) -> SentBytes:
    """By ring algorithms: an all-gather or reduce-scatter of n bytes over r ranks sends n (r - 1) / r a rank."""
    e = 2 if config.model.bf16 else 4
    tp, dp, hidden = layout.tp, layout.dp, model.language.hidden_size
    layers = layers_by_stage(config.parallel, model.language.num_layers)[stage]
    rows = pack.rows * e * hidden
    # Each layer: one all-reduce (or a gather and a scatter) behind attention and MLP, forward and backward each.
    passes = 2 + (recompute_of(config).granularity == "full")
    reductions = layers * 2 * passes
    tensor = reductions * 2 * rows * (tp - 1) / tp * layout.num_micro_batches
    neighbours = (stage > 0) + (stage < layout.pp - 1)
    shard = tp if config.parallel.sequence_parallel else 1
    pipeline = neighbours * rows / shard * layout.num_micro_batches  # one sends forward, the other backward
    trained = [p for p in parameters if p.trained]
    gradients = sum(p.numel for p in trained) * FP32
    gathered = sum(p.num_bytes for p in trained) if config.parallel.use_distributed_optimizer else gradients
    data = (gradients + gathered) * (dp - 1) / dp
    contrastive = 0.0
    if stage == layout.pp - 1:
        pool = pack.eos_rows * layout.num_micro_batches * dp * model.projection_size * FP32
        contrastive = 2 * pool * (dp - 1) / dp  # embeddings forward, their gradients backward
    return SentBytes(tensor_parallel=tensor, pipeline=pipeline, data_parallel=data, contrastive=contrastive)


def step_time(
    config: RunConfig,
    layout: Layout,
    cluster: Cluster,
    flops: list[StageFlops],
    sent: list[SentBytes],
    states: list[StateBytes],
) -> StepTime:
    """1F1B: the slowest stage runs every micro-batch, and waits for stages - 1 of them besides.

    Data-parallel communication is taken to hide behind the last micro-batch's backward pass (`--overlap-grad-reduce`)
    and the next forward pass (`--overlap-param-gather`) as far as that is long enough.
    """
    gpu, nodes = cluster.gpu, cluster.gpus_per_node
    peak = (gpu.bf16_flops if config.model.bf16 else gpu.fp32_flops) * cluster.compute_efficiency

    def seconds(num_bytes: float, reach: int) -> float:
        """`reach`: processes from the first to the last of a group."""
        link = gpu.node_bandwidth if reach <= nodes else gpu.network_bandwidth
        return num_bytes / (link * cluster.bandwidth_efficiency)

    compute = [one.hardware * layout.num_micro_batches / layout.tp / peak for one in flops]
    tensor = [seconds(one.tensor_parallel, layout.tp) for one in sent]
    pipeline = [seconds(one.pipeline, layout.tp * layout.dp * 2) for one in sent]
    passes = 2 + (recompute_of(config).granularity == "full")
    weights = [
        layout.num_micro_batches * (passes * one.weights + 2 * one.gradients) / gpu.memory_bandwidth for one in states
    ]
    busy = [sum(times) for times in zip(compute, weights, tensor, pipeline, strict=True)]
    slowest = max(range(layout.pp), key=busy.__getitem__)
    bubble = busy[slowest] * (layout.pp - 1) / layout.num_micro_batches
    data = max(seconds(one.data_parallel, layout.tp * layout.dp) for one in sent)
    one_micro_batch = compute[slowest] / layout.num_micro_batches
    if config.parallel.overlap_grad_reduce:
        hidden = data / 2 * (1 + config.parallel.overlap_param_gather)
        data -= min(hidden, one_micro_batch)
    return StepTime(
        compute=compute[slowest],
        weights=weights[slowest],
        tensor_parallel=tensor[slowest],
        pipeline=pipeline[slowest],
        bubble=bubble,
        data_parallel=data,
        contrastive=seconds(sent[-1].contrastive, layout.tp * layout.dp),
        optimizer=max(2 * one.optimizer for one in states) / gpu.memory_bandwidth,
    )
