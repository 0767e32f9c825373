"""A likelihood objective on an answer y⁺ and its hallucinated twin y⁻ behind one prompt x, as sums over twins.

    phrase  -log σ( Σ_{t ∈ E⁺} log π(y⁺_t|x,y⁺_<t) - Σ_{t ∈ E⁻} log π(y⁻_t|x,y⁻_<t) )

after HALVA (Sarkar et al. 2025, arXiv 2405.18654): E± are the tokens in which the two answers differ, which
`hacl_megatron.data.preferences` finds. The language-model loss on the true answers is its anchor.

    dpo     -log σ( β [ r(y⁺) - r(y⁻) ] ),   r(y) = log π(y|x) - log π₀(y|x)

Rafailov et al. 2023, equation 7, with π₀ the weights that the run started from. Label smoothing ε, the share of twins
that are taken to be the true answer: (1 - ε) times that, and ε times the same with the two exchanged (Mitchell 2023).

    mdpo    dpo - log σ( β [ r(y⁺,x) - r(y⁺,x̃) ] ) - log σ( β r(y⁺,x) - δ ),   δ = 0

Wang et al. 2024, arXiv 2406.11839: x̃ is the same prompt with a crop of the image (`hacl_megatron.data.preferences`).

How a trainer combines it. With P_global the twins of the global batch, over all ranks and micro-batches, a rank's share
of the mean is `loss_sum / max(P_global, 1)`. The loss is the sum of the shares over data-parallel ranks; nothing is
gathered.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class PreferenceTerms:
    """Sums over this rank's twins, fp32 []; add them over ranks, then divide by the twins of the global batch.

    Only the first carries gradients.
    """

    loss_sum: Tensor
    """Σ of the objective."""
    correct_sum: Tensor
    """Twins whose margin is above 0."""
    margin_sum: Tensor
    """Σ of what stands inside σ."""
    chosen_reward_sum: Tensor
    """Σ β r(y⁺); 0 without a reference, as the next is."""
    rejected_reward_sum: Tensor
    """Σ β r(y⁻)"""
    chosen_likelihood_sum: Tensor
    """Σ log π(y⁺|x), over the compared tokens."""
    rejected_likelihood_sum: Tensor
    """Σ log π(y⁻|x), likewise."""


def answer_likelihoods(token_losses: Tensor, tokens: Tensor, lengths: Tensor, answers: int = 2) -> Tensor:
    """Log-likelihoods of answers, summed over their compared tokens: fp32 [P, A], of the true answers and the twins,
    and, with A = 3, of the true answers behind a crop.

    Args:
        token_losses: fp32 [K + J], minus the log-likelihood of each token (`generation_losses`).
        tokens: int64 [E] (`PackedBatch.preference_tokens`).
        lengths: int64 [A P] (`PackedBatch.preference_lengths`); an answer without tokens has a sum of 0.
        answers: A, `PackedBatch.answers_per_twin`.
    """
    # `unsafe` leaves out a check of the lengths, which would wait for the device.
    sums = torch.segment_reduce(-token_losses.index_select(0, tokens), "sum", lengths=lengths, unsafe=True)
    return sums.view(-1, answers)


def phrase_terms(likelihoods: Tensor) -> PreferenceTerms:
    """The objective's terms (see the module's head) of `answer_likelihoods` [P, 2]."""
    margins = likelihoods[:, 0] - likelihoods[:, 1]
    return _terms(-F.logsigmoid(margins), margins, likelihoods, torch.zeros_like(likelihoods))


def dpo_terms(likelihoods: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> PreferenceTerms:
    """The same for `dpo`, of `answer_likelihoods` [P, 2] over whole answers and π₀'s own [P, 2]."""
    rewards = beta * (likelihoods - reference.to(likelihoods.dtype))
    margins = rewards[:, 0] - rewards[:, 1]
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return _terms(losses, margins, likelihoods, rewards)


def mdpo_terms(likelihoods: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> PreferenceTerms:
    """The same for `mdpo`, of [P, 3] and [P, 3]. Margins and rewards are those of its `dpo` part."""
    dpo = dpo_terms(likelihoods[:, :2], reference[:, :2], beta=beta, label_smoothing=label_smoothing)
    rewards = beta * (likelihoods - reference.to(likelihoods.dtype))
    of_images = -F.logsigmoid(rewards[:, 0] - rewards[:, 2])
    anchor = -F.logsigmoid(rewards[:, 0])
    return replace(dpo, loss_sum=dpo.loss_sum + (of_images + anchor).sum())


def _terms(losses: Tensor, margins: Tensor, likelihoods: Tensor, rewards: Tensor) -> PreferenceTerms:
    margins = margins.detach()
    chosen_reward, rejected_reward = rewards.detach().sum(0)
    chosen_likelihood, rejected_likelihood = likelihoods.detach().sum(0)
    return PreferenceTerms(
        loss_sum=losses.sum(),
        correct_sum=(margins > 0).sum().to(likelihoods.dtype),
        margin_sum=margins.sum(),
        chosen_reward_sum=chosen_reward,
        rejected_reward_sum=rejected_reward,
        chosen_likelihood_sum=chosen_likelihood,
        rejected_likelihood_sum=rejected_likelihood,
    )
