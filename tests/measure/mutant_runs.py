"""Runs chosen tests in a copy of the repository, forked from a process that has the libraries imported already.

Started by `tests.measure.mutants` in the copy: requests come as lines of JSON, answers go the same way. There are two
kinds:

    warm   has imported the trainer and its tests too; a fork's functions get the changed code in place: half a second
    cold   has libraries alone, and each fork imports the trainer as the files are then: for what runs on import

In both the fork server of `tests.distributed` is forked too instead of started anew, and the file is changed meanwhile,
so that ranks and new processes run the same.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing.util
import os
import signal
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
IDLE_S = 90
"""A run whose processes have used no processor for so long hangs."""


def preload() -> None:
    """Libraries alone; nothing of the trainer."""
    import megatron.core
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    import pytest  # noqa: F401
    import tensorboard.compat.proto  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers
    import transformers.models.blip_2.modeling_blip_2
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava

    assert not [name for name in sys.modules if name.startswith("hacl_megatron")]
    assert transformers.models.llava


def warm_up(files: list[str]) -> dict[str, list[types.FunctionType]]:
    """Import the trainer and these files of tests; functions of the trainer by path."""
    import pytest

    importlib.import_module("tests.training.runs")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files])
    functions: dict[str, list[types.FunctionType]] = {}
    package = str(ROOT / "hacl_megatron") + os.sep
    for found in gc.get_objects():
        if isinstance(found, types.FunctionType) and found.__code__.co_filename.startswith(package):
            path = str(Path(found.__code__.co_filename).relative_to(ROOT))
            functions.setdefault(path, []).append(found)
    gc.freeze()
    return functions


def replace_code(functions: list[types.FunctionType], path: str, content: str) -> None:
    """Give these functions the code that they have in this source; whoever holds one of them runs it from now on."""
    codes = {code.co_qualname: code for code in _all_code(compile(content, str(ROOT / path), "exec"))}
    for function in functions:
        name = function.__code__.co_qualname
        if "<" not in name and codes[name].co_freevars == function.__code__.co_freevars:
            function.__code__ = codes[name]


def _all_code(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _all_code(part)


def cpu_seconds(session: int) -> float:
    """Of all processes of a session that are alive, and those that they have waited for."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def in_fork(function: Callable[[], int], *, timeout_s: float, log: Path) -> tuple[int | None, float]:
    """(exit status, seconds) of `function` in a fork of this process that leads a session of its own.

    None: it took more than `timeout_s` of processors, or for `IDLE_S` nothing at all. By the clock, a mutant that hangs
    could not be told from one that others leave no processor to.
    """
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(written, 1)
            os.dup2(written, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            status = function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    status = None
    used, moved, looked = 0.0, begin, begin
    while used < timeout_s and time.monotonic() < moved + IDLE_S:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.02)
        if time.monotonic() > looked + 1:
            looked, before = time.monotonic(), used
            used = max(used, cpu_seconds(child))
            moved = looked if used > before + 0.005 else moved
    with contextlib.suppress(ProcessLookupError):  # its ranks and its fork server too
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status, time.monotonic() - begin


def run_pytest(arguments: list[str], plugins: tuple[object, ...] = ()) -> int:
    """pytest's exit status; the ranks that its tests start are forks of what is imported now."""
    import pytest

    spawn = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = functools.partial(_fork_the_fork_server, spawn)
    os.environ["PYTHONPATH"] = str(ROOT)
    importlib.import_module("tests.training.runs")  # the trainer, as the files are now

    if plugins:
        _watch_ranks(*plugins)
    import multiprocessing.forkserver as server

    server.ensure_running()
    return int(pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "--durations=0"], plugins=list(plugins)))


def _fork_the_fork_server(spawn: Callable, path: Any, arguments: list, passed: list[int]) -> int:
    """Stands in for `spawnv_passfds`: a fork server needs no new Python, for this one holds what it would import."""
    code = arguments[-1]
    if "forkserver" not in str(code):
        return spawn(path, arguments, passed)
    child = os.fork()
    if child == 0:
        try:
            begin = 3
            for number in sorted(passed):
                os.closerange(begin, number)
                begin = number + 1
            os.closerange(begin, 4096)
            exec(code)
        finally:
            os._exit(1)
    return child


