"""The mathematics of one optimiser step: counts over the global batch, forward and backward, gradients, update.

What the loop around it decides (logging, saving, giving up) is not here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hacl_megatron.batch import PackedBatch
from hacl_megatron.config.flags import ObjectiveFlags
from hacl_megatron.model.hacl import ModelOutput
from hacl_megatron.objective.contrastive import ContrastiveTerms, contrastive_loss
from hacl_megatron.objective.generation import generation_loss_sum
from hacl_megatron.objective.negatives import PairEmbeddings, gather_pairs
from hacl_megatron.training.exchange import global_sums, segment_lengths

# Sums that the loss function leaves behind for every micro-batch, in this order.
_SUMS = (
    "lm_loss", "image_to_text", "text_to_image", "correct_i2t", "margin", "margin_count",
    "hallucination_correct", "hallucination_pairs", "temperature",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GlobalCounts:
    """What the losses of a step are divided by: counted over all ranks and micro-batches before the first runs."""

    targets: int
    pairs: int
    rows: int
    images: int


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
    counts: GlobalCounts

    @property
    def contrastive_loss(self) -> float:
        return (self.contrastive_i2t + self.contrastive_t2i) / 2

    def total(self, contrastive_weight: float) -> float:
        """L of DESIGN section 2, for deciding whether the step is finite."""
        contrastive = self.contrastive_loss if self.counts.pairs else 0.0
        return (self.lm_loss if self.counts.targets else 0.0) + contrastive_weight * contrastive


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
    """Runs micro-batches of one global batch through the pipeline and updates the parameters.

    `model` is the data-parallel wrap of this rank's pipeline stage.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        objective: ObjectiveFlags,
        *,
        vocab_size: int,
        groups: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.vocab_size = vocab_size
        self.groups = groups
        self.device = device
        self.is_last_stage = groups.pp.rank() == groups.pp.size() - 1

    def count(self, micro_batches: Sequence[PackedBatch]) -> GlobalCounts:
        """Target tokens, pairs, packed rows and images of the global batch."""
        local = [
            sum(batch.num_targets for batch in micro_batches),
            sum(batch.num_pairs for batch in micro_batches),
            sum(batch.num_rows - batch.num_padding_rows for batch in micro_batches),
            sum(batch.num_images for batch in micro_batches),
        ]
        targets, pairs, rows, images = global_sums(local, group=self.groups.dp, device=self.device)
        return GlobalCounts(targets=int(targets), pairs=int(pairs), rows=int(rows), images=int(images))

    def forward_backward(self, micro_batches: Sequence[PackedBatch], counts: GlobalCounts) -> StepMetrics:
        """Accumulate the gradients of L over the global batch."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(micro_batches, counts, forward_only=False)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[PackedBatch], counts: GlobalCounts) -> StepMetrics:
        """The same losses without gradients."""
        self.model.eval()
        metrics = self._run(micro_batches, counts, forward_only=True)
        self.model.train()
        return metrics

    def _run(self, micro_batches: Sequence[PackedBatch], counts: GlobalCounts, *, forward_only: bool) -> StepMetrics:
        # Shares of a mean over the global batch: the schedule divides by the micro-batches, DDP by the ranks.
        scale = len(micro_batches) * self.groups.dp.size()

        # Read the lengths back before the first micro-batch runs, so that the schedule itself never waits for the host.
        with_lengths = [(batch, segment_lengths(batch)) for batch in micro_batches]

        def forward_step(batches: Iterator[tuple[PackedBatch, tuple[int, ...]]], model: DistributedDataParallel):
            batch, lengths = next(batches)
            output = model(batch, lengths)
            return output, lambda output: self._loss(output, batch, counts, scale)

        sums: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(with_lengths),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].num_rows,  # a formality: lengths vary and are sent along
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._reduce(sums, counts)

    def _loss(self, output: ModelOutput, batch: PackedBatch, counts: GlobalCounts, scale: int) -> tuple[Tensor, Tensor]:
        lm_sum = generation_loss_sum(
            output.logits, batch.target_ids, vocab_size=self.vocab_size, tp_group=self.groups.tp
        )
        terms = self._contrastive_terms(output, batch)
        contrastive = (terms.image_to_text_sum + terms.text_to_image_sum) / (2 * max(counts.pairs, 1))
        loss = lm_sum / max(counts.targets, 1) + self.objective.contrastive_weight * contrastive
        sums = torch.stack(
            [
                lm_sum,
                terms.image_to_text_sum,
                terms.text_to_image_sum,
                terms.correct_i2t_sum,
                terms.margin_sum,
                terms.margin_count,
                terms.hallucination_correct_sum,
                terms.hallucination_pairs,
                output.temperature.squeeze() / scale,  # adds up to the one value
            ]
        ).detach()
        return loss * scale, sums

    def _contrastive_terms(self, output: ModelOutput, batch: PackedBatch) -> ContrastiveTerms:
        local = PairEmbeddings(
            image=output.image_embeddings,
            caption=output.caption_embeddings,
            hallucinated=output.hallucinated_embeddings,
            hallucinated_owner=batch.hallucinated_owner,
            image_keys=batch.image_keys,
            caption_keys=batch.caption_keys,
            hallucinated_keys=batch.hallucinated_keys,
        )
        gathered = gather_pairs(local, self.groups.dp)
        return contrastive_loss(
            local,
            gathered.pool,
            gathered.first_pair,
            output.temperature,
            hallucination_negatives=self.objective.hallucination_negatives,
            mask_duplicates=self.objective.mask_duplicates,
        )

    def _reduce(self, sums: list[Tensor], counts: GlobalCounts) -> StepMetrics:
        # The last stage's tensor-parallel ranks hold equal sums; one of them speaks for all.
        speaks = self.is_last_stage and self.groups.tp.rank() == 0
        local = torch.stack(sums).double().sum(0).tolist() if speaks else [0.0] * len(_SUMS)
        total = dict(zip(_SUMS, global_sums(local, group=dist.group.WORLD, device=self.device), strict=True))

        def mean(name: str, count: float) -> float:
            return total[name] / count if count else math.nan

        return StepMetrics(
            lm_loss=mean("lm_loss", counts.targets),
            contrastive_i2t=mean("image_to_text", counts.pairs),
            contrastive_t2i=mean("text_to_image", counts.pairs),
            retrieval_accuracy_i2t=mean("correct_i2t", counts.pairs),
            hallucination_margin=mean("margin", total["margin_count"]),
            hallucination_accuracy=mean("hallucination_correct", total["hallucination_pairs"]),
            temperature=total["temperature"],
            counts=counts,
        )

    def update(self, *, loss_is_finite: bool) -> UpdateResult:
        """Clip over all axes and step the optimiser, unless loss or gradients are not finite.

        The norm is the same number on every rank, so all take the same branch.
        """
        optimizer = self.optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not (loss_is_finite and math.isfinite(grad_norm)):
            return UpdateResult(applied=False, grad_norm=grad_norm, num_zeros=None)
        clip_grad = optimizer.config.clip_grad
        parameters = optimizer.get_parameters()
        if clip_grad > 0 and parameters:
            decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm, decoupled)
        num_zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
        optimizer.step_with_ready_grads()
        return UpdateResult(applied=True, grad_norm=grad_norm, num_zeros=num_zeros)
