"""One line to the user from a program that runs as thousands of processes.

The rank is read from what the launcher set (torchrun, or srun alone), since nothing here may wait for a process group:
a wrong flag is reported before there is one. torchrun's store, which is there from the start, tells who spoke first.
"""

import itertools
import logging
import os
import re
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def _first(*variables: str) -> bool:
    """Whether the first of these environment variables that is set says 0; True when none is."""
    return next((os.environ[name] for name in variables if name in os.environ), "0") == "0"


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for the run."""
    return _first("RANK", "SLURM_PROCID")


_NO_TEXT = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f"  # a terminal obeys them
    "\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"  # unseen; what stands where
    "\\ud800-\\udfff\\U000e0000-\\U000e007f]"  # UTF-8 has none; unseen
)
_NO_TEXT_BUT_LINES = re.compile(_NO_TEXT.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))


def printable(text: str, *, lines: bool = False) -> str:
    """`text` as a terminal may have it, for whatever a user's file says: what is no character to be seen as escapes.

    >>> printable("a\\x1b[2Jb\\n\\ud83d")
    'a\\\\x1b[2Jb\\\\n\\\\ud83d'

    Args:
        lines: line breaks and tabs stay.
    """
    pattern = _NO_TEXT_BUT_LINES if lines else _NO_TEXT
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print what may hold a user's or a stranger's words, from this process."""
    print(printable(text, lines=True), flush=True)


def notify(line: str) -> None:
    """Print `line` once for the whole run."""
    if is_first_rank():
        say(line)


def exit_with_error(error: ValueError | str) -> NoReturn:
    """Leave with status 2 and one line on stderr, no traceback; see `report_error` for who speaks."""
    report_error(error)
    raise SystemExit(2)


def report_error(error: BaseException | str) -> bool:
    """Say a user's mistake in one line on stderr; returns whether this process was the one to speak.

    Of a run's ranks the first to find it speaks, whichever it is (a file may be missing on one node alone), and names
    itself. Ranks that find the same are silent; a rank that finds something else is heard too.
    """
    line = printable(" ".join(str(error).split()))
    speaks = _is_news(line)
    if speaks:
        print(f"hacl_megatron: error: {line}{_named(' ({})')}", file=sys.stderr, flush=True)
    return speaks


def report_crash(error: BaseException) -> bool:
    """Print the traceback of an exception that nobody expected, as `report_error`; what follows from it is not heard.

    A rank that dies takes its connections with it, so that every other rank fails in its next collective.
    """
    last = f"{type(error).__name__}: {error}"
    is_consequence = re.search(r"gloo|nccl|connection|socket|broken pipe|DistNetwork|DistBackend|DistStore", last, re.I)
    speaks = _is_news(last, heard_later=not is_consequence)
    if speaks:
        text = printable("".join(traceback.format_exception(error)).rstrip(), lines=True)
        print(f"hacl_megatron: failed{_named(': {}')}\n{text}", file=sys.stderr, flush=True)
    return speaks


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Without what torch's extensions, megatron-core and GPU libraries warn of when they are imported.

    On a CPU that is every GPU library that is not there.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def rank_and_node() -> str:
    """`rank 3 on n2`, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"


def _named(form: str) -> str:
    return form.format(rank_and_node()) if _num_ranks() > 1 else ""


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_news(text: str, *, heard_later: bool = True) -> bool:
    """Whether no other rank has said `text` before (or, with `heard_later` off, anything)."""
    if _num_ranks() == 1 or "MASTER_PORT" not in os.environ:
        return _first("LOCAL_RANK", "SLURM_LOCALID")
    from datetime import timedelta

    from torch.distributed import TCPStore

    # torchrun counts the starts of its processes; a process that fails several times is a test's.
    key = f"hacl_megatron/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_reports)}"
    own = f"{os.environ['RANK']} {text}"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # The store may be gone with its process: torch would ask for it again and again, and print a page at the end.
        socket.create_connection((address, port), timeout=10).close()
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        first = store.compare_set(key, "", own).decode()
    except Exception:  # better said twice than never
        return heard_later
    return first == own or (heard_later and first.split(" ", 1)[1] != text)


_reports = itertools.count()
