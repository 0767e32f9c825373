"""A saved schedule goes on in its place, and says so where that makes the learning rate jump."""

from types import SimpleNamespace

import pytest

from hacl_megatron.config.flags import ObjectiveFlags, OptimizerFlags
from hacl_megatron.training.optimizer.schedule import (
    RunLength,
    build_scheduler,
    contrastive_weight_at,
    default_learning_rate,
    load_schedule,
)


def schedule(steps: float, at: float = 0, **flags):
    given = {"lr": 1e-3, "lr_decay_style": "linear", "lr_warmup_fraction": 0.0, "min_lr": 0.0, **flags}
    built = build_scheduler(SimpleNamespace(param_groups=[]), OptimizerFlags(**given), steps)
    built.step(increment=at)
    return built


def test_the_same_schedule_goes_on_in_silence_and_in_its_place() -> None:
    found = schedule(10)
    assert load_schedule(found, schedule(10, at=4).state_dict(), RunLength(train_iters=10, steps=10)) is None
    assert found.num_steps == 4 and default_learning_rate(found) == pytest.approx(6e-4)


@pytest.mark.parametrize(
    ("steps", "flags", "place", "was", "now"),
    [
        (20, {}, 4, "0.0006", "0.0008"),  # a longer run
        (10, {"lr": 2e-3}, 4, "0.0006", "0.0012"),
        (10, {"lr": 1e-3 * (1 - 1e-5)}, 4, "0.0006", "0.0006"),  # little is told too
        (5, {}, 4, "0.0006", "0.0002"),  # downwards
    ],
)
def test_a_jump_is_told_with_both_rates(steps: float, flags: dict, place: float, was: str, now: str) -> None:
    """Catches a line that compares this run's rate with itself, and one that sees jumps upwards alone."""
    line = load_schedule(
        schedule(steps, **flags), schedule(10, at=place).state_dict(), RunLength(train_iters=7, steps=steps)
    )
    assert line is not None and f"stood at {was}, this run's stands at {now} in" in line, line
    assert "ends at iteration 7," in line


def test_steps_of_another_batch_are_counted_in_this_runs() -> None:
    found = schedule(20)
    length = RunLength(train_iters=20, steps=20, rate_scale=2)
    assert load_schedule(found, schedule(10, at=4).state_dict(), length) is None, "the same place of another count"
    assert found.num_steps == 8


def test_lambda_rises_from_a_ten_thousandth_over_its_share_of_the_steps() -> None:
    """Catches one that falls, and a run without a warm-up whose first step is taken for a part of one."""
    flags = ObjectiveFlags(contrastive_weight=3.0, contrastive_warmup_fraction=0.5)
    found = [contrastive_weight_at(flags, step, 8) for step in (0, 1, 2, 4, 5)]
    assert found == pytest.approx([3e-4, 3e-3, 3e-2, 3, 3])
    flags = ObjectiveFlags(contrastive_weight=3.0, contrastive_warmup_fraction=0.0)
    assert contrastive_weight_at(flags, 1, 8) == 3
