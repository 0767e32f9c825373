"""The shipped sbatch files on a real Slurm of two nodes: chained, preempted, killed, laid out anew."""

import json
import math
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from tests.slurm.cluster import Cluster, Job
from tests.training.runs import LOSSES, assert_same_state, common_state, layout_flags, metrics, train, weights

NUMBERS = (*LOSSES, "temperature", "learning-rate", "grad-norm")


def flags(iterations: int, layout: str = "dp4") -> list[str]:
    return ["--device", "cpu", "--train-iters", str(iterations), *layout_flags(layout)[1]]


def uninterrupted(cluster: Cluster, name: str, iterations: int, layout: str = "dp4") -> Path:
    """The same run without Slurm, torchrun or any interruption."""
    save = cluster.folder / name
    config = str(cluster.folder / "pretrain.yaml")
    train([["--config", config, "--save", str(save), *flags(iterations, layout)]], layout_flags(layout)[0])
    return save


def assert_uninterrupted(whole: Path, save: Path, iterations: int) -> None:
    """Bitwise the run that nobody interrupted; every iteration once in metrics.jsonl, and once in TensorBoard."""
    assert_same_state(whole, save)
    assert common_state(save)["data_state"]["consumed_samples"] == 8 * iterations
    expected, found = metrics(whole), metrics(save)
    assert [row["iteration"] for row in found] == list(range(1, iterations + 1))
    for row, other in zip(expected, found, strict=True):  # other samples would give other losses
        assert {tag: row[tag] for tag in NUMBERS} == {tag: other[tag] for tag in NUMBERS}, row["iteration"]
    events = EventAccumulator(str(save / "tensorboard"), size_guidance={"scalars": 0}).Reload().Scalars("lm loss")
    assert [event.step for event in events] == list(range(1, iterations + 1))
    assert [event.value for event in events] == pytest.approx([row["lm loss"] for row in expected])


@pytest.mark.timeout(3600)
def test_chain_trains_all_stages_on_two_nodes_and_exports_the_last(cluster: Cluster) -> None:
    chain = ["bash", "examples/slurm/chain.sh", "7b", "--preference", "phrase", "--nodes=2", "--", *flags(3)]
    numbers = cluster.run(*chain, **cluster.job_env("chain", 2)).split()
    out = cluster.folder / "out"
    saves = (out / "chain-pretrain", out / "chain", out / "chain-phrase", out / "chain-phrase-hf")
    jobs = [Job(cluster, number, save) for number, save in zip(numbers, saves, strict=True)]
    assert [job.wait() for job in jobs] == ["COMPLETED"] * 4, "".join(job.log()[-3000:] for job in jobs)
    for job in jobs[:3]:
        assert job.status()["state"] == "finished" and job.status()["iteration"] == 3
        assert "1 x 1 x 4 on cpu" in job.log() and "2 nodes (n[1-2]) x 2 processes" in job.log()
    for before, job in zip(saves[:2], jobs[1:3], strict=True):
        assert f"weights from {before / 'iter_0000003'}" in job.log()
    assert all("preference loss" in row for row in metrics(saves[2]))
    temperatures = [weights(save)["heads.temperature"] for save in saves[:3]]
    assert len({value.item() for value in temperatures}) == 3  # each stage goes on
    temperature = temperatures[-1]
    with safe_open(saves[3] / "hacl_heads.safetensors", "pt") as heads:
        assert heads.get_tensor("temperature").item() == temperature.item()


@pytest.mark.timeout(600)
def test_an_array_of_tasks_prepares_what_one_process_does(cluster: Cluster) -> None:
    """The job behind it joins; byte for byte the manifest of one process."""
    source = sorted((cluster.folder / "data").glob("*.json"))[0]
    lines = cluster.folder / "lines.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(source.read_text())))
    one, shared = cluster.folder / "one", cluster.folder / "shared"
    run_prepare(PrepareSettings(inputs=[str(lines)], output=str(one), progress_bar=False))
    script = ["examples/slurm/prepare.sbatch", "--num-shards", "3", "--input", str(lines)]
    env = {**cluster.job_env("prepare", 1), "DATA": str(shared)}
    options = ["--parsable", "--nodes=1", "--cpus-per-task=1"]
    array = cluster.run("sbatch", *options, "--array=0-2", *script, **env)
    behind = cluster.run("sbatch", *options, f"--dependency=afterok:{array}", *script, "--merge", **env)
    job = Job(cluster, behind, shared)
    assert job.wait(300) == "COMPLETED", job.log()[-3000:]
    assert (shared / "manifest.arrow").read_bytes() == (one / "manifest.arrow").read_bytes()


