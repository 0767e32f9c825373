"""Means over validation batches are means over all that they are made of, however it is spread over the batches."""

from dataclasses import replace

import pytest
import torch

from hacl_megatron.training.losses import _SUMS, GlobalCounts, LossWeights, StepMetrics, StepSums
from hacl_megatron.training.reporting.scalars import loss_scalars, mean_losses


def metrics_of(targets: int, pairs: int, twins: int = 0, **sums: float) -> StepMetrics:
    """As a step reads them: sums over its ranks, and what it counted before."""
    counts = GlobalCounts(targets=targets, pairs=pairs, twins=twins, rows=1, images=1, pairs_of_ranks=[])
    values = torch.tensor([sums.get(name, 0.0) for name in _SUMS], dtype=torch.float64)
    return StepSums(
        sums=values, weights=LossWeights(generation=1.0, contrastive=1.0, preference=1.0), counts=counts
    ).read()


def test_batches_of_unlike_size_give_what_one_batch_of_all_gives() -> None:
    """The margin is a mean over hallucinated captions and its accuracy one over the pairs that have any: weighted by
    pairs, the 8 captions of one pair counted as little as the single one of another."""
    batches = [
        {"targets": 10, "pairs": 1, "lm_loss": 20.0, "correct_i2t_sum": 1, "image_to_text_sum": 3.0, "margin_sum": 8.0,
         "margin_count": 8, "hallucination_correct_sum": 1, "hallucination_pairs": 1,
         "twins": 8, "preference_correct_sum": 8},
        {"targets": 2, "pairs": 4, "lm_loss": 1.0, "correct_i2t_sum": 1, "text_to_image_sum": 2.0, "margin_sum": -1.0,
         "margin_count": 1, "hallucination_correct_sum": 0, "hallucination_pairs": 1, "twins": 1},
        {"targets": 0, "pairs": 3, "correct_i2t_sum": 3},
        {"targets": 0, "pairs": 0},
    ]  # fmt: skip
    together = {key: sum(batch.get(key, 0) for batch in batches) for batch in batches for key in batch}
    steps = [metrics_of(**batch) for batch in batches]
    found = mean_losses([(step, step.counts) for step in steps])
    assert found == pytest.approx(loss_scalars(metrics_of(**together)))
    assert found["hallucination margin"] == pytest.approx(7 / 9) and found["hallucination accuracy"] == 0.5


def test_scalars_of_a_likelihood_objective_are_logged_where_it_trains_alone() -> None:
    """Elsewhere they are NaN, and in the log noise."""
    step = metrics_of(targets=1, pairs=1, twins=2, preference_loss_sum=3.0)
    assert loss_scalars(step)["preference loss"] == 1.5
    assert "preference loss" not in loss_scalars(replace(step, weights=replace(step.weights, preference=0.0)))
