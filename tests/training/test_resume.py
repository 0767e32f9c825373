"""A run that was interrupted goes on as if it had not been: bitwise at its own layout, to rounding at another."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.selection import selected
from tests.training.runs import (
    LOSSES,
    assert_same_state,
    common_state,
    layout_flags,
    make_inputs,
    metrics,
    refused,
    signalled,
    train,
    weights,
)
from tests.warm import Warm

STEPS = 5
# Groups that differ in their rate alone, a schedule that moves every step, a temperature that ends at its bound.
UNEVEN = ["--connector-lr", "2e-3", "--heads-lr", "0.4", "--weight-decay", "0.1", "--lr-warmup-fraction", "0.4"]
# (layout, stage, step after which it is interrupted); 20 samples in steps of 8: epochs end inside a step.
SAME_LAYOUT = (("tp1", "pretrain", 2), ("tp1", "finetune", 3), ("dp2-dist", "pretrain", 3), ("dp2-dist", "finetune", 1))
# A chain: what one layout saved after step 2, the next goes on from. The optimiser keeps its kind.
OTHER_LAYOUT = (
    ("tp1", "tp2", "finetune"),
    ("tp2", "pp2-first1", "finetune"),
    ("pp2-dist", "dp2-dist", "finetune"),
    ("pp2-dist", "dp2-dist", "pretrain"),
    ("dp2-dist", "tp1-dist", "finetune"),
)


def command(folder: Path, stage: str, layout: str, save: str, *extra: str) -> list[str]:
    _, flags = layout_flags(layout)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *flags, *extra]


def cut_and_resumed(folder: Path, stage: str, layout: str, after: int) -> list[list[str]]:
    name, load = f"cut-{stage}-{layout}", str(folder / f"cut-{stage}-{layout}")
    return [
        command(folder, stage, layout, f"full-{stage}-{layout}", *UNEVEN),
        command(folder, stage, layout, name, *UNEVEN, "--exit-interval", str(after)),
        command(folder, stage, layout, name, *UNEVEN, "--load", load),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("resume"), samples=20)


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Runs whole, interrupted and resumed at their own layout, of the selected layouts; on two groups of processes."""
    commands: dict[int, list] = {1: [], 2: []}
    layouts = selected(request, "layout", dict.fromkeys(layout for layout, *_ in SAME_LAYOUT))
    for layout, stage, after in SAME_LAYOUT:
        if layout in layouts:
            commands[layout_flags(layout)[0]] += cut_and_resumed(folder, stage, layout, after)
    if "dp2-dist" in layouts:
        signal_name = str(folder / "signal")
        other_kind = command(folder, "finetune", "dp2", "other-kind", "--load", str(folder / "full-finetune-dp2-dist"))
        commands[2] += [
            signalled(command(folder, "finetune", "dp2-dist", "signal", *UNEVEN), iteration=2, rank=1),
            command(folder, "finetune", "dp2-dist", "signal", *UNEVEN, "--load", signal_name),
            refused(
                other_kind, "--use-distributed-optimizer true", "--use-distributed-optimizer false", "--bf16 false"
            ),
        ]
    for size, listed in commands.items():
        if listed:
            train(listed, size)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """Runs that go on at another layout, and what they are compared with; on three groups of processes."""
    plain = [command(folder, stage, "tp1", f"whole-{stage}") for stage in ("pretrain", "finetune")]
    halves = {(source, stage) for source, _, stage in OTHER_LAYOUT}
    half = {key: command(folder, key[1], key[0], f"half-{key[1]}-{key[0]}", "--exit-interval", "2") for key in halves}
    rest = {
        (source, target, stage): command(
            folder, stage, target, f"{stage}-{source}-{target}", "--load", str(folder / f"half-{stage}-{source}")
        )
        for source, target, stage in OTHER_LAYOUT
    }
    one = [*plain, half["tp1", "finetune"]]
    two = [c for (source, _), c in half.items() if source != "tp1"]
    two += [c for (_, target, _), c in rest.items() if target != "tp1-dist"]
    last = [c for (_, target, _), c in rest.items() if target == "tp1-dist"]

    # Stage 1 into stage 2. A rate of 1e-30 moves nothing, so the checkpoint shows what was taken.
    stage_1 = ["--pretrained-checkpoint", str(folder / "whole-pretrain")]
    last += [
        command(folder, "finetune", "tp1", "taken", *stage_1, "--lr", "1e-30", "--train-iters", "1"),
        command(folder, "finetune", "tp1", "stage-2", *stage_1),
        command(folder, "finetune", "tp1", "whole-finetune", "--load", str(folder / "whole-finetune")),  # nothing left
    ]
    two += [command(folder, "finetune", "tp2", "stage-2-tp2", *stage_1)]
    train(one, 1)
    train(two, 2)
    train(last, 1)
    return folder


