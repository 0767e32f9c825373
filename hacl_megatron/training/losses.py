"""The losses of one optimiser step: shares of means over the global batch, micro-batch by micro-batch, and what they
add up to.

    L = w_G L_G + lambda (L_v + L_t) / 2 + gamma L_pref
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hacl_megatron.assemble.forward import losses_of_tokens
from hacl_megatron.assemble.run import Run
from hacl_megatron.batch import MicroBatch, PackedBatch
from hacl_megatron.config.flags import PreferenceFlags
from hacl_megatron.model.hacl import ModelOutput
from hacl_megatron.objective.contrastive import ContrastiveTerms
from hacl_megatron.objective.negatives import PairEmbeddings, PairIntegers, concatenate_integers, concatenate_pairs
from hacl_megatron.objective.preference import PreferenceTerms, answer_likelihoods, dpo_terms, mdpo_terms, phrase_terms
from hacl_megatron.training.contrast import CachedGradients, Contrast, pair_embeddings

# Sums over this rank's pairs and twins, in this order.
_PAIR_TERMS = (
    "image_to_text_sum", "text_to_image_sum", "correct_i2t_sum", "margin_sum", "margin_count",
    "hallucination_correct_sum", "hallucination_pairs",
)  # fmt: skip
_TWIN_TERMS = (
    "loss_sum", "correct_sum", "margin_sum", "chosen_reward_sum", "rejected_reward_sum", "chosen_likelihood_sum",
    "rejected_likelihood_sum",
)  # fmt: skip
_SUMS = ("lm_loss", *_PAIR_TERMS, *(f"preference_{name}" for name in _TWIN_TERMS), "temperature")
NUM_SUMS = len(_SUMS)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What the three losses of a step are multiplied by; 0 where nothing is trained."""

    generation: float
    """w_G"""
    contrastive: float
    """Lambda of the step."""
    preference: float
    """Gamma; 0 without `--preference-loss`."""
    beta: float | None = None
    """Of an objective with a reference."""
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, flags: PreferenceFlags, *, contrastive: float) -> "LossWeights":
        gamma = 0.0 if flags.preference_loss == "none" else flags.preference_weight
        return cls(
            generation=flags.generation_weight,
            contrastive=contrastive,
            preference=gamma,
            beta=flags.preference_beta if flags.has_reference else None,
            label_smoothing=flags.preference_label_smoothing,
        )


