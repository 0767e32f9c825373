"""The likelihood objectives against TRL's, and log-softmax and sums written out, with gradients by autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from hacl_megatron.objective.preference import answer_likelihoods, dpo_terms, mdpo_terms, phrase_terms
from tests.objective.trl_oracle import trl_dpo


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


def test_dpo_is_trl_s_loss_with_its_gradients_and_rewards() -> None:
    """Answers of unequal lengths, beta other than 1, a reference other than the model."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([3, 5, 1, 2, 6, 6])
    losses = torch.rand(int(lengths.sum()), generator=generator).mul(4).requires_grad_()
    reference = -10 * torch.rand(3, 2, generator=generator)
    answers = (-losses).split(lengths.tolist())
    expected, logged = trl_dpo(list(answers[::2]), list(answers[1::2]), reference, beta=0.3)
    (wanted,) = torch.autograd.grad(expected, losses, retain_graph=True)

    likelihoods = answer_likelihoods(losses, torch.arange(len(losses)), lengths)
    terms = dpo_terms(likelihoods, reference.double(), beta=0.3)
    torch.testing.assert_close(terms.loss_sum / 3, expected, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(terms.loss_sum / 3, losses)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    ours = {
        "rewards/chosen": terms.chosen_reward_sum,
        "rewards/rejected": terms.rejected_reward_sum,
        "rewards/accuracies": terms.correct_sum,
        "rewards/margins": terms.margin_sum,
        "logps/chosen": terms.chosen_likelihood_sum,
        "logps/rejected": terms.rejected_likelihood_sum,
    }
    for tag, total in ours.items():
        assert float(total) / 3 == pytest.approx(logged[tag], rel=1e-5), tag


def test_label_smoothing_takes_a_share_of_the_twins_for_the_true_answers() -> None:
    likelihoods = torch.tensor([[-3.0, -5.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -4.5]], dtype=torch.float64)
    margin = 0.1 * ((-3 + 4) - (-5 + 4.5))
    expected = 0.8 * math.log(1 + math.exp(-margin)) + 0.2 * math.log(1 + math.exp(margin))
    terms = dpo_terms(likelihoods, reference, beta=0.1, label_smoothing=0.2)
    assert float(terms.loss_sum) == pytest.approx(expected, rel=1e-12)


def test_where_model_and_reference_are_one_dpo_costs_log_2_whatever_the_lengths() -> None:
    likelihoods = torch.tensor([[-300.0, -2.0], [-1.0, -1.0]])
    assert float(dpo_terms(likelihoods, likelihoods.double(), beta=0.1).loss_sum) == pytest.approx(2 * math.log(2))


def test_mdpo_adds_the_images_and_the_anchor_to_dpo() -> None:
    """Equations 5 to 8 of Wang et al. 2024 written out, with gradients; margins are those of the dpo part."""
    generator = torch.Generator().manual_seed(3)
    likelihoods = (-20 * torch.rand(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -20 * torch.rand(4, 3, generator=generator, dtype=torch.float64)
    chosen, rejected, cropped = (likelihoods - reference).T
    parts = (chosen - rejected, chosen - cropped, chosen)
    expected = sum(-torch.log(1 / (1 + torch.exp(-0.1 * part))).sum() for part in parts)
    terms = mdpo_terms(likelihoods, reference, beta=0.1)
    torch.testing.assert_close(terms.loss_sum, expected, rtol=1e-12, atol=0)
    wanted, found = (
        torch.autograd.grad(loss, likelihoods, retain_graph=True)[0] for loss in (expected, terms.loss_sum)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.margin_sum, 0.1 * (chosen - rejected).detach().sum())