@pytest.mark.parametrize(("layout", "stage", "after"), SAME_LAYOUT)
def test_resumed_at_its_own_layout_is_bitwise_the_uninterrupted_run(resumed, layout, stage, after) -> None:
    full, cut = resumed / f"full-{stage}-{layout}", resumed / f"cut-{stage}-{layout}"
    assert (cut / f"iter_{after:07d}").is_dir()
    assert_same_state(full, cut)
    assert_same_losses(full, cut)


def test_sigterm_on_one_rank_saves_and_stops_all_and_resumes(resumed: Path) -> None:
    full, cut = resumed / "full-finetune-dp2-dist", resumed / "signal"
    # The signal arrives while step 2 is reported; the ranks agree on it at the end of step 3.
    assert sorted(path.name for path in cut.glob("iter_*")) == ["iter_0000003", "iter_0000005"]
    assert_same_state(full, cut)
    assert_same_losses(full, cut)


@pytest.mark.parametrize(("source", "target", "stage"), OTHER_LAYOUT)
def test_resumed_at_another_layout_goes_on_with_the_same_samples(finished, source, target, stage) -> None:
    whole, found = metrics(finished / f"whole-{stage}"), metrics(finished / f"{stage}-{source}-{target}")
    assert [row["iteration"] for row in found] == [3, 4, 5]
    for expected, row in zip(whole[2:], found, strict=True):
        for tag in (*LOSSES, "temperature", "learning-rate", "grad-norm"):
            assert math.isclose(expected[tag], row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, expected, row)
    assert common_state(finished / f"{stage}-{source}-{target}")["data_state"]["consumed_samples"] == 8 * STEPS


def test_each_group_follows_its_own_rate_and_the_temperature_its_bounds_after_a_resume(resumed: Path) -> None:
    state = common_state(resumed / "cut-pretrain-tp1")
    assert {(group["max_lr"], group["wd_mult"]) for group in state["optimizer"]["param_groups"]} == {
        (2e-3, 1.0), (2e-3, 0.0), (0.4, 1.0), (0.4, 0.0),
    }  # fmt: skip
    assert [group["max_lr"] for group in state["optimizer"]["param_groups"] if group.get("is_temperature")] == [0.4]
    # 2 + 3 steps: the bound was not reached before the interruption, and is kept after it.
    assert [row["temperature"] for row in metrics(resumed / "cut-pretrain-tp1")][2] < 0.5
    assert weights(resumed / "cut-pretrain-tp1")["heads.temperature"].item() == 0.5
    # Nothing else was taken for a temperature: one-dimensional parameters of the heads leave [0.001, 0.5].
    assert weights(resumed / "cut-pretrain-tp1")["heads.text_projector.bias"].min() < 0


def test_a_finished_run_started_again_changes_nothing(finished: Path) -> None:
    assert [row["iteration"] for row in metrics(finished / "whole-finetune")] == list(range(1, STEPS + 1))
    assert common_state(finished / "whole-finetune")["progress"]["iteration"] == STEPS


def test_pretrained_checkpoint_of_ours_gives_all_weights_and_a_fresh_run(finished: Path) -> None:
    stage_1, taken = weights(finished / "whole-pretrain"), weights(finished / "taken")
    assert stage_1.keys() == taken.keys()
    for name, tensor in stage_1.items():
        torch.testing.assert_close(taken[name], tensor, rtol=0, atol=1e-29, msg=name)
    state = common_state(finished / "taken")
    assert state["progress"]["iteration"] == 1 and state["progress"]["drawn_samples"] == 8
    assert {group["step"] for group in state["optimizer"]["param_groups"]} == {1}
    assert metrics(finished / "taken")[0]["temperature"] == pytest.approx(stage_1["heads.temperature"].item(), rel=1e-6)


