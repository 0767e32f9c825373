"""A run goes on with Transformer Engine that was saved without, and the other way round, as if nothing had changed.

Layers of Transformer Engine save an extra state where the local ones save none, and with FP8's delayed scaling there is
something in it. Here the project's norms and linear layers save such ones; `tests/platform/test_transformer_engine.py`
has the real modules.
"""

import contextlib
import json
import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import layers
from torch import Tensor

from hacl_megatron.checkpoint.run import extra_states
from hacl_megatron.checkpoint.run.stored.index import read_index
from hacl_megatron.platform import norms
from hacl_megatron.train import run
from tests.distributed import run_distributed
from tests.tool_runs import run_tool, to_hf
from tests.training.runs import (
    assert_same_state,
    latest_checkpoint,
    layout_flags,
    make_inputs,
    run_refused,
    train,
)

EMPTY = torch.empty(0, dtype=torch.uint8)
SCALES = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": [2.0]})), dtype=torch.uint8)
LINEAR = (layers.ColumnParallelLinear, layers.RowParallelLinear)
SIDES = ("local", "engine")
CHANGES = [(before, after) for before in SIDES for after in SIDES if (before, after) != ("local", "local")]
# What is trained, and how the optimiser is laid out.
KINDS = {
    "all, tp1": ("tp1", ["--freeze-ViT", "false"]),
    "lora, dp2-dist": ("dp2-dist", ["--lora-rank", "4"]),
}


@contextlib.contextmanager
def layers_of(side: str, given: list[Tensor | None]) -> Iterator[None]:
    """Norms and linear layers with the extra states of one side: none in local norms, FP8 scales for `scaled`."""
    state = {"local": None, "engine": EMPTY, "scaled": SCALES}[side]
    classes = LINEAR if side == "local" else (norms._Norm, *LINEAR)
    with contextlib.ExitStack() as stack:
        for cls in classes:
            methods = {"get": lambda layer: state, "set": lambda layer, found: given.append(found)}
            for name, method in methods.items():
                stack.enter_context(mock.patch.object(cls, f"{name}_extra_state", method, create=True))
        yield


def run_as(side: str, command: Sequence[str], printed: Path) -> None:
    """A training with the layers of one side; what it says goes to a file, behind a line on what its layers got."""
    given: list[Tensor | None] = []
    with printed.open("a") as file, contextlib.redirect_stdout(file), layers_of(side, given):
        run(command)
        print(f"given {len(given)}, of them scales {sum(map(extra_states.holds_scales, given))}", file=file)


def run_with_another_weight(command: Sequence[str]) -> None:
    """A training whose norms have a weight that no checkpoint holds: refused."""
    build = norms.RMSNorm.__init__

    def build_with_another(norm: norms.RMSNorm, config, hidden_size: int, *args, **kwargs) -> None:
        build(norm, config, hidden_size, *args, **kwargs)
        norm.shift = torch.nn.Parameter(torch.zeros(hidden_size))

    with mock.patch.object(norms.RMSNorm, "__init__", build_with_another):
        run_refused(command, ["cannot be loaded", "shift", "belongs to another model"])


def name_of(kind: str, *sides: str) -> str:
    return f"{kind} {' '.join(sides)}".replace(",", "").replace(" ", "-")


def commands_of(folder: Path, kind: str) -> list[partial]:
    """A whole run; for each side one that stops half-way, and what goes on from it on either side."""
    layout, flags = KINDS[kind]
    common = ["--config", str(folder / "finetune.yaml"), *layout_flags(layout)[1], *flags, "--train-iters", "3"]

    def one(side: str, name: str, *more: str) -> partial:
        save = folder / name
        return partial(run_as, side, [*common, "--save", str(save), *more], folder / f"{name}.txt")

    halves = [one(side, name_of(kind, side), "--exit-interval", "1") for side in SIDES]
    rest = [
        one(after, name_of(kind, before, after), "--load", str(folder / name_of(kind, before)))
        for before, after in CHANGES
    ]
    return [one("local", name_of(kind, "whole")), *halves, *rest]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("extra_states"), samples=24)
    commands: dict[int, list[partial]] = {1: [], 2: []}
    for kind, (layout, _) in KINDS.items():
        commands[layout_flags(layout)[0]] += commands_of(folder, kind)
    for name, side, more in (
        ("scaled", "scaled", ["--exit-interval", "1"]),
        ("scaled-local", "local", ["--load", str(folder / "scaled")]),
        ("scaled-engine", "engine", ["--load", str(folder / "scaled")]),
    ):
        plain = ["--config", str(folder / "finetune.yaml"), "--micro-batch-size", "8", "--train-iters", "3"]
        commands[1].append(partial(run_as, side, [*plain, "--save", str(folder / name), *more], folder / f"{name}.txt"))
    # A weight that is not there stays an error.
    commands[1].append(partial(run_with_another_weight, [*plain, "--load", str(folder / "scaled")]))
    for processes, listed in commands.items():
        train(listed, processes)
    return folder


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_bitwise_the_uninterrupted_run_whichever_layers_saved_it(finished, kind, before, after) -> None:
    assert_same_state(finished / name_of(kind, "whole"), finished / name_of(kind, before, after))
    said = (finished / f"{name_of(kind, before, after)}.txt").read_text()
    assert "resumed iteration 1" in said and "FP8" not in said


