"""The likelihood objective against log-softmax and sums written out, with gradients by autograd."""

import torch
from torch.nn import functional as F

from hacl_megatron.objective.preference import answer_likelihoods, phrase_terms


def test_sums_and_gradients_are_those_of_a_loop_over_twins() -> None:
    """Tokens shared by two twins, an answer of one token, and one without any, in which the two do not differ."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (7,), generator=generator)
    twins = [([0, 1, 2], [4]), ([0, 1, 2], [5, 6]), ([], [3, 4])]
    likelihoods = logits.log_softmax(-1)[torch.arange(7), ids]
    margins = torch.stack([likelihoods[chosen].sum() - likelihoods[rejected].sum() for chosen, rejected in twins])
    expected = (1 + torch.exp(-margins)).log().sum()
    (wanted,) = torch.autograd.grad(expected, logits)

    losses = F.cross_entropy(logits, ids, reduction="none")
    tokens = torch.tensor([token for chosen, rejected in twins for token in (*chosen, *rejected)])
    lengths = torch.tensor([len(side) for twin in twins for side in twin])
    terms = phrase_terms(answer_likelihoods(losses, tokens, lengths))
    torch.testing.assert_close(terms.loss_sum, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.margin_sum, margins.sum(), rtol=1e-12, atol=0)
    assert terms.correct_sum == (margins > 0).sum()
    (found,) = torch.autograd.grad(terms.loss_sum, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_margin_of_nothing_is_no_hit_and_costs_log_2() -> None:
    """Two answers of equal likelihood are not told apart."""
    terms = phrase_terms(torch.tensor([[-3.0, -3.0], [-1.0, -50.0]]))
    assert terms.correct_sum == 1
    torch.testing.assert_close(terms.loss_sum, torch.tensor(2.0).log())


def test_margins_beyond_the_exponent_of_fp32_stay_finite() -> None:
    likelihoods = torch.tensor([[-500.0, -1.0]], requires_grad=True)
    terms = phrase_terms(likelihoods)
    terms.loss_sum.backward()
    assert terms.loss_sum == 499.0 and likelihoods.grad.tolist() == [[-1.0, 1.0]]
