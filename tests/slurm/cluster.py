"""A real Slurm on this host, and the shipped sbatch files run on it with tiny models."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "examples" / "slurm"
_SCRIPT = Path(__file__).parent / "one_host.sh"
_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
_DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


def why_not() -> str | None:
    """What this host lacks for a Slurm of its own; None if nothing."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} not found: apt-get install -y --no-install-recommends "
            "slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "needs root, for the daemons and the nodes' own hostnames"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        return "unshare --uts --mount is not allowed here"
    return None


def _free_ports(count: int) -> int:
    """First of `count` ports in a row that nobody listens on."""
    while True:
        first = random.randrange(10000, 20000)
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue


class Cluster:
    """Two nodes, n1 and n2; jobs read their inputs from, and write their results to, `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._dir = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # munge wants a path open to all
        self._dir.chmod(0o755)
        self.conf = str(self._dir / "slurm.conf")
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": self.conf,
        }

    def __enter__(self) -> "Cluster":
        self._host("start", SLURM_TEST_PORT=str(_free_ports(3)))
        return self

    def __exit__(self, *_: object) -> None:
        self._host("stop")
        shutil.rmtree(self._dir)

    def _host(self, *arguments: str, **env: str) -> None:
        command = ["bash", str(_SCRIPT), arguments[0], str(self._dir), *arguments[1:]]
        done = subprocess.run(
            command, env={**self._env, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def lose_node(self, node: str) -> None:
        """Kill everything on a node; Slurm puts its jobs back into the queue."""
        self._host("lose", node)

    def return_node(self, node: str) -> None:
        self._host("return", node)

    def run(self, *command: str, **env: str) -> str:
        """A command of Slurm's, or a script that calls some, in the repository; its output."""
        done = subprocess.run(command, env={**self._env, **env}, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job_env(self, run: str, ranks_per_node: int, **env: str) -> dict[str, str]:
        """Variables of the sbatch files for a tiny run; the virtual environment is this one's."""
        return {
            "RUN": run, "OUTPUT": str(self.folder / "out"), "RUN_IN": str(Path(sys.executable).parents[1]),
            "RANKS_PER_NODE": str(ranks_per_node), "OMP_NUM_THREADS": "1",
            "PRETRAIN_CONFIG": str(self.folder / "pretrain.yaml"),
            "FINETUNE_CONFIG": str(self.folder / "finetune.yaml"),
            "PREFERENCE_CONFIG": str(self.folder / "finetune.yaml"),
            "SBATCH_OUTPUT": str(self.folder / "%x-%j.log"), **env,
        }  # fmt: skip

    def pretrain(self, run: str, *flags: str, nodes: int = 2, ranks_per_node: int = 2, **env: str) -> "Job":
        """Submit `pretrain_7b.sbatch`."""
        command = ["sbatch", "--parsable", f"--nodes={nodes}", str(SBATCH / "pretrain_7b.sbatch"), *flags]
        number = self.run(*command, **self.job_env(run, ranks_per_node, **env))
        return Job(self, number, self.folder / "out" / f"{run}-pretrain")


class Job:
    """A submitted job and the folder that it saves to."""

    def __init__(self, cluster: Cluster, number: str, save: Path) -> None:
        self.cluster, self.number, self.save = cluster, number, save
        self._old: set[int] = set()
        """Processes of starts that a kill has ended."""

    def state(self) -> str:
        facts = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number).split()
        return next(fact.removeprefix("JobState=") for fact in facts if fact.startswith("JobState="))

    def log(self) -> str:
        """Everything that the job has printed, all its starts together."""
        return "".join(path.read_text() for path in self.cluster.folder.glob(f"*-{self.number}.log"))

    def status(self) -> dict:
        return json.loads((self.save / "run_status.json").read_text())

    def iterations(self) -> int:
        """Last iteration that was logged."""
        path = self.save / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["iteration"] if lines else 0

    def latest(self) -> int:
        """Iteration of the newest complete checkpoint, 0 if there is none."""
        path = self.save / "latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else 0

    def starts(self) -> int:
        """How often a training has begun, in all starts and restarts of the job's processes."""
        return self.log().count("samples a step,")

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 1800) -> None:
        """Until `condition` holds, while the job lives."""
        deadline, look = time.monotonic() + timeout, 0.0
        while not condition():
            now = time.monotonic()
            if now > look:
                ended = self.state() in _DONE and not condition()
                assert not ended and now < deadline, f"{what}: {self.state()}\n{self.log()[-6000:]}"
                look = now + 2
            time.sleep(0.05)

    def wait(self, timeout: float = 1800) -> str:
        """Until the job is over; its last state."""
        self.wait_for(lambda: self.state() in _DONE, "the job's end", timeout)
        return self.state()

    def signal(self, name: str) -> None:
        """As Slurm does it: USR1 to the batch shell alone (--signal=B:USR1@600), TERM to its process group."""
        where = "--batch" if name == "USR1" else "--full"
        self.cluster.run("scancel", where, f"--signal={name}", self.number)

    def preempt(self) -> None:
        """Let Slurm take the nodes for a job that is more urgent: TERM to each node's task, and ten minutes."""
        nodes = ["--partition=urgent", "--nodes=2", "--gpus-per-node=8"]
        self.cluster.run("sbatch", *nodes, "--output=/dev/null", "--wrap=true")

    def trainers(self) -> dict[int, int]:
        """Process id of each rank that runs now."""
        return {rank: pid for pid, rank in self._processes()}

    def _processes(self) -> Iterator[tuple[int, int]]:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                variables = dict(
                    item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
                )
            except OSError:
                continue
            here = variables.get(b"SLURM_CONF") == self.cluster.conf.encode()
            ours = here and variables.get(b"SLURM_JOB_ID") == self.number.encode() and b"RANK" in variables
            if ours and b"hacl_megatron.train" in command:  # torchrun itself has no rank
                yield int(folder.name), int(variables[b"RANK"])

    def new_trainer(self, rank: int) -> bool:
        """Whether `rank` has been started, and started again after the last kill."""
        return self.trainers().get(rank, 0) not in self._old | {0}

    def kill_rank(self, rank: int) -> None:
        """kill -9 of one trainer."""
        running = self.trainers()
        self._old |= set(running.values())
        os.kill(running[rank], signal.SIGKILL)

    def saves_since(self, moment: int) -> bool:
        """Whether a save is under way that has begun a file after `moment` (ns), not one that a kill has cut."""
        for folder in self.save.glob("iter_*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_ctime_ns > moment:
                    return True
        return False
