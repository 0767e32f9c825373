"""Puts the parts of a plan together: parameters, memory of every pipeline stage, time, checkpoint sizes."""

from dataclasses import dataclass, replace

from hacl_megatron.assemble.parameters import (
    PlannedParameter,
    count_by_part,
    layers_by_stage,
    stage_parameters,
    whole_model,
)
from hacl_megatron.config.layout import Layout, iterations_of_epochs
from hacl_megatron.config.run import RunConfig
from hacl_megatron.objective.row_blocks import BLOCK_BYTES
from hacl_megatron.plan.activations import stage_activations
from hacl_megatron.plan.compute import SentBytes, StageFlops, StepTime, sent_bytes, stage_flops, step_time
from hacl_megatron.plan.image_parts import features_for_a_second_pass, image_ranks
from hacl_megatron.plan.state import FP32, optimizer_checkpoint_bytes_each, state_bytes
from hacl_megatron.plan.workload import MicroBatchShape, Samples, micro_batch_shape, num_micro_batches
from hacl_megatron.platform.hardware import Cluster


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage. The first three are exact, the others estimates."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of every micro-batch in flight, and what runs ahead leaves behind until the main pass takes it."""
    logits: float
    contrastive: float
    """The gathered pool, the queue, their gradients and a block of similarities."""
    working: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def largest(self) -> str:
        """Which kind takes most."""
        return max(vars(self), key=vars(self).__getitem__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage of the plan."""

    layers: int
    parts: dict[str, tuple[int, int]]
    """(trained, frozen) parameters of one rank, by part."""
    micro_batches_in_flight: int
    memory: StageMemory
    flops: StageFlops
    sent: SentBytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run at one layout needs."""

    config: RunConfig
    layout: Layout
    """With a number of micro-batches: the average step's, if their size is given in tokens."""
    cluster: Cluster
    samples: Samples
    micro_batch: MicroBatchShape
    samples_per_micro_batch: float
    parts: dict[str, tuple[int, int]]
    """(trained, frozen) parameters of the whole model, by part."""
    stages: list[Stage]
    time: StepTime
    weights_checkpoint: float
    """Bytes of the weights in a checkpoint."""
    optimizer_checkpoint: float

    @property
    def fullest(self) -> int:
        """The stage that needs most memory."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].memory.total)

    @property
    def memory(self) -> float:
        """Bytes that the fullest stage needs on each GPU."""
        return self.stages[self.fullest].memory.total

    @property
    def fits(self) -> bool:
        return self.memory <= self.cluster.gpu.memory

    @property
    def samples_per_second(self) -> float:
        return self.layout.global_batch_size / self.time.total

    @property
    def model_flops(self) -> float:
        """Of one optimiser step, over all GPUs; what is computed twice counts once."""
        each = sum(stage.flops.model for stage in self.stages)
        return each * self.layout.num_micro_batches * self.layout.dp

    @property
    def iterations(self) -> int | None:
        training = self.config.training
        if training.train_iters is not None:
            return training.train_iters
        if self.samples.num_samples is None:
            return None
        return iterations_of_epochs(training.num_train_epochs, self.samples.num_samples, self.layout.global_batch_size)

    @property
    def seconds(self) -> float | None:
        """The whole run, saving and validation apart; None where its length is not known."""
        return None if self.iterations is None else self.iterations * self.time.total


def make_plan(
    config: RunConfig,
    layout: Layout,
    cluster: Cluster,
    samples: Samples,
    micro_batch: MicroBatchShape | None = None,
) -> Plan:
    """Plan a configuration that `check_flags` and `check_architecture` have passed.

    Args:
        micro_batch: what runs at once, where it is known; None: the average of `samples`.
    """
    layout = replace(layout, num_micro_batches=num_micro_batches(config, layout, samples))
    size = layout.global_batch_size / (layout.dp * layout.num_micro_batches)
    if micro_batch is None:
        micro_batch = micro_batch_shape(config, samples, size, layout.num_micro_batches)
    layers = layers_by_stage(config.parallel, config.architecture.language.num_layers)
    stages = []
    states = []
    for index in range(layout.pp):
        parameters = stage_parameters(config, index)
        state = state_bytes(parameters, config, layout, stage=index)
        activations = stage_activations(config, micro_batch, index)
        in_flight = min(layout.num_micro_batches, layout.pp - index)
        states.append(state)
        stages.append(
            Stage(
                layers=layers[index],
                parts=count_by_part(parameters),
                micro_batches_in_flight=in_flight,
                memory=StageMemory(
                    weights=state.weights,
                    gradients=state.gradients,
                    optimizer=state.optimizer,
                    activations=activations.kept * in_flight
                    + _left_behind(config, layout, micro_batch, index, in_flight),
                    logits=activations.logits + activations.logits_peak,
                    contrastive=_contrastive_bytes(config, layout, micro_batch) if index == layout.pp - 1 else 0,
                    working=activations.working + _fp8_weights(config, parameters),
                    reserve=cluster.reserve,
                ),
                flops=stage_flops(config, micro_batch, index),
                sent=sent_bytes(config, layout, micro_batch, index, parameters),
            )
        )
    whole = whole_model(config)
    trained = sum(p.numel for p in whole if p.trained)
    return Plan(
        config=config,
        layout=layout,
        cluster=cluster,
        samples=samples,
        micro_batch=micro_batch,
        samples_per_micro_batch=size,
        parts=count_by_part(whole),
        stages=stages,
        time=step_time(
            config, layout, cluster, [s.flops for s in stages], [s.sent for s in stages], states,
            runs_ahead=micro_batch.ahead is not None,
        ),
        weights_checkpoint=sum(p.num_bytes for p in whole),
        optimizer_checkpoint=trained * optimizer_checkpoint_bytes_each(config),
    )  # fmt: skip


def _fp8_weights(config: RunConfig, parameters: list[PlannedParameter]) -> float:
    """Bytes of the LLaMA layers' matrices in FP8, as they are and transposed, which Transformer Engine keeps."""
    if not config.transformer.get("fp8"):
        return 0.0
    copies = 1 if config.transformer.get("disable_parameter_transpose_cache") else 2
    of_layers = [p for p in parameters if p.part == "language_model" and ".layers." in p.name]
    return float(copies * sum(p.numel for p in of_layers if len(p.shape) == 2))


def _left_behind(config: RunConfig, layout: Layout, micro_batch: MicroBatchShape, stage: int, in_flight: int) -> float:
    """What the forward-only pass over all micro-batches leaves on a stage: tower features, EOS states, embeddings."""
    if micro_batch.ahead is None:
        return 0.0
    e, model = 2 if config.model.bf16 else 4, config.architecture
    left = 0.0
    if stage == 0 and micro_batch.ahead.image_rows:
        # The connector's input: of the micro-batches in flight it is among the activations.
        features = e * micro_batch.main.images * features_for_a_second_pass(config.model, model)
        features /= layout.cp * image_ranks(config)
        left += features * (layout.num_micro_batches - in_flight)
    if stage == layout.pp - 1:
        texts = micro_batch.pairs + micro_batch.hallucinated
        each = e * model.language.hidden_size * texts + FP32 * model.projection_size * micro_batch.eos_rows
        left += each * layout.num_micro_batches
    return left


def _contrastive_bytes(config: RunConfig, layout: Layout, micro_batch: MicroBatchShape) -> float:
    """Embeddings of the pool and their gradients, those of the queue, and a block of similarities, all fp32."""
    objective = config.objective
    if not micro_batch.pairs:
        return 0.0
    times = 1 if objective.contrastive_negatives == "micro-batch" else layout.num_micro_batches
    own_pairs = micro_batch.pairs * times
    per_pair = 2 + micro_batch.hallucinated / micro_batch.pairs
    pool = own_pairs * layout.dp
    queue = objective.queue_size if objective.contrastive_negatives == "queue" else 0
    embeddings = (2 * pool + queue) * per_pair * config.architecture.projection_size
    similarities = own_pairs * (pool + queue) * (per_pair - 1)
    return FP32 * embeddings + min(BLOCK_BYTES, (FP32 + 1) * similarities)