def test_extra_states_that_both_have_are_loaded(finished) -> None:
    """4 + 1 norms and linear layers of two LLaMA layers, and CLIP's: each gets its own back."""
    stored = [name for name in _other_keys(finished / name_of("all, tp1", "engine")) if "_extra_state/" in name]
    (said,) = _given(finished / f"{name_of('all, tp1', 'engine', 'engine')}.txt")
    assert len(stored) > 20 and said == (len(stored), 0)
    assert not any("norm" in name for name in _other_keys(finished / name_of("all, tp1", "local")))


def test_fp8_scales_that_are_of_no_use_are_left_out_and_said(finished) -> None:
    for name in ("scaled-local", "scaled-engine"):
        said = (finished / f"{name}.txt").read_text().splitlines()
        assert any(line.startswith("resumed iteration 1") for line in said)
        assert "the checkpoint's FP8 scales are left out: this run does not use delayed scaling" in said
        assert [scales for _, scales in _given(finished / f"{name}.txt")] == [0]
    assert_same_state(finished / "scaled-local", finished / "scaled-engine")


def _other_keys(save: Path) -> list[str]:
    return list(read_index(latest_checkpoint(save)).objects)


def _given(printed: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in printed.read_text().splitlines() if line.startswith("given ")]
    return [(int(words[1].rstrip(",")), int(words[-1])) for words in lines]


def test_fp8_scales_stay_where_they_are_used_and_their_absence_is_said() -> None:
    states = {"a._extra_state": SCALES, "b._extra_state": EMPTY, "a.weight": torch.ones(3)}
    assert extra_states.take_out_scales(states, used=True) is None
    assert states["a._extra_state"] is SCALES
    states["a._extra_state"] = None
    assert "starts with fresh ones" in extra_states.take_out_scales(states, used=True)
    assert extra_states.take_out_scales(states, used=False) is None


def test_only_extra_states_may_be_absent() -> None:
    state = ShardedObject("a._extra_state", None, (2,), (1,))
    other = ShardedObject("queue", None, (1,), (0,))
    weights = {"a._extra_state": state, "queue": other, "a.weight": torch.ones(3)}
    assert extra_states.without_absent(weights, {"a.weight"}).keys() == {"queue", "a.weight"}
    assert extra_states.without_absent(weights, {"a._extra_state/shard_0_2"}).keys() == {"queue", "a.weight"}
    assert extra_states.without_absent(weights, {"a._extra_state/shard_1_2"}).keys() == weights.keys()


def tools_on(saves: list[Path], folder: Path) -> None:
    data = ["--data-path", folder / "data" / "contrastive.json", "--image-folder", folder / "data" / "images"]
    for save in saves:
        flags = ["--load", save, *data, "--device", "cpu", "--image-backend", "pillow"]
        assert run_tool("plot_representations", *flags, "--output", save / "plot") == 0
        assert run_tool("evaluate", *flags, "--tasks", "preference", "--output", save / "evaluated.json") == 0


def test_without_the_engine_its_checkpoints_are_exported_evaluated_and_plotted(finished, tmp_path) -> None:
    saves = [finished / name_of("lora, dp2-dist", *sides) for sides in (["whole"], ["engine", "engine"])]
    run_distributed(tools_on, 1, saves, finished)
    found = []
    for save in saves:
        exported = to_hf(save, tmp_path / save.name) / "model.safetensors"
        measured = json.loads((save / "evaluated.json").read_text())["tasks"]["preference"]
        found.append((exported.read_bytes(), (save / "plot" / "representations.json").read_text(), measured["metrics"]))
    assert found[0][0] == found[1][0]
    assert found[0][1].replace(saves[0].name, "") == found[1][1].replace(saves[1].name, "")
    assert found[0][2] == found[1][2]