@dataclass(frozen=True, kw_only=True)
class GlobalCounts:
    """What the losses of a step are divided by: counted over all ranks and micro-batches before the first runs."""

    targets: int
    pairs: int
    twins: int
    """That a likelihood objective compares."""
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
    preference_loss: float
    preference_accuracy: float
    """Share of the twins whose margin is above 0."""
    preference_margin: float
    chosen_reward: float
    """Mean of beta times the log-likelihood of the true answer over the reference's; likewise the twin's."""
    rejected_reward: float
    chosen_likelihood: float
    """Mean of the log-likelihood of the true answer, summed over its compared tokens; likewise the twin's."""
    rejected_likelihood: float
    temperature: float
    weights: LossWeights
    """Of the step."""
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
        """L, for deciding whether the step is finite."""
        parts = (
            (self.weights.generation, self.lm_loss, self.counts.targets),
            (self.weights.contrastive, self.contrastive_loss, self.counts.pairs),
            (self.weights.preference, self.preference_loss, self.counts.twins),
        )
        return sum(weight * loss for weight, loss, count in parts if count)


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What the losses of a step add up to over all ranks, not yet read from the device."""

    sums: Tensor
    """float64 [NUM_SUMS], on the device, the same on every rank."""
    weights: LossWeights
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
            weights=self.weights,
            lm_loss=mean("lm_loss", counts.targets),
            contrastive_i2t=mean("image_to_text_sum", counts.pairs),
            contrastive_t2i=mean("text_to_image_sum", counts.pairs),
            retrieval_accuracy_i2t=mean("correct_i2t_sum", counts.pairs),
            hallucination_margin=mean("margin_sum", total["margin_count"]),
            hallucination_accuracy=mean("hallucination_correct_sum", total["hallucination_pairs"]),
            preference_loss=mean("preference_loss_sum", counts.twins),
            preference_accuracy=mean("preference_correct_sum", counts.twins),
            preference_margin=mean("preference_margin_sum", counts.twins),
            chosen_reward=mean("preference_chosen_reward_sum", counts.twins),
            rejected_reward=mean("preference_rejected_reward_sum", counts.twins),
            chosen_likelihood=mean("preference_chosen_likelihood_sum", counts.twins),
            rejected_likelihood=mean("preference_rejected_likelihood_sum", counts.twins),
            temperature=total["temperature"],
            counts=counts,
            hallucinated=total["margin_count"],
            hallucination_pairs=total["hallucination_pairs"],
        )


class StepLosses:
    """The losses of one step's main pass, micro-batch by micro-batch, on the last stage; and what remains to be
    logged.

    Args:
        measures_at_the_end: the pool of negatives spans micro-batches, and nothing is trained on them, or the
            gradients are cached.
    """

    def __init__(
        self,
        run: Run,
        contrast: Contrast,
        micro_batches: Sequence[MicroBatch],
        counts: GlobalCounts,
        *,
        weights: LossWeights,
        measures_at_the_end: bool,
        forward_only: bool,
    ) -> None:
        self.contrast = contrast
        self.micro_batches = micro_batches
        self.counts = counts
        self.weights = weights
        self.measures_at_the_end = measures_at_the_end
        self.forward_only = forward_only
        # Shares of a mean over the global batch: the schedule divides by the micro-batches, DDP by the ranks.
        self._num_replicas = run.groups.dp.size()
        self.scale: float = len(micro_batches) * self._num_replicas
        if run.groups.cp.size() > 1:
            # Context-parallel ranks make the same of a pack, each of them, and their gradients are summed. DDP divides
            # by their number too, the schedule multiplies by it.
            self.scale /= run.groups.cp.size()
        self.temperature: Tensor | None = None
        self._vocabulary = {"vocab_size": run.config.architecture.language.vocab_size, "tp_group": run.groups.tp}
        self._lm_sums: list[Tensor] = []
        self._terms: list[ContrastiveTerms] = []
        self._twin_terms: list[PreferenceTerms] = []
        self._gradients: list[CachedGradients] | None = None
        self._pairs: list[PairEmbeddings] = []

    def cache_gradients(self, ahead: Sequence[ModelOutput]) -> None:
        """Compute the contrastive loss from the embeddings that ran ahead, before the main pass."""
        pairs = [pair_embeddings(out, batch.main) for out, batch in zip(ahead, self.micro_batches, strict=True)]
        terms, self._gradients = self.contrast.cached_gradients(
            pairs, self._everyone(), ahead[0].temperature, self.counts.pairs, self.weights.contrastive
        )
        self._terms.append(terms)

    def of_micro_batch(self, output: ModelOutput, index: int) -> tuple[Tensor, Tensor]:
        """What megatron-core's schedule asks for: the loss to back-propagate, and something to keep."""
        batch = self.micro_batches[index].main
        token_losses = losses_of_tokens(output, batch, **self._vocabulary)
        lm_sum = token_losses[: batch.num_targets].sum()
        loss = lm_sum / max(self.counts.targets, 1)
        if self.weights.generation != 1.0:
            loss = loss * self.weights.generation
        loss = loss + self._contrastive_share(output, batch, index)
        if batch.num_preferences:
            loss = loss + self._preference_share(token_losses, batch)
        self._lm_sums.append(lm_sum.detach())
        self.temperature = output.temperature.detach()
        return loss * self.scale, lm_sum.detach()

    def _contrastive_share(self, output: ModelOutput, batch: PackedBatch, index: int) -> Tensor:
        if self._gradients is not None:
            return self._gradients[index].surrogate(output)
        if self.measures_at_the_end:
            # Nothing is trained on the terms, but every trained parameter is to be touched.
            pairs = pair_embeddings(output, batch)
            self._pairs.append(pairs)
            return 0.0 * (pairs.image.sum() + pairs.caption.sum() + pairs.hallucinated.sum() + output.temperature.sum())
        everyone = [of_rank[index] for of_rank in self.counts.pairs_of_ranks]
        terms = self.contrast.terms(
            pair_embeddings(output, batch), everyone, output.temperature, with_queue=not self.forward_only
        )
        self._terms.append(terms)
        return self.contrast.share(terms, self.counts.pairs, self.weights.contrastive)

    def _preference_share(self, token_losses: Tensor, batch: PackedBatch) -> Tensor:
        weights = self.weights
        answers = batch.answers_per_twin
        likelihoods = answer_likelihoods(token_losses, batch.preference_tokens, batch.preference_lengths, answers)
        if weights.beta is None:
            terms = phrase_terms(likelihoods)
        else:
            terms = (mdpo_terms if answers == 3 else dpo_terms)(
                likelihoods,
                batch.reference_likelihoods.view(-1, answers),
                beta=weights.beta,
                label_smoothing=weights.label_smoothing,
            )
        self._twin_terms.append(terms)
        return weights.preference * terms.loss_sum / max(self.counts.twins, 1)

    @torch.no_grad()
    def sums(self) -> Tensor:
        """float64 [NUM_SUMS]: this replica's part of `StepSums.sums`, once all micro-batches have run."""
        if self._pairs:
            local = concatenate_pairs(self._pairs)
            terms = self.contrast.terms(local, self._everyone(), self.temperature, with_queue=not self.forward_only)
            self._terms.append(terms)
            self._pairs = []
        parts = [torch.stack(self._lm_sums).double().sum().view(1)]
        for terms, names in ((self._terms, _PAIR_TERMS), (self._twin_terms, _TWIN_TERMS)):
            vectors = [torch.stack([getattr(part, name).detach() for name in names]) for part in terms]
            parts.append(torch.stack(vectors).double().sum(0) if vectors else parts[0].new_zeros(len(names)))
        temperature = self.temperature.double() / self._num_replicas  # adds up to the one value
        return torch.cat([*parts, temperature])

    def _everyone(self) -> list[PairIntegers]:
        """Every rank's integers of the pairs of all micro-batches."""
        return [concatenate_integers(of_rank) for of_rank in self.counts.pairs_of_ranks]
