"""Do the tests notice? Changes one thing at a time in the package, and runs the tests that concern it.

    python -m tests.measure.mutants --sample 300 --seed 1 --work /tmp/mutants          # of the folders in PLACES
    python -m tests.measure.mutants hacl_megatron/data/packing.py --work /tmp/mutants  # every mutant of one file
    python -m tests.measure.mutants --survivors --budget 300 --work /tmp/mutants       # those again, by more tests
    python -m tests.measure.mutants hacl_megatron/data/packing.py --survivors --changed "<= limit" --work /tmp/mutants

Wants Python 3.12 or newer (`sys.monitoring`) with the test requirements; it is no test: its result is a share. Works
in copies of the repository, at `nice` 15, one at a time unless `--workers` says more. First it runs each file of tests
once, to learn which lines each test runs and in what time; WORK keeps that until the package or the file of tests
changes. For each mutant then, the tests that run its line go quickest first, the module's own before others, up to
`--budget` seconds, and the first failure ends it. WORK/mutants.jsonl holds what became of each and is gone on with
after an interruption; survivors that no test can tell from the original stand in `mutants_equivalent.json` beside this
file, each with its reason.
"""

import argparse
import collections
import hashlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.measure.mutations import Mutant, mutants_of, sources

ROOT = Path(__file__).parents[2]
PLACES = ("objective", "training", "data", "checkpoint/run")
TESTS = (
    "objective", "training", "data", "checkpoint/run", "public_reports", "hostile", "evaluation", "config", "plan",
    "tools/test_inspect_data.py",
)  # fmt: skip
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
COLLECT_S = 1200
"""Most that one file of tests may take, when it is run for its lines."""
_LEAST_S = 30
"""A mutant has three times its tests' seconds, of processors, and this before it counts as hanging."""


