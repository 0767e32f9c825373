"""The mathematics of one optimiser step: counts over the global batch, forward and backward, gradients, update.

What the loop around it decides (logging, saving, giving up) is not here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from hacl_megatron.assemble.exchange import exchange_step
from hacl_megatron.assemble.forward import run_schedule
from hacl_megatron.assemble.run import Run
from hacl_megatron.batch import MicroBatch, StepBatches
from hacl_megatron.model.hacl import ModelOutput, TextStates
from hacl_megatron.objective.contrastive import ContrastiveTerms
from hacl_megatron.objective.generation import generation_loss_sum
from hacl_megatron.objective.negatives import (
    PairEmbeddings,
    PairIntegers,
    concatenate_integers,
    concatenate_pairs,
    gather_integers_of_pairs,
)
from hacl_megatron.platform.device import Stopwatch
from hacl_megatron.platform.host_groups import host_sums
from hacl_megatron.platform.random_state import random_states, set_random_states
from hacl_megatron.training.contrast import CachedGradients, Contrast, pair_embeddings, pair_integers
from hacl_megatron.training.grad_norm import squared_grad_norm
from hacl_megatron.training.packs import has_dropout, pool_spans_micro_batches
from hacl_megatron.training.reporting.step_time import OwnTime
from hacl_megatron.training.trainee import Trainee

# Sums over this rank's pairs, in this order.
_TERMS = (
    "image_to_text_sum", "text_to_image_sum", "correct_i2t_sum", "margin_sum", "margin_count",
    "hallucination_correct_sum", "hallucination_pairs",
)  # fmt: skip
_SUMS = ("lm_loss", *_TERMS, "temperature")


@dataclass(frozen=True, kw_only=True)
class GlobalCounts:
    """What the losses of a step are divided by: counted over all ranks and micro-batches before the first runs."""

    targets: int
    pairs: int
    rows: int
    images: int
    pairs_of_ranks: Sequence[Sequence[PairIntegers]] = field(repr=False)
    """Of each data-parallel rank and each of its micro-batches; on the last pipeline stage."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Losses and metrics of one global batch, the same on every rank. NaN where the batch has nothing to measure."""

    lm_loss: float
    contrastive_i2t: float
    contrastive_t2i: float
    retrieval_accuracy_i2t: float
    hallucination_margin: float
    hallucination_accuracy: float
    temperature: float
    contrastive_weight: float
    """Lambda of the step; 0 where nothing was trained."""
    counts: GlobalCounts
    hallucinated: float
    """Hallucinated captions that `hallucination_margin` is the mean over."""
    hallucination_pairs: float
    """Pairs with any, which `hallucination_accuracy` is the share of."""

    @property
    def contrastive_loss(self) -> float:
        return (self.contrastive_i2t + self.contrastive_t2i) / 2

    @property
    def total(self) -> float:
        """L = L_G + lambda (L_v + L_t) / 2, for deciding whether the step is finite."""
        contrastive = self.contrastive_loss if self.counts.pairs else 0.0
        return (self.lm_loss if self.counts.targets else 0.0) + self.contrastive_weight * contrastive


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What the losses of a step add up to over all ranks, not yet read from the device."""

    sums: Tensor
    """float64 [len(_SUMS)], on the device, the same on every rank."""
    contrastive_weight: float
    counts: GlobalCounts

    def read(self) -> StepMetrics:
        """Waits for the device."""
        return self.metrics(self.sums.tolist())

    def metrics(self, sums: Sequence[float]) -> StepMetrics:
        """The metrics, given `sums` as they were read."""
        total, counts = dict(zip(_SUMS, sums, strict=True)), self.counts

        def mean(name: str, count: float) -> float:
            return total[name] / count if count else math.nan

        return StepMetrics(
            contrastive_weight=self.contrastive_weight,
            lm_loss=mean("lm_loss", counts.targets),
            contrastive_i2t=mean("image_to_text_sum", counts.pairs),
            contrastive_t2i=mean("text_to_image_sum", counts.pairs),
            retrieval_accuracy_i2t=mean("correct_i2t_sum", counts.pairs),
            hallucination_margin=mean("margin_sum", total["margin_count"]),
            hallucination_accuracy=mean("hallucination_correct_sum", total["hallucination_pairs"]),
            temperature=total["temperature"],
            counts=counts,
            hallucinated=total["margin_count"],
            hallucination_pairs=total["hallucination_pairs"],
        )


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What became of the gradients."""

    applied: bool
    """False when loss or gradient norm was not finite; parameters and optimiser are then untouched."""
    grad_norm: float
    """Global L2 norm before clipping."""
    num_zeros: float | None
    """Zero entries of the gradients, if they were asked for."""


