"""How many processes there are, from what started them."""

import pytest

from hacl_megatron.config.console import LaunchError, report_error
from hacl_megatron.config.layout import launched_as, world_size_from_environment


def test_several_slurm_tasks_without_torchrun_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(ValueError, match="srun started 8 tasks without torchrun"):
        world_size_from_environment()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert world_size_from_environment() == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "x"}, ["WORLD_SIZE is 'x'", "whole number"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        ({"WORLD_SIZE": "²"}, ["WORLD_SIZE is '²'"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE is not set", "RANK is"]),
        ({"RANK": None}, ["RANK is not set", "WORLD_SIZE is"]),
        ({"RANK": "2"}, ["RANK is 2, WORLD_SIZE 2"]),
        ({"RANK": "-1"}, ["RANK is '-1'"]),
        ({"LOCAL_RANK": "one"}, ["LOCAL_RANK is 'one'"]),
        ({"MASTER_PORT": None}, ["MASTER_PORT is not set"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT is 'http'"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT is 70000"]),
        ({"MASTER_ADDR": None}, ["MASTER_ADDR is not set"]),
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
        ({"MASTER_ADDR": "no such host.invalid"}, ["MASTER_ADDR is 'no such host.invalid'"]),
    ],
)
def test_what_a_launcher_did_not_set_or_set_wrongly_is_named_by_every_rank(changes, words, monkeypatch, capsys):
    """Catches a traceback of int(), a wait of half an hour, and a rank whose word nobody else can say."""
    right = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**right, **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as refusal:
        world_size_from_environment()
    assert report_error(refusal.value)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line


def test_a_process_alone_needs_no_address(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launched_as() is None and world_size_from_environment() == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_as() is None and world_size_from_environment() == 1