class Worker:
    """A copy of the repository, and two processes in it (`mutant_runs`): one that has the libraries imported, the other
    what these files of tests import too."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        self.folder, self._tests = folder, tests
        self._processes: dict[bool, subprocess.Popen] = {}
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        for name in ("hacl_megatron", "tests", "tools", "examples"):
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for file in ROOT.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)

    def ask(self, *, warm: bool = False, **request: Any) -> dict[str, Any]:
        if warm not in self._processes:
            self._processes[warm] = subprocess.Popen(
                ["nice", "-n", "15", sys.executable, "-m", "tests.measure.mutant_runs", *(self._tests if warm else ())],
                cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        process = self._processes[warm]
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def close(self) -> None:
        for process in self._processes.values():
            process.stdin.close()
            process.wait()


class Coverage:
    """Which tests run which lines, by files of tests; kept in WORK."""

    def __init__(self, work: Path, package: dict[str, bytes]) -> None:
        self.folder = work / "coverage"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.package = hashlib.sha256(repr(sorted(package.items())).encode()).hexdigest()
        self.tests: dict[str, dict[str, Any]] = {}
        self.slowest: dict[str, float] = {}

    def collect(self, file: str, worker: Worker) -> None:
        content = (ROOT / file).read_bytes()
        kept = self.folder / f"{hashlib.sha256(self.package.encode() + content).hexdigest()[:24]}.json"
        if not kept.is_file():
            name = file.replace("/", ".")
            folder = self.folder / f"{name}.hits"
            shutil.rmtree(folder, ignore_errors=True)
            reply = worker.ask(
                do="collect", tests=file, folder=str(folder), timeout_s=COLLECT_S, log=str(self.folder / f"{name}.log")
            )
            found = folder / "tests.json"
            kept.write_text(found.read_text() if found.is_file() else "{}")
            shutil.rmtree(folder, ignore_errors=True)
            say(f"{file}: lines of {len(json.loads(kept.read_text()))} tests, {reply['seconds']:.0f} s")
        found = json.loads(kept.read_text())
        self.slowest[file] = max((test["seconds"] for test in found.values()), default=0.0)
        self.tests |= found

    def chosen(self, mutant: Mutant, budget_s: float) -> tuple[list[str], float, int]:
        """(tests, their seconds, how many more there are): the likeliest to notice for their time first."""
        lines = range(mutant.first_line, mutant.last_line + 1)
        ranks: dict[str, int] = {}
        of_setup = set()
        for name, test in self.tests.items():
            if not test["passed"]:
                continue
            if not set(lines).isdisjoint(test["call"].get(mutant.path, ())):
                ranks[name] = 0
            if not set(lines).isdisjoint(test["setup"].get(mutant.path, ())):
                ranks[name] = 0
                of_setup.add(name.split("::")[0])  # what one test's set-up made, others of the file may look at
        for name, test in self.tests.items():
            if test["passed"] and name.split("::")[0] in of_setup:
                ranks.setdefault(name, 1)
        if not ranks:  # run on import, or in a process that nobody watches
            ranks = {
                name: 2 for name, test in self.tests.items()
                if test["passed"] and (mutant.path in test["call"] or mutant.path in test["setup"])
            }  # fmt: skip
        by_file: dict[str, list[str]] = collections.defaultdict(list)
        for name in sorted(ranks, key=lambda name: (ranks[name], self.tests[name]["seconds"])):
            by_file[name.split("::")[0]].append(name)
        # Whichever of a file's tests comes first pays for what they share, as the slowest did when all were run.
        costs = {
            file: max(self.slowest[file], sum(self.tests[n]["seconds"] for n in by_file[file])) for file in by_file
        }
        chosen, total = [], 0.0
        own = mirror(mutant.path)
        for file in sorted(by_file, key=lambda file: (costs[file] > 10, file != own, costs[file])):
            if total + costs[file] <= budget_s or not chosen:
                chosen += by_file[file]
                total += costs[file]
        return chosen, total, len(ranks) - len(chosen)


def mirror(path: str) -> str:
    """File of tests that a module's own tests are in, by their places."""
    module = Path(path).relative_to("hacl_megatron")
    return str(Path("tests") / module.with_name(f"test_{module.name}"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def judge(mutant: Mutant, coverage: Coverage, worker: Worker, budget_s: float) -> dict[str, Any]:
    """What becomes of one mutant."""
    tests, seconds, left = coverage.chosen(mutant, budget_s)
    record: dict[str, Any] = {**mutant.as_json(), "tests": len(tests), "tests_left_out": left}
    if not tests:
        return {**record, "outcome": "survived", "by": "no test runs it", "seconds": 0.0}
    content = mutant.applied((worker.folder / mutant.path).read_bytes()).decode()
    log = worker.folder / "run.log"
    limit = _LEAST_S + 3 * seconds
    reply = worker.ask(
        warm=mutant.in_function, do="run", path=mutant.path, content=content, tests=tests, log=str(log), timeout_s=limit
    )
    outcome = {0: "survived", None: "timed out"}.get(reply["status"], "killed")
    by = [
        line.split(" - ")[0]
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith(("FAILED ", "ERROR tests"))  # libraries print lines with ERROR too
    ]
    return {**record, "outcome": outcome, "by": by[0] if by else "", "seconds": round(reply["seconds"], 1)}


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return (*(record[name] for name in ("path", "function", "before", "after")), record.get("nth", 1))


def read_records(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last word on each mutant, in order of the first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {identity(record): record for record in map(json.loads, lines)}


def report(records: list[dict[str, Any]]) -> str:
    """Table by module, survivors, and the share of the mutants that differ which some test notices."""
    reasons = {identity(entry): entry["why"] for entry in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    survivors = []
    for record in records:
        outcome = record["outcome"]
        if outcome == "survived":
            outcome = "equivalent" if identity(record) in reasons else outcome
            survivors += [record] if outcome == "survived" else []
        for name in (record["path"], "all"):
            counts[name][outcome] += 1
    columns = ("killed", "timed out", "survived", "equivalent")
    lines = ["| module | " + " | ".join(columns) + " | noticed |", "|---" * (len(columns) + 2) + "|"]
    for name, count in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        different = count.total() - count["equivalent"]
        share = f"{(count['killed'] + count['timed out']) / different:.1%}" if different else ""
        lines.append(f"| {name} | " + " | ".join(str(count[column]) for column in columns) + f" | {share} |")
    for record in survivors:
        place = f"{record['path']}:{record['line']} {record['function']}"
        lines.append(f"\nsurvived: {place} ({record['tests']} tests, {record['tests_left_out']} left out)")
        lines += [f"    {record['before']}", f" -> {record['after']}"]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = [f"hacl_megatron/{place}" for place in PLACES]
    parser.add_argument("places", nargs="*", default=default, help="folders and files of the package")
    parser.add_argument("--sample", type=int, help="so many of the mutants; all without")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--tests", nargs="+", default=[f"tests/{place}" for place in TESTS], help="folders and files")
    parser.add_argument("--without", nargs="+", default=["tests/training/test_watchdog.py"], help="files of tests")
    parser.add_argument("--work", type=Path, required=True, help="folder for copies, coverage and results")
    parser.add_argument("--budget", type=float, default=40, help="seconds of tests for a mutant")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--survivors", action="store_true", help="only those that WORK knows as survivors")
    parser.add_argument("--changed", metavar="TEXT", help="only those whose changed line holds it")
    parser.add_argument("--only-report", action="store_true", help="of what WORK holds")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    work = arguments.work.resolve()
    results = work / "mutants.jsonl"
    if not arguments.only_report:
        run(arguments, work, results)
    print(report(list(read_records(results).values())))


def run(arguments: argparse.Namespace, work: Path, results: Path) -> None:
    """Judge the mutants that are asked for and not known yet; a line of `results` each."""
    mutants = [mutant for path, source in sources(ROOT, arguments.places) for mutant in mutants_of(source, path)]
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    if arguments.changed is not None:
        mutants = [mutant for mutant in mutants if arguments.changed in mutant.after]
    known = read_records(results)
    if arguments.survivors:
        mutants = [m for m in mutants if known.get(m.identity, {}).get("outcome") == "survived"]
    else:
        mutants = [mutant for mutant in mutants if mutant.identity not in known]
    places = [place for place in arguments.tests if (ROOT / place).exists()]
    files = [path for path, _ in sources(ROOT, places) if Path(path).name.startswith("test_")]
    package = dict(sources(ROOT, ["hacl_megatron"]))
    files = [file for file in files if file not in arguments.without]
    workers = [Worker(work / f"copy{number}", files) for number in range(arguments.workers)]
    coverage = Coverage(work, package)
    in_turn(files, workers, coverage.collect)
    lock = threading.Lock()
    done = 0

    def one(mutant: Mutant, worker: Worker) -> None:
        nonlocal done
        record = judge(mutant, coverage, worker, arguments.budget)
        with lock, results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            done += 1
        place = f"{mutant.path}:{mutant.line}"
        say(f"{done}/{len(mutants)} {record['outcome']}, {record['seconds']} s: {place} {mutant.after}")

    # Those with quick tests first: after an interruption most of the sample is known.
    mutants.sort(key=lambda mutant: coverage.chosen(mutant, arguments.budget)[1])
    in_turn(mutants, workers, one)
    for worker in workers:
        worker.close()


def in_turn(items: list, workers: list[Worker], function: Any) -> None:
    """`function(item, worker)` for each item, by whichever worker is free."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    errors = []

    def work(worker: Worker) -> None:
        while not errors:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                function(item, worker)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


if __name__ == "__main__":
    main()