class Step:
    """Runs the micro-batches of one global batch through the pipeline and updates the parameters.

    receive -> forward_backward -> update, or receive -> evaluate; every rank calls them at the same times.
    """

    def __init__(self, run: Run, trainee: Trainee) -> None:
        self.config, self.groups, self.device = run.config, run.groups, run.device
        self.trainee, self.model, self.optimizer = trainee, trainee.model, trainee.optimizer
        self.contrast = Contrast(run.config.objective, trainee.queue, run.groups.dp)
        self.vocab_size = run.config.architecture.language.vocab_size
        self.is_last_stage = run.groups.pp.rank() == run.groups.pp.size() - 1
        self.own_time = OwnTime(run.device)
        """Seconds that this rank's passes took, of the steps that are `timed`."""
        trainee.module.config.timers = self.own_time
        self.seconds_ahead = 0.0
        """Time that the last step's forward-only pass took on this rank's device."""
        self._time_ahead = Stopwatch(run.device)

    def receive(self, step_batches: StepBatches | None) -> tuple[list[MicroBatch], GlobalCounts]:
        """This replica's micro-batches on its every rank, and what the losses are divided by.

        Args:
            step_batches: on the rank that reads data; None on the others.
        """
        own = None if step_batches is None else step_batches.micro_batches
        micro_batches = exchange_step(own, self.model.module, self.device)
        return micro_batches, self.count(micro_batches)

    @torch.no_grad()
    def start_images(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """The tower's features of the first micro-batch, which no step changes; None where it is trained, or not here.

        On a GPU it is on its way behind what was launched before, so that a step need not begin with an idle GPU.
        """
        module = self.model.module
        if not module.pre_process or module.vision_tower_is_trained:
            return None
        return module.tower_features(micro_batches[0].main.pixel_values)

    def count(self, micro_batches: Sequence[MicroBatch]) -> GlobalCounts:
        """Target tokens, pairs, packed rows and images of the global batch."""
        local = [
            sum(batch.main.num_targets for batch in micro_batches),
            sum(batch.main.num_pairs for batch in micro_batches),
            sum(batch.num_rows_once for batch in micro_batches),
            sum(batch.main.num_images for batch in micro_batches),
        ]
        targets, pairs, rows, images = map(int, host_sums(local, self.groups.dp_host))
        pairs_of_ranks = []
        if self.is_last_stage:
            own = [pair_integers(batch.main) for batch in micro_batches]
            pairs_of_ranks = gather_integers_of_pairs(own, self.groups.dp_host)
        return GlobalCounts(targets=targets, pairs=pairs, rows=rows, images=images, pairs_of_ranks=pairs_of_ranks)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        counts: GlobalCounts,
        *,
        contrastive_weight: float,
        timed: bool = False,
        first_features: Tensor | None = None,
    ) -> StepSums:
        """Accumulate the gradients of L over the global batch.

        Args:
            contrastive_weight: lambda in this step.
            timed: add this rank's passes up in `own_time`.
            first_features: what `start_images` gave.
        """
        self.own_time.is_on = timed
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.contrast.forget()
        return self._run(
            micro_batches,
            counts,
            contrastive_weight=contrastive_weight,
            forward_only=False,
            first_features=first_features,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], counts: GlobalCounts) -> StepMetrics:
        """The same losses without gradients, against the pairs of this batch alone: no queue."""
        self.model.eval()
        losses = self._run(micro_batches, counts, contrastive_weight=0.0, forward_only=True)
        self.model.train()
        metrics = losses.read()
        self._time_ahead.take()  # a step's own is wanted
        return metrics

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        counts: GlobalCounts,
        *,
        contrastive_weight: float,
        forward_only: bool,
        first_features: Tensor | None = None,
    ) -> StepSums:
        spans = pool_spans_micro_batches(self.config, len(micro_batches))
        caches = spans and not forward_only and micro_batches[0].ahead is not None

        states = random_states() if caches and has_dropout(self.config) else None
        features = self._kept_tower_features(micro_batches, first_features)
        ahead = None
        # Constant texts alone, on one stage, can wait until a pass of the main pack is under way (`_text_states`).
        if micro_batches[0].ahead is not None and (caches or self.groups.pp.size() > 1):
            ahead = self._run_ahead(micro_batches, features)
        if states is not None:
            set_random_states(states)
        losses = _Losses(
            self,
            micro_batches,
            counts,
            contrastive_weight=contrastive_weight,
            measures_at_the_end=spans,
            forward_only=forward_only,
        )
        if caches and self.is_last_stage:
            losses.cache_gradients(ahead)

        def forward_step(index: int, model: DistributedDataParallel):
            batch = micro_batches[index]
            texts = None
            if batch.ahead is not None and self.is_last_stage and not batch.main.num_text_rows:
                texts = partial(self._text_states, batch) if ahead is None else ahead[index].texts
            with self.own_time.forward():
                output = model(batch.main, batch.main.lengths, tower_features=features[index], texts=texts)
            return output, partial(losses.of_micro_batch, index=index)

        run_schedule(forward_step, self.model, [batch.main for batch in micro_batches], forward_only=forward_only)
        return self._reduce(losses, counts)

    def _kept_tower_features(self, micro_batches: Sequence[MicroBatch], first: Tensor | None) -> list[Tensor | None]:
        """A frozen tower's features of each micro-batch, if its images run twice; a trained tower runs twice too.

        first: those of the first micro-batch, if they are there.
        """
        module = self.model.module
        if not module.pre_process or module.vision_tower_is_trained:
            return [None] * len(micro_batches)
        others = [
            module.tower_features(batch.main.pixel_values)
            if batch.ahead is not None and batch.ahead.image_rows.numel()
            else None
            for batch in micro_batches[first is not None :]
        ]
        return others if first is None else [first, *others]

    @torch.no_grad()
    def _run_ahead(
        self, micro_batches: Sequence[MicroBatch], kept_features: Sequence[Tensor | None]
    ) -> list[ModelOutput] | None:
        """Outputs of the packs that run ahead, on the last stage; None elsewhere."""
        self._time_ahead.start()
        self.trainee.gather_image_parameters()
        packs = [replace(batch.ahead, pixel_values=batch.main.pixel_values) for batch in micro_batches]

        def forward_step(index: int, model: DistributedDataParallel):
            with self.own_time.forward():
                output = model(packs[index], packs[index].lengths, tower_features=kept_features[index])
            return output, _as_it_is

        outputs = run_schedule(forward_step, self.model, packs, forward_only=True, keeps_outputs=True)
        self._time_ahead.stop()
        return outputs

    @torch.no_grad()
    def _text_states(self, batch: MicroBatch) -> TextStates:
        """EOS states of a micro-batch's texts, whose way through the model holds nothing that trains."""
        self._time_ahead.start()
        output = self.model(batch.ahead, batch.ahead.lengths)
        self._time_ahead.stop()
        return output.texts

    def _reduce(self, losses: "_Losses", counts: GlobalCounts) -> StepSums:
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        # The last stage's tensor-parallel ranks hold equal sums; one of them speaks for all.
        if self.is_last_stage:
            terms = losses.terms()
            if self.groups.tp.rank() == 0:
                vectors = [torch.stack([getattr(part, name).detach() for name in _TERMS]) for part in terms]
                parts = [torch.stack(losses.lm_sums).double().sum().view(1), torch.stack(vectors).double().sum(0)]
                parts.append(losses.temperature.double() / self.groups.dp.size())  # adds up to the one value
                sums = torch.cat(parts)
        dist.all_reduce(sums)
        return StepSums(sums=sums, contrastive_weight=losses.contrastive_weight, counts=counts)

    def update(self, losses: StepSums) -> tuple[StepMetrics, UpdateResult]:
        """Clip over all axes and step the optimiser, unless loss or gradients are not finite.

        Here, once, a step waits for the device: losses and norm are read together. They are the same numbers on every
        rank, so all take the same branch.
        """
        optimizer = self.optimizer
        optimizer.prepare_grads()
        squared_norm = squared_grad_norm(optimizer, self.device)
        *sums, squared_norm = torch.cat([losses.sums, squared_norm.double()]).tolist()
        metrics, grad_norm = losses.metrics(sums), squared_norm**0.5
        self.seconds_ahead = self._time_ahead.take()
        if not (math.isfinite(metrics.total) and math.isfinite(grad_norm)):
            return metrics, UpdateResult(applied=False, grad_norm=grad_norm, num_zeros=None)
        clip_grad = optimizer.config.clip_grad
        parameters = optimizer.get_parameters()
        if clip_grad > 0 and parameters:
            decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm, decoupled)
        num_zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
        optimizer.step_with_ready_grads()
        self.contrast.remember()
        return metrics, UpdateResult(applied=True, grad_norm=grad_norm, num_zeros=num_zeros)


