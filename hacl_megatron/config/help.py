"""How `--help` reads: each flag once, with dashes, the kind of its value, and its default where the text names none."""

import textwrap
from argparse import SUPPRESS, Action, HelpFormatter
from typing import Any

from transformers.hf_argparser import string_to_bool


class FlagHelp(HelpFormatter):
    """Help of a parser that knows every flag with underscores and with dashes, wrapped to the terminal."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _format_action_invocation(self, action: Action) -> str:
        """`--lr X`; a switch that is off needs no value, one that is on is given `false`."""
        names = ", ".join(option for option in action.option_strings if "_" not in option)
        if action.default is False or action.nargs == 0:
            return names
        if action.type is string_to_bool:
            return f"{names} {{true,false}}"
        return f"{names} {self._format_args(action, {int: 'N', float: 'X'}.get(action.type, 'NAME'))}"

    def _get_help_string(self, action: Action) -> str:
        default = action.default
        if "Default:" in action.help or any(default is none for none in (None, False, SUPPRESS)) or default == []:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        elif isinstance(default, bool):
            default = "true"
        return f"{action.help} Default: {f'{default:g}' if isinstance(default, float) else default}."

    def _split_lines(self, text: str, width: int) -> list[str]:
        """A flag's name inside a text is never broken at its dashes, nor a default from its heading."""
        text = " ".join(text.split()).replace("Default: ", "Default:\xa0")
        return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width - len(indent))), indent)
