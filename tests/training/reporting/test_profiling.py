"""`--profile-step-start/-end` on two real processes: what the trace files hold, and when there are none."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hacl_megatron.train import run
from tests.training.runs import layout_flags, make_inputs, train

BOTH = ["--profile-ranks", "0", "1"]


def _without_profiler(arguments: list[str]) -> None:
    with mock.patch.object(torch.profiler.profile, "start", side_effect=AssertionError("a run without the flags")):
        run(arguments)


def command(folder: Path, save: str, *extra: str) -> list[str]:
    flags = ["--config", str(folder / "finetune.yaml"), *layout_flags("dp2")[1]]
    return [*flags, "--save", str(folder / save), "--load", str(folder / save), *extra]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("profiling"))
    ahead = ["--profile-step-start", "4", "--profile-step-end", "6"]
    train(
        [
            command(folder, "both", "--profile-step-start", "3", "--profile-step-end", "5", *BOTH),
            command(folder, "first", "--profile-step-start", "1", "--profile-step-end", "2"),
            # stopped inside its window and resumed there
            command(folder, "cut", *ahead, "--exit-interval", "4", "--tensorboard-dir", str(folder / "events")),
            command(folder, "cut", *ahead, "--tensorboard-dir", str(folder / "events")),
            partial(_without_profiler, command(folder, "none", "--train-iters", "1")),
        ],
        2,
    )
    return folder


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Events of each trace file in a `profile` folder."""
    return {
        path.name: json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        for path in sorted((folder / "profile").iterdir())
    }


def named(events: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("ph") == "X" and event["name"].startswith(prefix)]


def test_each_chosen_rank_leaves_a_trace_of_the_window_alone(folder: Path) -> None:
    found = traces(folder / "both" / "tensorboard")
    assert list(found) == [f"rank{rank}_iterations_3-4.pt.trace.json.gz" for rank in (0, 1)]
    for events in found.values():
        iterations = named(events, "iteration ")
        assert sorted(event["name"] for event in iterations) == ["iteration 3", "iteration 4"]
        begin = min(event["ts"] for event in iterations)
        end = max(event["ts"] + event["dur"] for event in iterations)
        for phase in ("load", "forward-backward", "update"):
            assert len([event for event in named(events, phase) if event["name"] == phase]) == 2, phase
        products = named(events, "aten::mm")
        assert len(products) > 20 and all(begin <= event["ts"] <= end for event in products)
        # Both ends of autograd, the collectives, and shapes of what ran.
        assert named(events, "autograd::engine") and named(events, "gloo:")
        assert all(event["args"]["Input Dims"] for event in products)


def test_rank_0_alone_is_the_default_and_a_window_may_begin_at_once(folder: Path) -> None:
    ((name, events),) = traces(folder / "first" / "tensorboard").items()
    assert name == "rank0_iterations_1.pt.trace.json.gz"
    assert [event["name"] for event in named(events, "iteration ")] == ["iteration 1"]


def test_a_run_that_stops_inside_the_window_writes_and_its_resumption_too(folder: Path) -> None:
    found = traces(folder / "events")
    assert list(found) == [f"rank0_iterations_{number}.pt.trace.json.gz" for number in (4, 5)]
    for number, events in zip((4, 5), found.values(), strict=True):
        assert [event["name"] for event in named(events, "iteration ")] == [f"iteration {number}"]
        assert named(events, "aten::mm")


def test_without_the_flags_no_profiler_is_made(folder: Path) -> None:
    """`_without_profiler` has run to its end."""
    assert (folder / "none" / "metrics.jsonl").is_file()
    assert not (folder / "none" / "tensorboard" / "profile").exists()
