"""The mathematics of one optimiser step: counts over the global batch, forward and backward, gradients, update.

What the loop around it decides (logging, saving, giving up) is not here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from hacl_megatron.objective.negatives import gather_integers_of_pairs
from hacl_megatron.platform.device import Stopwatch
from hacl_megatron.platform.host_groups import host_sums
from hacl_megatron.platform.random_state import random_states, set_random_states
from hacl_megatron.training.contrast import Contrast, pair_integers
from hacl_megatron.training.losses import NUM_SUMS, GlobalCounts, LossWeights, StepLosses, StepMetrics, StepSums
from hacl_megatron.training.optimizer.grad_norm import clipped_parts, squared_grad_norms
from hacl_megatron.training.packs import has_dropout, pool_spans_micro_batches
from hacl_megatron.training.reporting.step_time import OwnTime
from hacl_megatron.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What became of the gradients."""

    applied: bool
    """False when loss or gradient norm was not finite; parameters and optimiser are then untouched."""
    grad_norm: float
    """Global L2 norm before clipping."""
    grad_norms_apart: tuple[float, float] | None = None
    """The others' and the contrastive heads' norms, where each is clipped by its own."""
    num_zeros: float | None
    """Zero entries of the gradients, if they were asked for."""


class Step:
    """Runs the micro-batches of one global batch through the pipeline and updates the parameters.

    receive -> forward_backward -> update, or receive -> evaluate; every rank calls them at the same times.
    """

    def __init__(self, run: Run, trainee: Trainee) -> None:
        self.run, self.config, self.groups, self.device = run, run.config, run.groups, run.device
        self.trainee, self.model, self.optimizer = trainee, trainee.model, trainee.optimizer
        self.clips_heads_apart = run.config.optimizer.clip_heads_apart
        self.contrast = Contrast(run.config.objective, trainee.queue, run.groups.dp)
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
        """Target tokens, pairs, twins, packed rows and images of the global batch."""
        local = [
            sum(batch.main.num_targets for batch in micro_batches),
            sum(batch.main.num_pairs for batch in micro_batches),
            sum(batch.main.num_preferences for batch in micro_batches),
            sum(batch.num_rows_once for batch in micro_batches),
            sum(batch.main.num_images for batch in micro_batches),
        ]
        shared_out_by = micro_batches[0].main.shared_out_by
        sums = host_sums([*local, shared_out_by, shared_out_by**2], self.groups.dp_host)
        targets, pairs, twins, rows, images, total, squares = map(int, sums)
        if squares * self.groups.dp_host.size() != total**2:  # not one number on all ranks
            raise ValueError(
                "ranks count other rows for the same samples of this step, so that some would train twice and others "
                "never: the pictures under --image-folder, whose sizes decide their rows, are not the same for all "
                "ranks; give them the same files, or leave --micro-batch-tokens and balancing out"
            )
        pairs_of_ranks = []
        if self.is_last_stage:
            own = [pair_integers(batch.main) for batch in micro_batches]
            pairs_of_ranks = gather_integers_of_pairs(own, self.groups.dp_host)
        return GlobalCounts(
            targets=targets, pairs=pairs, twins=twins, rows=rows, images=images, pairs_of_ranks=pairs_of_ranks
        )

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
            weights=LossWeights.of(self.config.preference, contrastive=contrastive_weight),
            forward_only=False,
            first_features=first_features,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], counts: GlobalCounts) -> StepMetrics:
        """The same losses without gradients, against the pairs of this batch alone: no queue."""
        self.model.eval()
        weights = LossWeights.of(self.config.preference, contrastive=0.0)
        losses = self._run(micro_batches, counts, weights=weights, forward_only=True)
        self.model.train()
        metrics = losses.read()
        self._time_ahead.take()  # a step's own is wanted
        return metrics

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        counts: GlobalCounts,
        *,
        weights: LossWeights,
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
        losses = StepLosses(
            self.run,
            self.contrast,
            micro_batches,
            counts,
            weights=weights,
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
        return self._reduce(losses)

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

    def _reduce(self, losses: StepLosses) -> StepSums:
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.device)
        if self.is_last_stage:
            of_rank = losses.sums()
            # The last stage's tensor- and context-parallel ranks hold equal sums; one of them speaks for all.
            if self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0:
                sums = of_rank
        dist.all_reduce(sums)
        return StepSums(sums=sums, weights=losses.weights, counts=losses.counts)

    def update(self, losses: StepSums) -> tuple[StepMetrics, UpdateResult]:
        """Clip over all axes and step the optimiser, unless loss or gradients are not finite.

        Here, once, a step waits for the device: losses and norm are read together. They are the same numbers on every
        rank, so all take the same branch.
        """
        optimizer = self.optimizer
        optimizer.prepare_grads()
        squared = squared_grad_norms(optimizer, self.device, heads_apart=self.clips_heads_apart)
        numbers = torch.cat([losses.sums, squared.double()]).tolist()
        sums, squared_norms = numbers[: -len(squared)], numbers[-len(squared) :]
        metrics, grad_norm = losses.metrics(sums), sum(squared_norms) ** 0.5
        norms = [squared_norm**0.5 for squared_norm in squared_norms]
        apart = (norms[0], norms[1]) if self.clips_heads_apart else None
        self.seconds_ahead = self._time_ahead.take()
        if not (math.isfinite(metrics.total) and math.isfinite(grad_norm)):
            return metrics, UpdateResult(applied=False, grad_norm=grad_norm, grad_norms_apart=apart, num_zeros=None)
        clip_grad = optimizer.config.clip_grad
        decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        for parameters, norm in zip(clipped_parts(optimizer, self.clips_heads_apart), norms, strict=True):
            if clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, decoupled)
        num_zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
        optimizer.step_with_ready_grads()
        self.contrast.remember()
        return metrics, UpdateResult(applied=True, grad_norm=grad_norm, grad_norms_apart=apart, num_zeros=num_zeros)


def _as_it_is(output: ModelOutput, non_loss_data: bool) -> ModelOutput:
    """What megatron-core's schedule keeps of a forward-only micro-batch on the last stage."""
    return output
