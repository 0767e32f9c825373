"""Options of the test command."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hacl_megatron")
    group.addoption("--slurm", action="store_true", help="also run tests/slurm: jobs on a real Slurm on this host")
    group.addoption("--full", action="store_true", help="with --slurm: its long forms too")
