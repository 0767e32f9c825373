"""One line to the user from a program that runs as thousands of processes.

The rank is read from what the launcher set (torchrun, or srun alone), since nothing here may wait for
`torch.distributed`: a wrong flag is reported before any process group exists.
"""

import os
import sys
from typing import NoReturn


def _first(*variables: str) -> bool:
    """Whether the first of these environment variables that is set says 0; True when none is."""
    return next((os.environ[name] for name in variables if name in os.environ), "0") == "0"


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for the run."""
    return _first("RANK", "SLURM_PROCID")


def notify(line: str) -> None:
    """Print `line` once for the whole run."""
    if is_first_rank():
        print(line, flush=True)


def exit_with_error(error: ValueError | str) -> NoReturn:
    """Leave with status 2 and one line on stderr, no traceback.

    One process of every node speaks, because a missing file may be missing on one node alone.
    """
    if _first("LOCAL_RANK", "SLURM_LOCALID"):
        print(f"hacl_megatron: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)