class _Losses:
    """The losses of one step's main pass, micro-batch by micro-batch, on the last stage; and what remains to be
    logged."""

    def __init__(
        self,
        step: Step,
        micro_batches: Sequence[MicroBatch],
        counts: GlobalCounts,
        *,
        contrastive_weight: float,
        measures_at_the_end: bool,
        forward_only: bool,
    ) -> None:
        self.step = step
        self.contrast = step.contrast
        self.micro_batches = micro_batches
        self.counts = counts
        self.contrastive_weight = contrastive_weight
        self.measures_at_the_end = measures_at_the_end
        self.forward_only = forward_only
        # Shares of a mean over the global batch: the schedule divides by the micro-batches, DDP by the ranks.
        self.scale = len(micro_batches) * step.groups.dp.size()
        self.lm_sums: list[Tensor] = []
        self.temperature: Tensor | None = None
        self._terms: list[ContrastiveTerms] = []
        self._gradients: list[CachedGradients] | None = None
        self._pairs: list[PairEmbeddings] = []

    def cache_gradients(self, ahead: Sequence[ModelOutput]) -> None:
        """Compute the contrastive loss from the embeddings that ran ahead, before the main pass."""
        pairs = [pair_embeddings(out, batch.main) for out, batch in zip(ahead, self.micro_batches, strict=True)]
        terms, self._gradients = self.contrast.cached_gradients(
            pairs, self._everyone(), ahead[0].temperature, self.counts.pairs, self.contrastive_weight
        )
        self._terms.append(terms)

    def of_micro_batch(self, output: ModelOutput, index: int) -> tuple[Tensor, Tensor]:
        """What megatron-core's schedule asks for: the loss to back-propagate, and something to keep."""
        batch = self.micro_batches[index].main
        lm_sum = generation_loss_sum(
            output.logits, batch.target_ids, vocab_size=self.step.vocab_size, tp_group=self.step.groups.tp
        )
        loss = lm_sum / max(self.counts.targets, 1)
        if self._gradients is not None:
            loss = loss + self._gradients[index].surrogate(output)
        elif self.measures_at_the_end:
            # Nothing is trained on the terms, but every trained parameter is to be touched.
            pairs = pair_embeddings(output, batch)
            loss = loss + 0.0 * (
                pairs.image.sum() + pairs.caption.sum() + pairs.hallucinated.sum() + output.temperature.sum()
            )
            self._pairs.append(pairs)
        else:
            everyone = [of_rank[index] for of_rank in self.counts.pairs_of_ranks]
            terms = self.contrast.terms(
                pair_embeddings(output, batch), everyone, output.temperature, with_queue=not self.forward_only
            )
            loss = loss + self.contrast.share(terms, self.counts.pairs, self.contrastive_weight)
            self._terms.append(terms)
        self.lm_sums.append(lm_sum.detach())
        self.temperature = output.temperature.detach()
        return loss * self.scale, lm_sum.detach()

    @torch.no_grad()
    def terms(self) -> list[ContrastiveTerms]:
        """Parts whose sums are the step's, once all micro-batches have run."""
        if self._pairs:
            local = concatenate_pairs(self._pairs)
            terms = self.contrast.terms(local, self._everyone(), self.temperature, with_queue=not self.forward_only)
            self._terms.append(terms)
            self._pairs = []
        return self._terms

    def _everyone(self) -> list[PairIntegers]:
        """Every rank's integers of the pairs of all micro-batches."""
        return [concatenate_integers(of_rank) for of_rank in self.counts.pairs_of_ranks]


def _as_it_is(output: ModelOutput, non_loss_data: bool) -> ModelOutput:
    """What megatron-core's schedule keeps of a forward-only micro-batch on the last stage."""
    return output
