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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_LONGEST_LINE = 2000
"""Characters of an error; a file's list of 1,000 names is not one that anyone reads."""


class LaunchError(ValueError):
    """A mistake in what the launcher told this process: the ranks may not find each other, so each says it."""


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
    if len(line) > _LONGEST_LINE:  # a value of a hostile file
        line = f"{line[: _LONGEST_LINE - 500]} ... {line[-400:]}"
    speaks = isinstance(error, LaunchError) or _is_news(line)
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


class _Stream:
    """A text stream whose failures cost lines, not the program: a reader that left (`| head`), a log on a full disk."""

    def __init__(self, stream: Any, name: str, *, may_be_left: bool = False) -> None:
        self._stream, self._name = stream, name
        self._may_be_left = may_be_left
        """A reader that leaves is not worth a word."""
        self.num_lost, self.fails = 0, False
        """Lines that were not written when they should have been; whether the last attempt failed."""
        self._pending, self.is_dead = 0, False

    def write(self, text: str) -> int:
        lines = text.count("\n")
        if self.is_dead or not self._tried(self._stream.write, text):
            self.num_lost += lines
        else:
            self._pending += lines
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._tried(self._stream.flush):
            self.num_lost += self._pending
        self._pending = 0

    def _tried(self, call: Callable[..., object], *arguments: str) -> bool:
        try:
            call(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if isinstance(error, UnicodeError):  # a terminal or log of ASCII
                return self._tried(call, *(text.encode("ascii", "backslashreplace").decode() for text in arguments))
            if not arguments and self._stream.closed:
                return True  # which wrote all of it; at a program's end things are closed in any order
            if not self.fails:
                self.fails = True
                if not (self._may_be_left and isinstance(error, BrokenPipeError)):
                    self._say_elsewhere(getattr(error, "strerror", None) or str(error))
            if isinstance(error, BrokenPipeError):
                self.is_dead = True  # its reader does not come back
                _to_nowhere(self._stream)
            return False
        self.fails = self.fails and not arguments  # what was kept in a buffer may have gone out, or not
        return True

    def _say_elsewhere(self, why: str) -> None:
        line = f"hacl_megatron: {self._name} cannot be written ({why}): its lines are lost, the work goes on\n"
        other = sys.stdout if self._name == "standard error" else sys.stderr
        with suppress(OSError, ValueError):
            if not getattr(other, "fails", False):
                other.write(line)
                other.flush()

    def settle(self) -> None:
        """Let nothing be left that Python would fail to write at its end, with a status of its own."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def streams_that_may_fail(*, output_is_all: bool = False) -> Iterator[None]:
    """Standard output and error as streams that lose lines where they cannot be written, as long as the context lasts.

    With `output_is_all`, the program has done nothing where its standard output is not written: status 1, except for a
    reader that has left (`| head`), which had what it wanted.

    Descriptors that are closed are opened on nothing: the next file that is opened would get the number, and with it
    whatever a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # lives as long as the process
    for name, words in (("stdout", "standard output"), ("stderr", "standard error")):
        may_be_left = output_is_all and name == "stdout"
        setattr(sys, name, _Stream(getattr(sys, name) or nowhere, words, may_be_left=may_be_left))
    _open_streams[:] = [sys.stdout, sys.stderr]
    try:
        yield
    finally:
        output = _open_streams[0]
        output.flush()
        failed = output_is_all and output.num_lost and not output.is_dead
        for stream in _open_streams:
            stream.settle()
        sys.stdout, sys.stderr = before
        if failed:
            raise SystemExit(1)


_open_streams: list[Any] = []


def lost_lines() -> int:
    """Lines of this process that could not be written to standard output or error."""
    return sum(stream.num_lost for stream in _open_streams)


def _to_nowhere(stream: Any) -> None:
    """Let what is still written to the stream's descriptor go nowhere, by libraries too."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def rank_and_node() -> str:
    """`rank 3 on n2`, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"


def _named(form: str) -> str:
    return form.format(rank_and_node()) if _num_ranks() > 1 else ""


def _num_ranks() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isascii() and text.isdigit() else 1  # `layout.launched_as` refuses it


def _is_news(text: str, *, heard_later: bool = True) -> bool:
    """Whether no other rank has said `text` before (or, with `heard_later` off, anything)."""
    if _num_ranks() == 1 or "MASTER_PORT" not in os.environ:
        return _first("LOCAL_RANK", "SLURM_LOCALID")
    from datetime import timedelta

    from torch.distributed import TCPStore

    # torchrun counts the starts of its processes; a process that fails several times is a test's.
    key = f"hacl_megatron/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_reports)}"
    try:
        own = f"{os.environ['RANK']} {text}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The store may be gone with its process: torch would ask for it again and again, and print a page at the end.
        socket.create_connection((address, port), timeout=10).close()
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        first = store.compare_set(key, "", own).decode()
    except Exception:  # better said twice than never
        return heard_later
    return first == own or (heard_later and first.split(" ", 1)[1] != text)


_reports = itertools.count()
