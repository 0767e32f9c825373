"""What a checkpoint says of a run beside its tensors."""

import random

import numpy as np
import pytest
import torch

from hacl_megatron.platform.random_state import random_states
from hacl_megatron.training import state


def test_every_generator_goes_on_from_its_own_state() -> None:
    """Python's, NumPy's and torch's: a resumed run must draw what the uninterrupted one draws."""
    kept = {"python": random.getstate(), "numpy": np.random.get_state(), **random_states()}

    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()

    first = drawn()
    assert all(one != other for one, other in zip(first, drawn(), strict=True))
    state._restore_random_states(kept)
    assert drawn() == first


def test_weights_alone_are_no_run_to_resume(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(state, "load_common_state", lambda folder: {"iteration": 0})
    with pytest.raises(ValueError, match="converted weights and no run to resume: give it as --pretrained-checkpoint"):
        state.saved_progress(tmp_path)
