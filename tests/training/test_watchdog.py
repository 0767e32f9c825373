"""Who speaks when ranks fail, and that a rank that hangs ends the run with every rank's stack."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hacl_megatron.training.watchdog import _write_line
from tests.training.runs import make_inputs
from tests.warm import run_warm

RANKS = 2
PROGRAM = """
import os, sys, time
from hacl_megatron import train
from hacl_megatron.training.loop import Trainer
RANK = int(os.environ["RANK"])
def sleep_where_nobody_looks(): time.sleep(600)
{patch}
train.main(sys.argv[1:])
"""
PATCHES = {
    "sleeps": """
report = Trainer._report
def _report(self, scalars):
    report(self, scalars)
    if self.progress.iteration == 2:
        watchdog = self.beat.__self__
        assert watchdog._timeout == 700
        watchdog._timeout, watchdog._grace = 5, 5  # only now: a busy machine is silent for longer while it starts
        if RANK == 1: sleep_where_nobody_looks()
Trainer._report = _report
""",
    "mistaken": """
check = train.check_flags
def check_flags(config, world_size):
    if RANK == 1:  # a file that is missing on its node, say
        config.training.train_iters = 0
    return check(config, world_size)
train.check_flags = check_flags
""",
    "crashes": """
advance = Trainer._advance
def _advance(self, *inputs):
    if RANK == 1: raise RuntimeError("rank one alone fails")
    advance(self, *inputs)
Trainer._advance = _advance
""",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """What torchrun and its ranks print, and the folder they save to, when rank 1 does each of PATCHES."""
    folder = make_inputs(tmp_path_factory.mktemp("failures"))

    def run(name: str) -> subprocess.CompletedProcess:
        program, save = folder / f"{name}.py", folder / name
        program.write_text(PROGRAM.format(patch=PATCHES[name]))
        save.mkdir()
        command = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
            "--max-restarts", "1" if name == "mistaken" else "0", str(program),
            "--config", str(folder / "pretrain.yaml"), "--micro-batch-size", "4", "--device", "cpu",
            "--save", str(save), "--hang-timeout", "700",
        ]  # fmt: skip
        return run_warm(command, warm_ranks=True)

    with ThreadPoolExecutor() as pool:  # side by side: they wait long, for a watchdog or for torchrun to end a rank
        ended = dict(zip(PATCHES, pool.map(run, PATCHES), strict=True))
    assert all(done.returncode == 1 for done in ended.values())
    return {name: (done.stdout + done.stderr, folder / name) for name, done in ended.items()}


def test_a_rank_that_hangs_ends_the_run_with_the_stack_of_every_rank(ended) -> None:
    text, save = ended["sleeps"]
    status = json.loads((save / "run_status.json").read_text())
    assert status["state"] == "hung" and "was silent for" in status["reason"] and status["iteration"] == 2
    heads = re.findall(r"hacl_megatron: hang: rank (\d) on \S+ was silent for \d+ s", text)
    assert sorted(heads) == ["0", "1"], text[-4000:]
    stacks = {rank: re.findall(rf"^\[rank {rank} on \S+\] (.*)$", text, re.M) for rank in "01"}
    shape = re.compile(r'thread \S.*:|  File "[^"]+", line \d+, in \S+')
    for rank, lines in stacks.items():  # whole lines, though both ranks write at once into one pipe
        assert len(lines) > 20 and all(shape.fullmatch(line) for line in lines), (rank, lines)
    main = {rank: lines[lines.index("thread MainThread:") + 1 :] for rank, lines in stacks.items()}
    assert main["1"][0].endswith("in sleep_where_nobody_looks")  # the one that hangs
    waits = ("in forward_backward", "in _end_of_step", "in receive")  # the other waits for it, wherever it is by then
    assert any(line.endswith(waits) for line in main["0"]), main["0"]
    assert not any("sleep_where_nobody_looks" in line for line in stacks["0"])
    assert "Fatal Python error" not in text
    assert "iteration 2/5" in text and "iteration 3/5" not in text


def test_a_mistake_that_one_rank_alone_sees_is_said_once_by_that_rank(ended) -> None:
    text, save = ended["mistaken"]
    errors = [line for line in text.splitlines() if line.startswith("hacl_megatron: error: ")]
    assert len([line for line in errors if "not tried again" not in line]) == 1, errors
    assert re.fullmatch(r"hacl_megatron: error: --train-iters is 0, .* \(rank 1 on \S+\)", errors[0])
    # Started again by torchrun, nobody trains in the hope that it goes well this time.
    assert any("not tried again: --train-iters is 0" in line for line in errors[1:])
    assert "iteration 1/5" not in text and text.count("Traceback") <= 1  # torchrun's own
    assert json.loads((save / "run_status.json").read_text())["state"] == "failed"


def test_a_crash_is_printed_once_with_rank_and_node_and_before_what_follows_from_it(ended) -> None:
    text, save = ended["crashes"]
    assert re.findall(r"^hacl_megatron: failed: (rank \d) on \S+$", text, re.M) == ["rank 1"]
    assert text.count("RuntimeError: rank one alone fails") == 1
    assert "Connection closed by peer" not in text  # rank 0's own end
    status = json.loads((save / "run_status.json").read_text())
    assert (status["state"], status["reason"]) == ("crashed", "RuntimeError: rank one alone fails")


def test_lines_of_the_watchdog_go_to_stderr(capfd) -> None:
    """On standard output they would be the run's results."""
    _write_line("a hung rank\udcff")
    assert capfd.readouterr() == ("", "a hung rank\\udcff\n")


def test_exit_duration_saves_stops_and_resumes(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    save = tmp_path / "save"

    def train(*flags: str) -> str:
        command = ["-m", "hacl_megatron.train", "--config", str(tmp_path / "pretrain.yaml")]
        command += ["--micro-batch-size", "8", "--device", "cpu", "--save", str(save), "--load", str(save), *flags]
        done = run_warm(command)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    said = train("--exit-duration-in-mins", "0.03", "--train-iters", "100000")
    status = json.loads((save / "run_status.json").read_text())
    done = status["iteration"]
    assert status["state"] == "stopped" and status["train_iters"] == 100000 and 1 <= done < 100000
    assert f"stopped after iteration {done}: --exit-duration-in-mins has passed" in said
    assert (save / f"iter_{done:07d}").is_dir()
    assert f"resumed iteration {done} " in train("--train-iters", str(done + 1))
    assert json.loads((save / "run_status.json").read_text())["state"] == "finished"
