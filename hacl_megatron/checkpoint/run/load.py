"""Loads a run's state through megatron-core's distributed checkpointing; what is damaged is said in one line."""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException  # no Exception, only a BaseException


def state_metadata() -> dict[str, Any]:
    """How megatron-core lays out a state dict: optimiser state in a form that every TP, PP and DP size can read.

    A fresh dictionary each time, for megatron-core writes its process groups into it.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def load_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what the sharded state dict `state` asks for from one checkpoint folder; every rank calls it.

    Raises:
        ValueError: a file of the checkpoint is missing, cut or of other sizes; names the checkpoint.
    """
    with _damage_reported(folder):
        _require_whole_metadata(folder)
        return dist_checkpointing.load(state, str(folder))


def load_common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder holds beside tensors; ValueError names a damaged checkpoint."""
    with _damage_reported(folder):
        _require_whole_metadata(folder)
        return dist_checkpointing.load_common_state_dict(str(folder))


def stored_keys(folder: Path) -> Set[str]:
    """Keys of the tensors and objects that a checkpoint folder holds; ValueError names a damaged checkpoint."""
    with _damage_reported(folder):
        _require_whole_metadata(folder)
        return FileSystemReader(folder).read_metadata().state_dict_metadata.keys()


def _require_whole_metadata(folder: Path) -> None:
    # Before torch looks: it would print the traceback of what it cannot read, and go on without.
    with (folder / ".metadata").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 1))
        if file.read(1) != b".":  # how every pickle ends
            raise EOFError(".metadata is cut short")


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Errors of the loading libraries, which are of any type for files that are not what they were, as ValueError."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        found: BaseException = error
        if isinstance(error, CheckpointException):  # of all ranks; one tells enough
            found = next((failure for failure, _ in error.failures.values()), error)
        lines = str(found).strip().splitlines()
        reason = f"{type(found).__name__}: {lines[0][:300]}" if lines else type(found).__name__
        raise ValueError(
            f"checkpoint {folder} cannot be loaded ({reason}): it is damaged or belongs to another model; load another "
            "iter_* folder"
        ) from error