class LineWatch:
    """A pytest plugin that notes which lines of the package each test's set-up and call run, in its ranks too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = str(ROOT / "hacl_megatron") + os.sep
        self.hits: set[tuple[str, int]] = set()
        self.now = ""
        self.tests: dict[str, dict[str, Any]] = {}
        events = sys.monitoring
        events.use_tool_id(events.COVERAGE_ID, "mutants")
        events.register_callback(events.COVERAGE_ID, events.events.LINE, self._line)
        events.set_events(events.COVERAGE_ID, events.events.LINE)

    def _line(self, code: Any, line: int) -> object:
        if code.co_filename.startswith(self.package):
            self.hits.add((code.co_filename, line))
        return sys.monitoring.DISABLE

    def _begin(self, now: str) -> None:
        self.now = now
        (self.folder / "now").write_text(now)
        self.hits.clear()
        sys.monitoring.restart_events()

    def _end(self) -> None:
        lines: dict[str, list[int]] = {}
        for file, line in sorted(self.hits):
            lines.setdefault(str(Path(file).relative_to(ROOT)), []).append(line)
        (self.folder / f"{uuid.uuid4()}.hits").write_text(json.dumps([self.now, lines]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "passed": True, "setup": {}, "call": {}})
        test["seconds"] += report.duration
        test["passed"] &= report.passed

    def _phase(self, item: Any, name: str) -> Iterator[None]:
        self._begin(json.dumps([item.nodeid, name]))
        yield
        self._end()

    def in_rank(self, function: Callable, *arguments: Any) -> None:
        """`tests.distributed._rank_main`, with its lines given to the test that started it."""
        self.hits.clear()
        self.now = (self.folder / "now").read_text()
        sys.monitoring.restart_events()
        leave = os._exit

        def end_and_leave(status: int) -> None:
            self._end()
            leave(status)

        os._exit = end_and_leave
        try:
            function(*arguments)
        finally:
            os._exit = leave
            self._end()

    def result(self) -> dict[str, dict[str, Any]]:
        """By test: seconds, whether it passed, and lines by file of its set-up and of its call."""
        for file in self.folder.glob("*.hits"):
            now, lines = json.loads(file.read_text())
            test, phase = json.loads(now)
            for path, numbers in lines.items():
                into = self.tests[test][phase]
                into[path] = sorted({*into.get(path, ()), *numbers})
        return self.tests


def _with_hooks() -> type[LineWatch]:
    import pytest

    class WithHooks(LineWatch):
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_setup(self, item):
            return (yield from self._phase(item, "setup"))

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item):
            return (yield from self._phase(item, "call"))

    return WithHooks


def _watch_ranks(watch: LineWatch) -> None:
    import tests.distributed

    plain = tests.distributed._rank_main
    tests.distributed._rank_main = _named(watch, plain)


def _named(watch: LineWatch, plain: Callable) -> Callable:
    @functools.wraps(plain)  # pickled by this name
    def _rank_main(*arguments: Any) -> None:
        watch.in_rank(plain, *arguments)

    return _rank_main


def collect(tests: str, folder: Path) -> int:
    """Run a file of tests and leave what its tests ran in `folder/tests.json`."""
    folder.mkdir(parents=True)
    watch = _with_hooks()(folder)
    status = run_pytest([tests], (watch,))
    (folder / "tests.json").write_text(json.dumps(watch.result()))
    return status


@contextlib.contextmanager
def changed(path: Path, content: str) -> Iterator[None]:
    """Inside, the file has this content; what Python compiled of either is gone."""
    before = path.read_bytes()
    compiled = Path(importlib.util.cache_from_source(str(path)))
    path.write_text(content, encoding="utf-8")
    compiled.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.write_bytes(before)
        compiled.unlink(missing_ok=True)


def run_mutant(functions: dict[str, list[types.FunctionType]], request: dict[str, Any]) -> int:
    if request["path"] in functions:
        replace_code(functions[request["path"]], request["path"], request["content"])
    return run_pytest(["-x", "--tb=line", *request["tests"]])


def answer(request: dict[str, Any], functions: dict[str, list[types.FunctionType]]) -> dict[str, Any]:
    """pytest's exit status (None: out of time; neither 0 nor 1: it does not even import) and seconds of one request."""
    log = Path(request["log"])
    if request["do"] == "collect":
        function = functools.partial(collect, request["tests"], Path(request["folder"]))
        status, seconds = in_fork(function, timeout_s=request["timeout_s"], log=log)
    else:
        with changed(ROOT / request["path"], request["content"]):
            run = functools.partial(run_mutant, functions, request)
            status, seconds = in_fork(run, timeout_s=request["timeout_s"], log=log)
    return {"status": status, "seconds": seconds}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    functions = warm_up(sys.argv[1:]) if sys.argv[1:] else {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), functions)), file=replies, flush=True)


if __name__ == "__main__":
    main()
