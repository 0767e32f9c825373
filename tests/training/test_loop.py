"""What the loop says and counts beside its steps, on objects that hold what it looks at."""

from types import SimpleNamespace

import pytest

from hacl_megatron.training.loop import Trainer
from hacl_megatron.training.state import Progress
from hacl_megatron.training.step import UpdateResult


def test_a_skipped_step_is_said_with_how_many_there_were() -> None:
    """Catches steps that are skipped in silence, which no log line without --log-interval would show."""
    said: list[str] = []
    loop = SimpleNamespace(progress=Progress(iteration=6, skipped_steps=3, consecutive_skips=1), _say=said.append)
    loop.run = SimpleNamespace(layout=SimpleNamespace(global_batch_size=8))
    Trainer._advance(loop, None, UpdateResult(applied=False, grad_norm=float("nan"), num_zeros=None))
    assert said == ["step 7 skipped: loss or gradients not finite (2 in a row, 4 in all)"]


class Heard(Exception):
    pass


def test_each_step_begins_with_a_sign_of_life() -> None:
    """Without it the watchdog ends every run that is longer than its timeout."""

    def beat() -> None:
        raise Heard

    with pytest.raises(Heard):
        Trainer.train(SimpleNamespace(loader=None, progress=Progress(), train_iters=1, beat=beat))
