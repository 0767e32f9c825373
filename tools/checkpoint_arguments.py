"""Flags that the tools over a checkpoint share: its layout over processes, and how it sees its data."""

from argparse import Namespace
from argparse import _ArgumentGroup as ArgumentGroup
from dataclasses import fields
from typing import Any, TypeVar

from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.data.templates import template_names

Record = TypeVar("Record")


def add_layout_arguments(group: ArgumentGroup) -> None:
    """Megatron-LM's flags; under torchrun."""
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--context-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--decoder-first-pipeline-num-layers", type=int)
    group.add_argument("--decoder-last-pipeline-num-layers", type=int)


def add_data_arguments(group: ArgumentGroup) -> None:
    """What may differ from the run that left the checkpoint."""
    group.add_argument("--image-folder", metavar="DIR", help="folder, or URL, that image names are relative to")
    group.add_argument("--version", choices=template_names(), help="template (default: the run's own)")
    group.add_argument("--model-max-length", type=int, help="default: the run's own")
    group.add_argument("--image-backend", choices=("auto", "dali", "pillow"), help="default: the run's own")


def filled(kind: type[Record], args: Namespace, **given: Any) -> Record:
    """The dataclass `kind`: its fields as `given`, else from the flags of their names, else their defaults."""
    flags = {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
    return kind(**flags | given)


def load_settings(args: Namespace):
    """How the checkpoint is run, as the flags of this file, `--device` and `--dtype` say."""
    from hacl_megatron.assemble.loaded_model import LoadSettings  # here, for --help to be fast

    return filled(LoadSettings, args, parallel=filled(ParallelFlags, args))
