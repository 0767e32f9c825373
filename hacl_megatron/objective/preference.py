"""A likelihood objective on an answer y⁺ and its hallucinated twin y⁻ behind one prompt x, as sums over twins.

    phrase  -log σ( Σ_{t ∈ E⁺} log π(y⁺_t|x,y⁺_<t) - Σ_{t ∈ E⁻} log π(y⁻_t|x,y⁻_<t) )

after HALVA (Sarkar et al. 2025, arXiv 2405.18654): E± are the tokens in which the two answers differ, which
`hacl_megatron.data.preferences` finds. The language-model loss on the true answers is its anchor.

How a trainer combines it. With P_global the twins of the global batch, over all ranks and micro-batches, a rank's share
of the mean is `loss_sum / max(P_global, 1)`. The loss is the sum of the shares over data-parallel ranks; nothing is
gathered.
"""

from dataclasses import dataclass

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


def answer_likelihoods(token_losses: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Log-likelihoods of answers, summed over their compared tokens: fp32 [P, 2], of the true answers and the twins.

    Args:
        token_losses: fp32 [K + J], minus the log-likelihood of each token (`generation_losses`).
        tokens: int64 [E] (`PackedBatch.preference_tokens`).
        lengths: int64 [2 P] (`PackedBatch.preference_lengths`); an answer without tokens has a sum of 0.
    """
    # `unsafe` leaves out a check of the lengths, which would wait for the device.
    sums = torch.segment_reduce(-token_losses.index_select(0, tokens), "sum", lengths=lengths, unsafe=True)
    return sums.view(-1, 2)


def phrase_terms(likelihoods: Tensor) -> PreferenceTerms:
    """The objective's terms (see the module's head) of `answer_likelihoods` [P, 2]."""
    margins = likelihoods[:, 0] - likelihoods[:, 1]
    return PreferenceTerms(
        loss_sum=-F.logsigmoid(margins).sum(),
        correct_sum=(margins.detach() > 0).sum().to(likelihoods.dtype),
        margin_sum=margins.detach().sum(),
    )
