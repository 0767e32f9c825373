"""YAML sections whose entries are handed to megatron-core: `transformer:`, `ddp:` and `optimizer:`.

Of the fields of the three dataclasses those can be set that do something here. Not those that a flag, the checkpoint or
the trainer owns: two places for one setting would contradict each other sooner or later. `field_tables` has them all.
megatron-core is imported only when a section is not empty.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, get_type_hints

from hacl_megatron.config.console import quiet_imports
from hacl_megatron.config.field_tables import REFUSED, TAKEN
from hacl_megatron.config.names import did_you_mean
from hacl_megatron.config.yaml_files.typed import convert, underscored

SECTIONS = {
    "transformer": "megatron.core.transformer.transformer_config.TransformerConfig",
    "ddp": "megatron.core.distributed.distributed_data_parallel_config.DistributedDataParallelConfig",
    "optimizer": "megatron.core.optimizer.optimizer_config.OptimizerConfig",
}

_NEW = "this megatron-core is newer than the trainer, which has not been tried with it"


@cache
def field_hints(section: str) -> dict[str, Any]:
    """Public fields of a section's megatron-core dataclass and their types, as the installed version has them."""
    module, _, name = SECTIONS[section].rpartition(".")
    with quiet_imports():
        record = getattr(importlib.import_module(module), name)
        hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record) if not field.name.startswith("_")}


def sections_with(name: str) -> list[str]:
    """Sections that take a field of this name."""
    return [section for section in SECTIONS if name in field_hints(section) and reason_to_refuse(section, name) is None]


def check_section(section: str, values: Any, where: str) -> dict[str, Any]:
    """The section with underscores in its keys and its values as YAML has them, all of them checked.

    Raises:
        ValueError: naming `where`, for an unknown field (with the nearest ones), one that is set elsewhere, or a value
            of another type.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: found {values!r} under {section!r}, expected a mapping of megatron-core's fields")
    values = underscored(values, where)
    for name, value in values.items():
        if (reason := reason_to_refuse(section, name)) is not None:
            raise ValueError(f"{where}: {section}.{name} cannot be set here; {reason}")
        hints = field_hints(section)
        if name not in hints:
            free = [field for field in hints if reason_to_refuse(section, field) is None]
            record = SECTIONS[section].rpartition(".")[2]
            advice = did_you_mean(name, free, f"see megatron-core's {record}")
            raise ValueError(f"{where}: {record} has no field {name!r}; {advice}")
        try:
            _convert_field(section, name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {section}.{name}: {error}") from None
    return values


def megatron_fields(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The checked section as arguments of its megatron-core dataclass: names become enum members and dtypes."""
    return {name: _convert_field(section, name, value) for name, value in values.items()}


def _convert_field(section: str, name: str, value: Any) -> Any:
    return convert(value, field_hints(section)[name])


def reason_to_refuse(section: str, name: str) -> str | None:
    """Why a field of megatron-core is not taken from the YAML, or what to use instead; None for one that is."""
    if any(name in names for names in TAKEN[section].values()):
        return None
    patterns = [(pattern, reason) for reason, names in REFUSED[section].items() for pattern in names]
    exact = next((reason for pattern, reason in patterns if pattern == name), None)
    if exact is not None:
        return exact
    found = next((reason for pattern, reason in patterns if fnmatchcase(name, pattern)), None)
    return found if found is not None or name not in field_hints(section) else _NEW


@contextmanager
def refusals_of(section: str) -> Iterator[None]:
    """What megatron-core has against a configuration that is built inside, as one line for the user."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        message = " ".join(str(error).split()) or "an assertion without a message"
        raise ValueError(f"{section}: megatron-core refuses the configuration ({message}); correct it") from error
