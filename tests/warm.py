"""Starts programs as `subprocess` does, without their imports: forks of the server that `tests.distributed` has.

torch, megatron-core and transformers take six seconds of a core to import, most of what a tiny run takes. A process
from here is one of its own in every other respect: session, directory, environment, output, signals and status are its
own. Where the start itself or the interpreter's very end is what a test is about, it uses `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path

from tests.distributed import context


class Warm:
    """What `subprocess.Popen([sys.executable, *arguments])` is: `-m MODULE ARGUMENTS` or `FILE.py ARGUMENTS`.

    Args:
        stdout, stderr: descriptors.
        warm_ranks: for `-m torch.distributed.run`: its ranks are forks of it.
        forked: of this very process, not of the server.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdout: int,
        stderr: int,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        warm_ranks: bool = False,
        forked: bool = False,
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        streams = (stdout, stderr) if forked else (_Descriptor(stdout), _Descriptor(stderr))
        where = str(cwd or Path.cwd())
        kind = multiprocessing.get_context("fork") if forked else context
        self._process = kind.Process(target=_become, args=(self.args, *streams, where, environment, warm_ranks))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_warm(
    arguments: Sequence[str], *, cwd: Path | None = None, timeout: float = 500, warm_ranks: bool = False
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = Warm(arguments, stdout=out.fileno(), stderr=errors.fileno(), cwd=cwd, warm_ranks=warm_ranks)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(process.args, code, out.read(), errors.read())


class _Descriptor:
    """A descriptor on its way into the process that is being started."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self._number),)


def _received(descriptor) -> int:
    return descriptor.detach()


def _become(
    arguments: list[str], stdout: int, stderr: int, cwd: str, environment: dict[str, str], warm_ranks: bool
) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun's, in a fork of it
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if warm_ranks:
        _start_ranks_warm()
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package.*")
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))  # as Python does for a script
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's processes leave out


def _start_ranks_warm() -> None:
    """torchrun's own start of a rank is `python -u FILE.py ARGUMENTS` or `python -u -m MODULE ARGUMENTS`."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def start(self, command: tuple[str, ...], environment: dict[str, str]) -> Warm:
        assert command[:2] == (sys.executable, "-u"), command
        return Warm(command[2:], stdout=1, stderr=2, env=environment, forked=True)

    SubprocessHandler._popen = start
