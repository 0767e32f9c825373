"""YAML mappings into dataclasses: every value is held against its field's type hint."""

import dataclasses
import types
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hacl_megatron.config.names import did_you_mean

Record = TypeVar("Record")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def describe(hint: Any) -> str:
    """A type hint in words, for errors."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _WORDS or origin in _WORDS:
        return _WORDS.get(hint) or _WORDS[origin]
    if hint in (None, type(None)):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if hint in (list, tuple) or origin in (list, tuple):
        return "a list"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    if _is_dtype(hint):
        return "one of " + ", ".join(_DTYPES)
    return "something that YAML cannot express"


def convert(value: Any, hint: Any) -> Any:
    """The YAML `value` as an instance of `hint`: a list as a tuple, a name as an enum member or a torch dtype.

    Raises:
        ValueError: `value` is of another type; the text says what was found and what is expected.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return convert(value, argument)
            except ValueError:
                continue
    elif hint in (None, type(None)):
        if value is None:
            return None
    elif origin is Literal:
        if value in arguments:
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # 400 digits
                return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (bool, str, dict) or origin is dict:
        if isinstance(value, origin or hint):
            return value
    elif hint in (list, tuple) or origin in (list, tuple):
        kind = origin or hint
        if isinstance(value, list | tuple):
            if kind is list or not arguments or arguments[-1] is ...:
                return kind(convert(item, arguments[0] if arguments else Any) for item in value)
            if len(value) != len(arguments):
                raise ValueError(f"found {len(value)} values, expected {len(arguments)}")
            return tuple(convert(item, argument) for item, argument in zip(value, arguments, strict=True))
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
    elif _is_dtype(hint) and isinstance(value, str) and value in _DTYPES:
        import torch

        return getattr(torch, _DTYPES[value])
    raise ValueError(f"found {value!r}, expected {describe(hint)}")


def build_record(record: type[Record], values: Any, where: str) -> Record:
    """The dataclass `record` from a YAML mapping; fields that are dataclasses take mappings of their own.

    Raises:
        ValueError: naming `where` and the field, for an unknown or missing field, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: found {values!r}, expected a mapping of {record.__name__}'s fields")
    hints = get_type_hints(record)
    fields = {field.name: field for field in dataclasses.fields(record)}
    arguments = {}
    for key, value in underscored(values, where).items():
        if key not in fields:
            known = f"it has {', '.join(fields)}"
            raise ValueError(f"{where}: unknown field {key!r}; {did_you_mean(key, fields, known)}")
        options = get_args(hints[key]) or (hints[key],)
        inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if inner is not None and not (value is None and type(None) in options):
            arguments[key] = build_record(inner, value, f"{where}.{key}")
            continue
        try:
            arguments[key] = convert(value, hints[key])
        except ValueError as error:
            raise ValueError(f"{where}.{key}: {error}") from None
    for name, field in fields.items():
        if name not in arguments and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: field {name!r} is missing; give it ({describe(hints[name])})")
    return record(**arguments)


def underscored(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with dashes in its keys written as underscores; ValueError for one name in both spellings."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: found the key {key!r}, expected a name")
        name = key.replace("-", "_")
        if name in result:
            raise ValueError(f"{where}: {name!r} is given twice, with dashes and with underscores; keep one")
        result[name] = value
    return result


_DTYPES = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "uint8",
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
}  # fmt: skip
"""Names of dtypes as Megatron-LM's flags have them (its fp8 moments are stored as uint8), and torch's own."""


def _is_dtype(hint: Any) -> bool:
    return isinstance(hint, type) and hint.__module__ == "torch" and hint.__name__ == "dtype"
