"""Command lines of documents, taken apart and given to the parsers of the programs they name; nothing is run."""

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import parse_run_config

ROOT = Path(__file__).parents[2]
ASSIGNMENT = re.compile(r"[A-Z_]+=")
PREPARATION = re.compile(r"python3\.\d+ -m venv \S+|\. \S+/bin/activate|pip install torch( --index-url \S+)?")
"""Commands around ours, which need no check."""


class _Parsed(BaseException):
    """Ends a program as soon as its command line has been parsed."""


def split_commands(text: str) -> list[list[str]]:
    """The commands of a block of shell, as lists of words, without comments, variables, redirections and `nohup`."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word not in ("&&", "&"):
                command.append(word)
            elif command:
                commands.append(_bare(command))
                command = []
    return commands


def _bare(words: list[str]) -> list[str]:
    while words and (ASSIGNMENT.match(words[0]) or words[0] == "nohup"):
        words = words[1:]
    end = next((i for i, word in enumerate(words) if word.startswith((">", "2>"))), len(words))
    return words[:end]


def check_command(words: list[str], find_config: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the command's program exists and takes every one of its flags.

    Args:
        find_config: from the name behind `--config` to a file that exists.
    """
    program, arguments = words[0], words[1:]
    if PREPARATION.fullmatch(" ".join(words)):
        return
    if program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        processes = int(launch.nproc_per_node) * int(launch.nnodes.rpartition(":")[2])
        if launch.module:
            _check_module(launch.training_script, launch.training_script_args, find_config, processes)
        else:
            script = ROOT / launch.training_script
            _check_program(script, launch.training_script_args, find_config, monkeypatch, processes)
    elif program == "python" and arguments[0] == "-m":
        _check_module(arguments[1], arguments[2:], find_config, processes=1)
    elif program == "python":
        _check_program(ROOT / arguments[0], arguments[1:], find_config, monkeypatch)
    elif program in ("bash", "sbatch"):
        while program == "sbatch" and arguments[0].startswith("--"):  # its own options: --array=0-15
            del arguments[0]
        _check_script(ROOT / arguments[0], arguments[1:], monkeypatch)
    elif program == "pip":
        for name in arguments[arguments.index("-e") + 1 :]:
            assert set(re.findall(r"\w+", name)) <= extras(), f"setup.py has no such extra: {name}"
    else:
        pytest.fail(f"this test knows no program {program!r}")


def _check_module(name: str, arguments: list[str], find_config: Callable[[str], str], processes: int) -> None:
    if name == "hacl_megatron.train":
        _check_training(arguments, find_config, processes)
        return
    found = importlib.util.find_spec(name)
    assert found is not None, f"no module {name}"
    source = Path(found.origin).read_text(encoding="utf-8")
    for flag in flags_of(arguments):
        assert f'"{flag}"' in source, f"{name} has no flag {flag}"


def _check_training(arguments: list[str], find_config: Callable[[str], str], processes: int) -> None:
    """The trainer's own parser, and its checks but for files."""
    arguments = list(arguments)
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        arguments[place] = find_config(arguments[place])
    config = parse_run_config(arguments)
    if "--config" in arguments:
        check_flags(config, config.training.world_size or processes, files=False)


def _check_program(
    path: Path,
    arguments: list[str],
    find_config: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    processes: int = 1,
) -> None:
    """Its argparse parser, in this process; what a tool leaves to the trainer goes there."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def known(parser, args=None, namespace=None):
        raise _Parsed(*parse_known_args(parser, args, namespace))

    def all_of(parser, args=None, namespace=None):
        namespace, unknown = parse_known_args(parser, args, namespace)
        if unknown:
            parser.error(f"unknown: {unknown}")
        raise _Parsed(namespace, [])

    with monkeypatch.context() as patch, pytest.raises(_Parsed) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
        patch.setattr(argparse.ArgumentParser, "parse_args", all_of)
        patch.setattr("sys.argv", [path.name, *arguments])
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
    namespace, rest = stopped.value.args
    if rest:
        planned = namespace.nodes * namespace.gpus_per_node if path.name == "plan_run.py" else processes
        _check_training(rest, find_config, planned)


def _check_script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's flags stand in its text; what a Slurm script hands on goes to its tool, or the trainer."""
    text = path.read_text(encoding="utf-8")
    tool = re.search(r'python (tools/\w+\.py) (.*) "\$@"$', text, re.MULTILINE)
    if path.suffix == ".sbatch" and tool is not None:
        _check_program(ROOT / tool[1], [*shlex.split(tool[2]), *arguments], str, monkeypatch)
    elif path.suffix == ".sbatch":
        _check_training(arguments, str, 1)
    elif path.name == "chain.sh":
        assert (path.parent / f"pretrain_{arguments[0]}.sbatch").is_file()
        if "--preference" in arguments:
            loss = arguments[arguments.index("--preference") + 1]
            assert (path.parent / f"preference_{arguments[0]}.sbatch").is_file(), "no job of a likelihood objective"
            assert (ROOT / f"examples/llava_1_5/{loss}_{arguments[0]}.yaml").is_file(), f"no recipe of {loss}"
        if "--" in arguments:
            _check_training(arguments[arguments.index("--") + 1 :], str, 1)
    else:
        for flag in flags_of(arguments):
            assert re.search(rf"{flag}(?![\w-])", text), f"{path.name} has no flag {flag}"


def flags_of(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("--")]


def extras() -> set[str]:
    """Names in `extras_require` of setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return {key.value for key in node.value.keys}
    raise AssertionError("setup.py has no extras_require")
