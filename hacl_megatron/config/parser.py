"""The one parser: flags, and YAML entries turned into the same flags, into the dataclasses of `flags.py`.

A YAML entry is parsed as if it stood on the command line and becomes the flag's default, so that types are converted
in one place and a flag given on the command line beats the file.
"""

from argparse import Action
from collections.abc import Sequence
from dataclasses import fields
from math import isfinite
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from hacl_megatron.config import flags
from hacl_megatron.config.help import FlagHelp
from hacl_megatron.config.names import did_you_mean
from hacl_megatron.config.sections import SECTIONS, sections_with
from hacl_megatron.config.yaml_files.text import NOTHING, Document

GROUPS: dict[str, type] = {
    "model": flags.ModelFlags,
    "lora": flags.LoraFlags,
    "parallel": flags.ParallelFlags,
    "data": flags.DataFlags,
    "objective": flags.ObjectiveFlags,
    "preference": flags.PreferenceFlags,
    "optimizer": flags.OptimizerFlags,
    "training": flags.TrainingFlags,
    "checkpoint": flags.CheckpointFlags,
    "logging": flags.LoggingFlags,
}
"""Attributes of `RunConfig` and the flags behind each."""
assert tuple(GROUPS.values()) == flags.FLAG_GROUPS

HINTS: dict[str, Any] = {name: hint for group in GROUPS.values() for name, hint in get_type_hints(group).items()}
"""Type of every flag."""

ALTERNATIVES = (("micro_batch_size", "micro_batch_tokens"), ("train_iters", "num_train_epochs"))
"""Two ways to say one thing: either on the command line beats the other in the file."""

COMMAND_LINE_ONLY = ("print_config", "dry_run", "world_size", "dry_run_rank")
"""Flags that ask for an action instead of describing a run; no file holds them."""

HELP_ORDER = (
    "model",
    "data",
    "objective",
    "preference",
    "lora",
    "optimizer",
    "training",
    "parallel",
    "checkpoint",
    "logging",
)
"""The groups as a user comes to need them."""
assert {*HELP_ORDER} == {*GROUPS}


class FlagParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are ValueErrors of one line, which takes no abbreviations and helps a reader."""

    def __init__(self) -> None:
        super().__init__(
            list(GROUPS.values()),
            prog="hacl_megatron.train",
            usage="python -m hacl_megatron.train --config FILE.yaml [--flag value ...]",
            description="Trains a multimodal language model. Any flag but those of the last group may stand in "
            "FILE.yaml instead; underscores do as well as dashes. A switch like --bf16 is on when it is named, and "
            "takes true or false too: --bf16 false.",
            formatter_class=FlagHelp,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="Show this and stop.")
        self.add_argument(
            "--config", action="append", metavar="FILE.yaml", default=[],
            help="YAML file of flags (`micro_batch_size: 4`) and of the sections model, transformer, ddp, optimizer. "
            "Flags on the command line override the file.",
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def format_help(self) -> str:
        """Every flag once, under the heading of its group; the generated `--no-...` are accepted, but not shown."""
        actions: dict[str, Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # a flag comes before its `--no-...`
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        formatter.add_arguments([actions["config"]])
        for group in map(GROUPS.__getitem__, HELP_ORDER):
            names = [field.name for field in fields(group) if field.name not in COMMAND_LINE_ONLY]
            _add_section(formatter, group._argument_group_name, group.__doc__, [actions[name] for name in names])
        last = [actions[name] for name in (*COMMAND_LINE_ONLY, "help")]
        _add_section(formatter, "trying out", "For the command line alone; nothing is trained.", last)
        return formatter.format_help()

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Flag groups by their names in `RunConfig`, and the `--config` files.

        Raises:
            ValueError: an unknown flag or a value that its flag cannot take.
        """
        *groups, others, unknown = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        for argument in unknown:
            self._refuse(argument)
        for group in groups:
            for field in fields(group):
                _refuse_beyond_numbers(field.name, getattr(group, field.name))
        return dict(zip(GROUPS, groups, strict=True)), others.config

    def _refuse(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            raise ValueError(f"unexpected argument {argument!r}; every value follows its flag")
        flag = argument.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        known = {option.lstrip("-").replace("_", "-"): None for option in self._option_string_actions}
        advice = did_you_mean(name.replace("_", "-"), known, "run with --help to see all", prefix="--")
        if owners := sections_with(name):
            advice = f"it is a field of megatron-core: write it under `{owners[0]}:` in the --config file"
        elif name.removeprefix("no_") in HINTS and flag.startswith("--no"):
            advice = f"write --{name.removeprefix('no_').replace('_', '-')} false"
        raise ValueError(f"unknown flag {flag}; {advice}")

    def set_from_file(self, document: Document, argv: Sequence[str]) -> dict[str, Any]:
        """Make a file's flags the parser's defaults; returns its sections, keyed as the file has them.

        Args:
            argv: the command line beside the file.

        Raises:
            ValueError: naming file and line, for an unknown key or a value that its flag cannot take.
        """
        sections, values = {}, {}
        for key, value in document.values.items():
            name = key.replace("-", "_")
            if name in values or name in sections:
                raise ValueError(f"{document.where(key)}: {name!r} is given twice, with dashes and with underscores")
            if name in SECTIONS or name == "model":
                sections[name] = value
            elif name in HINTS and name not in COMMAND_LINE_ONLY:
                if key in document.unquoted and NOTHING not in get_args(HINTS[name]):
                    self._refuse_nothing(name, value, document.where(key))
                values[name] = self._convert(name, value, document.where(key))
            else:
                raise ValueError(f"{document.where(key)}: {_unknown_key(name)}")
        given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
        for pair in ALTERNATIVES:
            if len(given.intersection(pair)) == 1:
                for name in pair:
                    values.pop(name, None)
        self.set_defaults(**values)
        return sections

    def _refuse_nothing(self, name: str, value: str, where: str) -> NoReturn:
        default = self.get_default(name)
        advice = "write null or leave the line out" if default is None else f"remove the line for the default {default}"
        raise ValueError(
            f"{where}: {name!r} found {value}, which YAML reads as the text {value!r}; {advice}, or put the text in "
            "quotes if it is meant"
        )

    def _convert(self, name: str, value: Any, where: str) -> Any:
        """A YAML value as the flag would have it."""
        default = self.get_default(name)
        if value is None:
            if default is None or default == []:
                return default
            raise ValueError(f"{where}: {name!r} has no value; give one, or remove the line for the default {default}")
        is_list = get_origin(HINTS[name]) is list
        items = value if is_list and isinstance(value, list) else [value]
        wants_text = get_origin(HINTS[name]) is Literal or str in getattr(HINTS[name], "__args__", [HINTS[name]])
        parsed = []
        for item in items:
            if isinstance(item, list | dict) or item is None:
                raise ValueError(
                    f"{where}: {name!r} found {item!r}, expected {'one value an entry' if is_list else 'one value'}"
                )
            if wants_text and not isinstance(item, str):
                raise ValueError(f"{where}: {name!r} found {item!r}, expected text; put it in quotes")
            try:  # one item at a time and behind `=`, so that an item may begin with a dash
                namespace = self.parse_args([f"--{name}={item}"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            parsed.append(getattr(namespace, name))
        return [item for one in parsed for item in one] if is_list else parsed[0]


def _add_section(formatter: FlagHelp, title: str, text: str, actions: list[Action]) -> None:
    formatter.start_section(title)
    formatter.add_text(text)
    formatter.add_arguments(actions)
    formatter.end_section()


def _refuse_beyond_numbers(name: str, value: Any) -> None:
    """ValueError for a number, alone or in a list, that is NaN, infinite, or beyond the integers of any machine."""
    for number in value if isinstance(value, list) else [value]:
        is_float = isinstance(number, float)
        if (is_float and not isfinite(number)) or (isinstance(number, int) and abs(number) >= 1 << 63):
            found = number if is_float else "beyond any machine's integers"
            raise ValueError(f"--{name.replace('_', '-')} is {found}, expected a finite number")


def _unknown_key(name: str) -> str:
    known = [key for key in (*HINTS, *SECTIONS) if key not in COMMAND_LINE_ONLY]
    advice = did_you_mean(name, known, "run with --help to see all flags")
    if name in COMMAND_LINE_ONLY:
        advice = f"--{name.replace('_', '-')} is for the command line alone"
    elif owners := sections_with(name):
        advice = f"it is a field of megatron-core: write it under `{owners[0]}:`"
    return f"unknown key {name!r}; {advice}"
