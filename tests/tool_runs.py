"""Runs the command-line tools inside the test's process, where their imports are already paid for."""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import run_distributed

TOOLS = Path(__file__).parents[1] / "tools"


def run_tool(name: str, *arguments: object) -> int:
    """The exit status of `python tools/NAME.py ARGUMENTS`."""
    before = sys.argv, sys.path
    sys.path = [str(TOOLS), *sys.path]  # as Python does for a script
    sys.argv = [str(TOOLS / f"{name}.py"), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leave:
        return int(leave.code or 0)
    finally:
        sys.argv, sys.path = before
    return 0


def to_megatron(source: Path, save: Path, *arguments: object) -> Path:
    """Convert; returns `save`."""
    assert run_tool("convert_hf_to_megatron", "--hf-path", source, "--save", save, *arguments) == 0
    return save


def to_hf(save: Path, out: Path, *arguments: object) -> Path:
    """Export; returns `out`."""
    assert run_tool("convert_megatron_to_hf", "--load", save, "--hf-path", out, *arguments) == 0
    return out


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What `function(*arguments)` returns in a process of its own, and all that it prints.

    For tools that put the stand-ins for CUDA in place and join a process group (`--verify`): both would last.
    """
    return run_distributed(_captured, 1, function, arguments)[0]


def _captured(function: Callable[..., Any], arguments: tuple) -> tuple[Any, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        result = function(*arguments)
    return result, printed.getvalue()
