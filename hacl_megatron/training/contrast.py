"""The contrastive part of a step: from embeddings of micro-batches to loss terms, and to gradients of embeddings.

Three ways, by when the embeddings of the whole pool are known:

    at once   the pool is this micro-batch of all data-parallel ranks (and the queue): autograd does everything
    cached    the pool spans micro-batches, whose embeddings a forward-only pass has collected: the loss gives each
              embedding its gradient, and each micro-batch of the main pass back-propagates <embedding, gradient>
    after     nothing is trained on it (validation): embeddings are collected and the terms computed at the end
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hacl_megatron.batch import PackedBatch
from hacl_megatron.config.flags import ObjectiveFlags
from hacl_megatron.model.hacl import ModelOutput
from hacl_megatron.objective.contrastive import ContrastiveTerms, contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings, PairIntegers, concatenate_pairs, gather_pairs
from hacl_megatron.objective.queue import NegativeQueue


@dataclass(frozen=True, kw_only=True)
class CachedGradients:
    """Gradients of one micro-batch's embeddings under the loss over the whole pool."""

    image: Tensor
    """fp32 [N, d]"""
    caption: Tensor
    """fp32 [N, d]"""
    hallucinated: Tensor
    """fp32 [M, d]"""
    temperature: Tensor
    """fp32 [1]: an equal part of this rank's gradient of the temperature for each micro-batch."""

    def surrogate(self, output: ModelOutput) -> Tensor:
        """[], whose gradients with respect to embeddings and temperature are the cached ones."""
        return (
            (output.image_embeddings * self.image).sum()
            + (output.caption_embeddings * self.caption).sum()
            + (output.hallucinated_embeddings * self.hallucinated).sum()
            + (output.temperature * self.temperature).sum()
        )


class Contrast:
    """Loss terms over the pool that the flags ask for. Every rank of `group` calls every method at the same times.

    Args:
        queue: earlier pairs; None without `--contrastive-negatives queue`.
        group: data-parallel group.
    """

    def __init__(self, objective: ObjectiveFlags, queue: NegativeQueue | None, group: ProcessGroup) -> None:
        self.objective = objective
        self.queue = queue
        self.group = group
        self._new_pairs: list[PairEmbeddings] = []

    def terms(
        self, local: PairEmbeddings, everyone: Sequence[PairIntegers], temperature: Tensor, *, with_queue: bool
    ) -> ContrastiveTerms:
        """Sums over this rank's pairs `local` against all ranks' (and the queue's).

        everyone: every rank's integers of these pairs.
        """
        gathered = gather_pairs(local, self.group, everyone)
        queue = self.queue if with_queue else None
        if queue is not None:
            self._new_pairs.append(gathered.pool)
        return contrastive_loss(
            local,
            gathered.pool,
            gathered.first_pair,
            temperature,
            hallucination_negatives=self.objective.hallucination_negatives,
            hallucination_weight=self.objective.hallucination_weight,
            mask_duplicates=self.objective.mask_duplicates,
            queue=None if queue is None else queue.pairs,
        )

    def share(self, terms: ContrastiveTerms, num_pairs: int, weight: float) -> Tensor:
        """This rank's share of `weight` (L_v + L_t) / 2, [], for `num_pairs` pairs in the global batch."""
        sums = terms.image_to_text_sum + terms.text_to_image_sum
        return weight * sums / (2 * max(num_pairs, 1))

    def cached_gradients(
        self,
        micro_batches: Sequence[PairEmbeddings],
        everyone: Sequence[PairIntegers],
        temperature: Tensor,
        num_pairs: int,
        weight: float,
    ) -> tuple[ContrastiveTerms, list[CachedGradients]]:
        """Terms over all of `micro_batches` (embeddings without gradients), and each one's gradients.

        everyone: every rank's integers of the pairs of all its micro-batches.
        """
        sizes = [(pairs.num_pairs, pairs.num_hallucinated) for pairs in micro_batches]
        with torch.enable_grad():
            local = concatenate_pairs(micro_batches)
            for embeddings in (local.image, local.caption, local.hallucinated):
                assert not embeddings.requires_grad
                embeddings.requires_grad_()
            leaf = temperature.detach().clone().requires_grad_()
            terms = self.terms(local, everyone, leaf, with_queue=True)
            self.share(terms, num_pairs, weight).backward()
        pairs, hallucinated = [size for size, _ in sizes], [size for _, size in sizes]
        if local.hallucinated.grad is None:  # no negatives of anything
            local.hallucinated.grad = torch.zeros_like(local.hallucinated)
        per_micro_batch = zip(
            local.image.grad.split(pairs),
            local.caption.grad.split(pairs),
            local.hallucinated.grad.split(hallucinated),
            strict=True,
        )
        temperature_part = leaf.grad / len(micro_batches)
        return terms, [
            CachedGradients(image=image, caption=caption, hallucinated=hallucinated, temperature=temperature_part)
            for image, caption, hallucinated in per_micro_batch
        ]

    def remember(self) -> None:
        """Put this step's pairs into the queue: once its gradients were found finite."""
        for pairs in self._new_pairs:
            self.queue.push(_in_order_of_keys(pairs))
        self._new_pairs.clear()

    def forget(self) -> None:
        """Drop this step's pairs."""
        self._new_pairs.clear()


def pair_embeddings(output: ModelOutput, batch: PackedBatch) -> PairEmbeddings:
    """The pairs of one micro-batch."""
    return PairEmbeddings(
        image=output.image_embeddings,
        caption=output.caption_embeddings,
        hallucinated=output.hallucinated_embeddings,
        **vars(pair_integers(batch)),
    )


def pair_integers(batch: PackedBatch) -> PairIntegers:
    """What the hosts know of the pairs of one micro-batch."""
    return PairIntegers(
        hallucinated_owner=batch.hallucinated_owner,
        image_keys=batch.image_keys,
        caption_keys=batch.caption_keys,
        hallucinated_keys=batch.hallucinated_keys,
    )


def _in_order_of_keys(pairs: PairEmbeddings) -> PairEmbeddings:
    """The same pairs in an order that no layout decides, so that everywhere the same ones leave the queue first."""
    order = pairs.caption_keys.argsort(stable=True)
    order = order[pairs.image_keys[order].argsort(stable=True)]
    owner = order.argsort()[pairs.hallucinated_owner]
    return pairs.select(order, owner.argsort(stable=True), owner)
