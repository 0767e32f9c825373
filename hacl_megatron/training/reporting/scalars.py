"""A run's numbers under their tags: Megatron-LM's where it has the thing."""

import math
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from hacl_megatron.platform.host_groups import host_sums
from hacl_megatron.training.losses import GlobalCounts, StepMetrics
from hacl_megatron.training.trainee import Trainee


def loss_scalars(metrics: StepMetrics) -> dict[str, float]:
    """Losses and what is measured beside them; NaN where the batch has nothing to measure."""
    scalars = {
        "lm loss": metrics.lm_loss,
        "contrastive loss": metrics.contrastive_loss,
        "contrastive loss i2t": metrics.contrastive_i2t,
        "contrastive loss t2i": metrics.contrastive_t2i,
        "retrieval accuracy i2t": metrics.retrieval_accuracy_i2t,
        "hallucination margin": metrics.hallucination_margin,
        "hallucination accuracy": metrics.hallucination_accuracy,
    }
    if metrics.weights.preference:
        scalars |= {
            "preference loss": metrics.preference_loss,
            "preference accuracy": metrics.preference_accuracy,
            "preference margin": metrics.preference_margin,
        }
    if metrics.weights.preference and metrics.weights.beta is not None:  # by the names that TRL gave them
        scalars |= {
            "rewards/chosen": metrics.chosen_reward,
            "rewards/rejected": metrics.rejected_reward,
            "rewards/accuracies": metrics.preference_accuracy,
            "rewards/margins": metrics.preference_margin,
            "logps/chosen": metrics.chosen_likelihood,
            "logps/rejected": metrics.rejected_likelihood,
        }
    return scalars


def mean_losses(batches: Sequence[tuple[StepMetrics, GlobalCounts]]) -> dict[str, float]:
    """Means over validation batches, each over all of what a batch's value is the mean over, not over batches.

    Target tokens, pairs, hallucinated captions for their margin, pairs that have any for the accuracy, twins.
    """
    means = {}
    for tag in loss_scalars(batches[0][0]):
        weighted = [(loss_scalars(metrics)[tag], _weight(tag, metrics, counts)) for metrics, counts in batches]
        finite = [(value, weight) for value, weight in weighted if math.isfinite(value) and weight]
        if finite:
            means[tag] = sum(value * weight for value, weight in finite) / sum(weight for _, weight in finite)
    return means


def _weight(tag: str, metrics: StepMetrics, counts: GlobalCounts) -> float:
    if tag == "lm loss":
        return counts.targets
    if tag.startswith(("preference ", "rewards/", "logps/")):
        return counts.twins
    own = {"hallucination margin": metrics.hallucinated, "hallucination accuracy": metrics.hallucination_pairs}
    return own.get(tag, counts.pairs)


def params_norm(trainee: Trainee) -> float:
    """L2 norm of the trained parameters of the whole model; every rank calls it."""
    trainee.gather_parameters()
    squares = [
        parameter.detach().float().square().sum()
        for parameter in trainee.module.parameters()
        if parameter.requires_grad
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    local = sum(torch.stack(squares).tolist()) if squares else 0.0
    return math.sqrt(host_sums([local], trainee.groups.mp_host)[0])
