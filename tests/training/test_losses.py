"""What a micro-batch's loss is multiplied and divided by, by hand."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from hacl_megatron.training.losses import GlobalCounts, LossWeights, StepLosses
from tests.distributed import run_distributed


def losses_of(weights: list[float], targets: int) -> list[float]:
    """The loss of one micro-batch with one target token, of `targets` in the step, by the weight of L_G."""
    parallel_state.initialize_model_parallel()
    groups = SimpleNamespace(
        dp=parallel_state.get_data_parallel_group(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
    )
    config = SimpleNamespace(architecture=SimpleNamespace(language=SimpleNamespace(vocab_size=4)))
    counts = GlobalCounts(targets=targets, pairs=0, twins=0, rows=1, images=0, pairs_of_ranks=[])
    none = torch.zeros(0, dtype=torch.int64)
    batch = SimpleNamespace(
        target_ids=torch.tensor([2]), rejected_ids=none, num_targets=1, num_preferences=0, share=None
    )
    output = SimpleNamespace(logits=torch.zeros(1, 4, requires_grad=True), temperature=torch.ones(1))
    found = []
    for weight in weights:
        losses = StepLosses(
            SimpleNamespace(groups=groups, config=config),
            None,
            [SimpleNamespace(main=batch)],
            counts,
            weights=LossWeights(generation=weight, contrastive=0.0, preference=0.0),
            measures_at_the_end=False,
            forward_only=False,
        )
        losses._gradients = [SimpleNamespace(surrogate=lambda output: 0.0)]  # no pairs
        loss, lm_sum = losses.of_micro_batch(output, 0)
        assert lm_sum == pytest.approx(torch.tensor(4.0).log())
        found.append(float(loss))
    return found


@pytest.mark.parametrize("targets", [1, 2])
def test_the_weight_of_the_language_model_is_taken_and_its_targets_are_counted(targets: int) -> None:
    """Catches a weight of 2 that is left out, and a step with one target whose loss is halved."""
    (found,) = run_distributed(losses_of, 1, [1.0, 2.0, 0.5], targets)
    log_4 = float(torch.tensor(4.0).log()) / targets
    assert found == pytest.approx([log_4, 2 * log_4, log_4 / 2])