# From here on one rank a node, for a start costs a processor 10 s for each.


def stop_once(job: Job, kind: str, after: int) -> None:
    """Let Slurm ask the job to stop some time after iteration `after`; returns when it goes on from there."""
    job.wait_for(lambda: job.iterations() > after, f"iteration {after}")
    time.sleep(random.uniform(0, 0.5))
    done, starts, stops = job.iterations(), job.starts(), len(stopped_at(job))
    interrupt(job, kind)
    job.wait_for(lambda: job.starts() > starts, f"a new start after {kind}")
    assert len(stopped_at(job)) == stops + 1 and stopped_at(job)[-1] >= done, job.log()[-4000:]
    assert began_at(job)[-1] == stopped_at(job)[-1], job.log()[-4000:]


def stopped_at(job: Job) -> list[int]:
    """The iterations after which the run stopped because it was asked to."""
    return [int(number) for number in re.findall(r"^stopped after iteration (\d+): received SIG", job.log(), re.M)]


def began_at(job: Job) -> list[int]:
    """The iteration from which each of its starts and restarts went on; 0 without a checkpoint."""
    lines = re.findall(r"^(?:resumed iteration (\d+)|\d+ parameters) from", job.log(), re.M)
    return [int(number or 0) for number in lines]


def kill_once(job: Job, rank: int, moment: str) -> None:
    """kill -9 of `rank`; torchrun starts all of them again, from the newest complete checkpoint.

    Args:
        moment: "start", "step" (of training) or "save" (with one under way).
    """
    job.wait_for(lambda: job.new_trainer(rank), f"rank {rank}")
    if moment == "start":
        time.sleep(random.uniform(0, 8))
        job.kill_rank(rank)
        return
    after = job.latest() + random.randint(0, 2)
    job.wait_for(lambda: job.iterations() > after, f"iteration {after + 1}")
    if moment == "save":
        job.wait_for(partial(job.saves_since, time.time_ns()), "a save")
    else:
        time.sleep(random.uniform(0, 0.5))
    starts, latest = job.starts(), job.latest()
    job.kill_rank(rank)
    job.wait_for(lambda: job.starts() > starts, f"a restart after rank {rank} was killed")
    assert latest <= began_at(job)[-1] <= job.latest()


@pytest.mark.timeout(3600)
def test_preempted_twice_and_killed_three_times_is_bitwise_the_uninterrupted_run(cluster: Cluster) -> None:
    iterations = 60
    job = cluster.pretrain("hit", *flags(iterations, "dp2"), "--save-interval", "2", ranks_per_node=1, MAX_RESTARTS="5")
    stop_once(job, "USR1", after=3)
    kill_once(job, rank=1, moment="step")
    kill_once(job, rank=0, moment="save")
    kill_once(job, rank=1, moment="save")
    stop_once(job, "preempt", after=job.latest() + 1)
    assert job.wait() == "COMPLETED", job.log()[-4000:]
    assert job.status()["state"] == "finished" and num_starts(job) == 3 and job.starts() == 6
    whole = uninterrupted(cluster, "whole", iterations, "dp2")
    assert_uninterrupted(whole, job.save, iterations)


@pytest.mark.timeout(3600)
def test_resubmitted_at_another_layout_goes_on_with_the_same_samples(cluster: Cluster) -> None:
    change_layouts(cluster, "relaid", ["tp2", "tp2-pp2"], 3)


