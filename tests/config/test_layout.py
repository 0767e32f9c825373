"""How many processes there are, from what started them."""

import pytest

from hacl_megatron.config.layout import world_size_from_environment


def test_several_slurm_tasks_without_torchrun_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="srun started 8 tasks without torchrun"):
        world_size_from_environment()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size_from_environment() == 8
