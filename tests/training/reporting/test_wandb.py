"""`--wandb-project` with Weights & Biases offline: the run's scalars are in the file that `wandb sync` would send."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hacl_megatron.train import run
from tests.distributed import run_distributed
from tests.training.runs import layout_flags, make_inputs, metrics

pytest.importorskip("wandb", reason="pip install wandb")

_BLOCK = 32768
"""Bytes; the file is a LevelDB log of protobuf records behind a header of 7 bytes."""


def _records(file: Path) -> Iterator[Any]:
    """wandb's `Record`s of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B", "a file of an offline run"
    position, whole = 7, b""
    while position + 7 <= len(data):
        if _BLOCK - position % _BLOCK < 7:  # no room for a head: zeros
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def test_only_a_run_that_goes_on_takes_up_an_id(tmp_path: Path) -> None:
    """Catches a fresh run whose points land in an older one's curves, and a look for a file in no folder."""
    from hacl_megatron.training.reporting.metrics import _open_wandb

    note, runs = tmp_path / "new" / "wandb_run_id.txt", []
    with mock.patch.dict("os.environ", WANDB_MODE="offline", WANDB_SILENT="true"), mock.patch("wandb.init") as init:
        init.side_effect = lambda **given: runs.append(given) or mock.Mock(id=f"run{len(runs)}")
        for folder, goes_on in ((note.parent, True), (note.parent, True), (note.parent, False), (None, True)):
            _open_wandb("project", folder, {"a": 1}, goes_on=goes_on)
    assert [(run["id"], run["resume"]) for run in runs] == [(None, None), ("run1", "allow"), (None, None), (None, None)]
    assert note.read_text() == "run3\n" and [run["dir"] for run in runs] == [note.parent] * 3 + [None]


def _train(commands: list[list[str]]) -> None:
    # What reaches the network would hang or fail: there is none where this runs.
    with mock.patch.dict("os.environ", WANDB_MODE="offline", WANDB_SILENT="true"):
        for command in commands:
            run(command)


def test_scalars_and_configuration_are_in_the_offline_run(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path)
    save = folder / "save"
    flags = ["--config", str(folder / "finetune.yaml"), *layout_flags("tp1")[1], "--wandb-project", "hacl-tests"]
    flags += ["--save", str(save), "--load", str(save)]
    run_distributed(_train, 1, [[*flags, "--exit-interval", "3"], flags])
    first, second = sorted((save / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)

    logged: dict[int, dict[str, float]] = {}
    ids = set()
    for file in (first, second):
        for record in _records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert record.run.project == "hacl-tests"
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["optimizer"]["lr"] == 1e-3 and config["training"]["global_batch_size"] == 8
            if record.HasField("history"):
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                logged[int(row["_step"])] = row
    assert ids == {(save / "wandb_run_id.txt").read_text().strip()}, "a resumed run goes on with its curves"
    rows = metrics(save)
    assert [row["iteration"] for row in rows] == sorted(logged) == [1, 2, 3, 4, 5]
    for row in rows:
        for tag, value in row.items():
            if tag != "iteration":
                assert logged[row["iteration"]][tag] == pytest.approx(value, rel=1e-6), tag