def change_layouts(cluster: Cluster, name: str, layouts: list[str], steps: int) -> None:
    """Train `steps` iterations at each layout in turn, over two nodes where there are two ranks."""
    iterations = steps * len(layouts)
    whole = uninterrupted(cluster, f"{name}-whole", iterations, "tp1")
    for index, layout in enumerate(layouts):
        ranks = layout_flags(layout)[0]
        nodes = min(2, ranks)
        stop = ["--exit-interval", str(steps)]
        shape = {"nodes": nodes, "ranks_per_node": ranks // nodes}
        job = cluster.pretrain(name, *flags(iterations, layout), *stop, MAX_REQUEUES="0", **shape)
        last = index == len(layouts) - 1
        assert job.wait() == ("COMPLETED" if last else "FAILED"), job.log()[-4000:]
        assert job.status()["state"] == ("finished" if last else "stopped")
        assert job.latest() == (index + 1) * steps
        if not last:  # 75: stopped, saved, to be gone on with
            assert "ExitCode=75:0" in cluster.run("scontrol", "show", "job", "--oneliner", job.number)
    assert [row["iteration"] for row in metrics(job.save)] == list(range(1, iterations + 1))
    for expected, row in zip(metrics(whole), metrics(job.save), strict=True):
        for tag in NUMBERS:
            assert math.isclose(expected[tag], row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, expected, row)


# ------------------------------------------------------------------------------------------------------ the long form


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_preemptions_of_every_kind_at_random_moments(cluster: Cluster) -> None:
    iterations = 140
    job = cluster.pretrain("ten", *flags(iterations, "dp2"), "--save-interval", "4", ranks_per_node=1)
    kinds = ["USR1", "USR1", "TERM", "TERM", "preempt", "preempt", "requeue", "requeue", "node", "node"]
    random.shuffle(kinds)
    for index, kind in enumerate(kinds):
        job.wait_for(lambda: job.state() == "RUNNING", "running")
        if index % 3 == 0:  # at any moment of a start
            time.sleep(random.uniform(0, 12))
        else:
            goal = min(job.latest() + random.randint(1, 8), iterations - 1)
            job.wait_for(lambda goal=goal: job.iterations() >= goal, f"iteration {goal}")
            time.sleep(random.random())
        assert job.state() == "RUNNING", f"over before preemption {index}: {job.log()[-3000:]}"
        starts, latest = num_starts(job), job.latest()
        print(f"preemption {index}: {kind} at iteration {job.iterations()}, checkpoint {latest}", flush=True)
        interrupt(job, kind)
        job.wait_for(partial(requeued, job, starts), "the requeue")
        if kind == "node":
            cluster.return_node("n2")
        assert job.latest() >= latest
    assert job.wait() == "COMPLETED", job.log()[-4000:]
    assert num_starts(job) == len(kinds) + 1
    assert_uninterrupted(uninterrupted(cluster, "ten-whole", iterations, "dp2"), job.save, iterations)


def num_starts(job: Job) -> int:
    return job.log().count("launch.sh: job")


def requeued(job: Job, starts: int) -> bool:
    return job.state() == "PENDING" or num_starts(job) > starts


def interrupt(job: Job, kind: str) -> None:
    interruptions: dict[str, Callable[[], object]] = {
        "USR1": partial(job.signal, "USR1"),
        "TERM": partial(job.signal, "TERM"),
        "preempt": job.preempt,
        "requeue": partial(job.cluster.run, "scontrol", "requeue", job.number),
        "node": partial(job.cluster.lose_node, "n2"),
    }
    interruptions[kind]()


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_thirty_kills_of_any_rank_also_in_saves(cluster: Cluster) -> None:
    iterations = 200
    shape = flags(iterations, "dp2")
    job = cluster.pretrain("thirty", *shape, "--save-interval", "1", ranks_per_node=1, MAX_RESTARTS="60")
    moments = ["start", "step", "save"] * 10
    random.shuffle(moments)
    for index, moment in enumerate(moments):
        rank = random.randrange(2)
        kill_once(job, rank, moment)
        unfinished = [path.name for path in job.save.glob("iter_*.partial")]
        print(f"kill {index} of rank {rank} in a {moment}: checkpoint {job.latest()}, cut {unfinished}", flush=True)
    assert job.wait() == "COMPLETED", job.log()[-4000:]
    assert job.log().count("failed (exitcode: -9)") == len(moments)
    assert_uninterrupted(uninterrupted(cluster, "thirty-whole", iterations, "dp2"), job.save, iterations)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_five_changes_of_layout(cluster: Cluster) -> None:
    change_layouts(cluster, "five", ["tp1", "tp2", "pp2-first1", "dp2", "tp2-pp2", "tp1"], 3)