def test_stage_2_goes_on_from_the_heads_connector_and_temperature_of_stage_1(finished: Path) -> None:
    stage_1, stage_2 = weights(finished / "whole-pretrain"), weights(finished / "stage-2")
    original = weights(finished / "whole-finetune")
    for name in stage_1:
        if name.startswith(("heads.", "connector.", "language_model.")):
            assert not torch.equal(stage_1[name], stage_2[name]), f"{name} is frozen in stage 2"
        if name.startswith(("heads.", "connector.")):  # closer to stage 1 than to a stage 2 that never saw it
            far = (stage_2[name] - original[name]).abs().mean()
            assert (stage_2[name] - stage_1[name]).abs().mean() < far, name
    for expected, row in zip(metrics(finished / "stage-2"), metrics(finished / "stage-2-tp2"), strict=True):
        for tag in (*LOSSES, "temperature"):
            assert math.isclose(expected[tag], row[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, expected, row)


def assert_same_losses(expected: Path, found: Path) -> None:
    """Every iteration is in `metrics.jsonl` once, with the same numbers."""
    one, other = metrics(expected), metrics(found)
    assert [row["iteration"] for row in other] == [row["iteration"] for row in one]
    for row, other_row in zip(one, other, strict=True):
        for tag in (*LOSSES, "temperature", "learning-rate", "grad-norm"):
            assert row[tag] == other_row[tag], (row["iteration"], tag)


# ------------------------------------------------------------------------------------------- killed from outside


def start(arguments: list[str], log: Path) -> Warm:
    """A trainer in its own process group, so that a kill reaches whatever it has started."""
    with log.open("a") as output:
        return Warm(["-m", *arguments], stdout=output.fileno(), stderr=output.fileno(), warm_ranks=True)


def wait_for(condition: Callable[[], bool], process: Warm, log: Path) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.001)


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, Path]:
    """Two endless runs killed when nobody knows what they do, resumed for two steps more, and the same uninterrupted.

    `sigterm`: torchrun with two processes, told to stop. `sigkill`: one process, killed with a save under way.
    """
    endless = ["--lr-decay-style", "constant", "--lr-warmup-fraction", "0"]  # a schedule that knows no last iteration

    def flags(name: str, layout: str, *extra: str) -> list[str]:
        return command(folder, "pretrain", layout, name, *endless, *extra)

    saves = {name: folder / name for name in ("sigterm", "sigkill")}
    logs = {name: folder / f"{name}.log" for name in saves}
    forever = ["--train-iters", "100000"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hacl_megatron.train"]
    processes = {
        "sigterm": start([*torchrun, *flags("sigterm", "dp2-dist", *forever)], logs["sigterm"]),
        "sigkill": start(
            ["hacl_megatron.train", *flags("sigkill", "tp1", *forever, "--save-interval", "2")], logs["sigkill"]
        ),
    }
    try:
        third_save = "iter_0000006*/*.distcp"  # under the name of a save under way, most likely
        wait_for(lambda: any(saves["sigkill"].glob(third_save)), processes["sigkill"], logs["sigkill"])
        os.killpg(processes["sigkill"].pid, signal.SIGKILL)
        processes["sigkill"].wait()
        lines = saves["sigterm"] / "metrics.jsonl"
        wait_for(lambda: lines.exists() and lines.read_text().count("\n") > 2, processes["sigterm"], logs["sigterm"])
        processes["sigterm"].send_signal(signal.SIGTERM)
        processes["sigterm"].wait(120)
    finally:
        for process in processes.values():
            if process.poll() is None:
                # torchrun's children have sessions of their own
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                os.killpg(process.pid, signal.SIGKILL)

    for name, layout in (("sigkill", "tp1"), ("sigterm", "dp2-dist")):
        done = common_state(saves[name])["progress"]["iteration"]
        shutil.copytree(saves[name], folder / f"{name}-as-left")
        steps = ["--train-iters", str(done + 2)]
        resumed = flags(name, layout, *steps, "--load", str(saves[name]))
        train([resumed, flags(f"{name}-whole", layout, *steps)], layout_flags(layout)[0])
    return saves


def test_torchrun_stopped_by_sigterm_saves_the_step_it_was_at_and_resumes(killed: dict[str, Path]) -> None:
    left = killed["sigterm"].with_name("sigterm-as-left")
    done = common_state(left)["progress"]["iteration"]
    assert f"stopped after iteration {done}: received SIGTERM" in (left.parent / "sigterm.log").read_text()
    assert [row["iteration"] for row in metrics(left)] == list(range(1, done + 1))
    assert_same_state(left.with_name("sigterm-whole"), killed["sigterm"])
    assert_same_losses(left.with_name("sigterm-whole"), killed["sigterm"])


def test_killed_while_saving_resumes_from_the_last_complete_checkpoint(killed: dict[str, Path]) -> None:
    left = killed["sigkill"].with_name("sigkill-as-left")
    # Killed once a file of the third save was seen, which may be finished by then, but not half a checkpoint.
    done = common_state(left)["progress"]["iteration"]
    assert (done == 4 and (left / "iter_0000006.partial").is_dir()) or done == 6
    assert_same_state(left.with_name("sigkill-whole"), killed["sigkill"])
    assert_same_losses(left.with_name("sigkill-whole"), killed["sigkill"])
    assert not list(killed["sigkill"].glob("*.partial"))
    # TensorBoard shows nothing of what was logged between the checkpoint and the kill, and every step once.
    events = EventAccumulator(str(killed["sigkill"] / "tensorboard")).Reload().Scalars("lm loss")
    assert [event.step for event in events] == list(range(1, done + 3))
