"""Runs the command-line tools inside the test's process, where their imports are already paid for."""

import runpy
import sys
from pathlib import Path

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
