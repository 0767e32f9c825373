"""Puts the parts of a plan together: parameters, memory of every pipeline stage, time, checkpoint sizes."""

from dataclasses import dataclass
from math import ceil

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.training.plan.activations import stage_activations
from hacl_megatron.training.plan.compute import SentBytes, StageFlops, StepTime, sent_bytes, stage_flops, step_time
from hacl_megatron.training.plan.hardware import Cluster
from hacl_megatron.training.plan.parameters import count_by_part, layers_by_stage, stage_parameters, whole_model
from hacl_megatron.training.plan.state import FP32, optimizer_checkpoint_bytes_each, state_bytes
from hacl_megatron.training.plan.workload import PackShape, Samples, pack_shape


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage. The first three are exact, the others estimates."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of every micro-batch in flight."""
    logits: float
    contrastive: float
    """The gathered pool, the queue and the similarities."""
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
    model: ModelConfig
    layout: Layout
    cluster: Cluster
    samples: Samples
    pack: PackShape
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
        """Of one optimiser step, over all GPUs; recomputation does not count."""
        each = sum(stage.flops.model for stage in self.stages)
        return each * self.layout.num_micro_batches * self.layout.dp

    @property
    def iterations(self) -> int | None:
        training = self.config.training
        if training.train_iters is not None:
            return training.train_iters
        if self.samples.num_samples is None:
            return None
        return ceil(training.num_train_epochs * self.samples.num_samples / self.layout.global_batch_size)

    @property
    def seconds(self) -> float | None:
        """The whole run, saving and validation apart; None where its length is not known."""
        return None if self.iterations is None else self.iterations * self.time.total


def make_plan(config: RunConfig, model: ModelConfig, layout: Layout, cluster: Cluster, samples: Samples) -> Plan:
    """Plan a configuration that `check_flags` and `check_architecture` have passed."""
    pack = pack_shape(config, model, samples, layout.micro_batch_size)
    layers = layers_by_stage(config.parallel, model.language.num_layers)
    stages = []
    states = []
    for index in range(layout.pp):
        parameters = stage_parameters(config, model, index)
        state = state_bytes(parameters, config, layout, stage=index)
        activations = stage_activations(config, model, pack, index)
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
                    activations=activations.kept * in_flight,
                    logits=activations.logits + activations.logits_peak,
                    contrastive=_contrastive_bytes(config, model, layout, pack) if index == layout.pp - 1 else 0,
                    working=activations.working,
                    reserve=cluster.reserve,
                ),
                flops=stage_flops(config, model, pack, index),
                sent=sent_bytes(config, model, layout, pack, index, parameters),
            )
        )
    whole = whole_model(config, model)
    trained = sum(p.numel for p in whole if p.trained)
    return Plan(
        config=config,
        model=model,
        layout=layout,
        cluster=cluster,
        samples=samples,
        pack=pack,
        parts=count_by_part(whole),
        stages=stages,
        time=step_time(
            config, layout, cluster, [s.flops for s in stages], [s.sent for s in stages], states
        ),
        weights_checkpoint=sum(p.num_bytes for p in whole),
        optimizer_checkpoint=trained * optimizer_checkpoint_bytes_each(config),
    )  # fmt: skip


def _contrastive_bytes(config: RunConfig, model: ModelConfig, layout: Layout, pack: PackShape) -> float:
    """Embeddings of the pool (twice: the gradients), and a handful of fp32 matrices [own pairs, pool]."""
    objective = config.objective
    micro_batches = 1 if objective.contrastive_negatives == "micro-batch" else layout.num_micro_batches
    own_pairs, ranks = pack.pairs * micro_batches, layout.dp
    per_pair = 2 + (pack.hallucinated / pack.pairs if pack.pairs else 0)
    pairs = own_pairs * ranks
    columns = pairs
    embeddings = 2 * pairs * per_pair
    if objective.contrastive_negatives == "queue":
        columns += objective.queue_size
        embeddings += objective.queue_size * per_pair
    return FP32 * (embeddings * model.projection_size + 4 * pack.pairs * columns * per_pair)
