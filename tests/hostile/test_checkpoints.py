"""Checkpoints made to run code, through every command that opens one: no code runs, and one line names the file.

Each kind puts a pickle that makes a file into one of the places that torch and megatron-core unpickle. That the pickles
are loaded guns is shown by Python's own reader. That nothing else is read by Python's or torch's pickle reader is shown
by an audit hook on whole, honest checkpoints: what `pickle` looks up then is none of a checkpoint's.
"""

import contextlib
import io
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from hacl_megatron.train import main
from tests.distributed import run_distributed
from tests.tool_runs import run_tool
from tests.training.runs import latest_checkpoint, make_inputs, train


class Gun:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def torch_saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def record_with(gun: Gun) -> bytes:
    """As long as a weight's: one that is too short is refused unread."""
    return torch_saved([gun, torch.zeros(3000)])


def metadata_alone(folder: Path, gun: Gun) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(gun))


def metadata_with_a_plan(folder: Path, gun: Gun) -> None:
    """Right in all that a loader needs, and something more."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = gun
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def metadata_by_way_of_torch(folder: Path, gun: Gun) -> None:
    """A name in a module on the list that leads out of it: torch's own `os.mkdir`."""
    name, argument = b"serialization.os.mkdir", str(gun.path).encode()
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (b"torch", name))
    (folder / ".metadata").write_bytes(
        b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(argument)]) + argument + b"\x85R."
    )


def common(folder: Path, gun: Gun) -> None:
    state = torch.load(folder / "common.pt", weights_only=False)
    torch.save({**state, "progress": gun}, folder / "common.pt")


def common_of_the_old_format(folder: Path, gun: Gun) -> None:
    torch.save({"progress": gun}, folder / "common.pt", _use_new_zipfile_serialization=False)


def record_of(name: str) -> Callable[[Path, Gun], None]:
    def put(folder: Path, gun: Gun) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index, info = next((index, info) for index, info in metadata.storage_data.items() if name in index.fqn)
        content, file = record_with(gun), folder / "__0_0.distcp"
        metadata.storage_data[index] = type(info)(file.name, file.stat().st_size, len(content))
        with file.open("ab") as stream:
            stream.write(content)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return put


def file_elsewhere(folder: Path, gun: Gun) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../../../../../../etc/passwd"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


LOADERS = ("load", "pretrained", "evaluate", "plot")
OPENERS = (*LOADERS, "convert", "inspect")
KINDS: dict[str, tuple[Callable[[Path, Gun], None], str, tuple[str, ...]]] = {
    "metadata": (metadata_alone, ".metadata", OPENERS),
    "metadata-plan": (metadata_with_a_plan, ".metadata", OPENERS),
    "metadata-torch": (metadata_by_way_of_torch, ".metadata", OPENERS),
    "elsewhere": (file_elsewhere, ".metadata", OPENERS),
    "common": (common, "common.pt", (*LOADERS, "inspect")),
    "common-old": (common_of_the_old_format, "common.pt", (*LOADERS, "inspect")),
    "weight": (record_of("heads.text_projector.weight"), "__0_0.distcp", (*LOADERS, "convert")),
    "optimizer": (record_of("optimizer.state.exp_avg.connector.0.bias"), "__0_0.distcp", ("load",)),
    "random-states": (record_of("random_states/"), "__0_0.distcp", ("load",)),
    "queue": (record_of("queue/"), "__0_0.distcp", ("load",)),
    "extra-state": (record_of("._extra_state/"), "__0_0.distcp", ("load",)),
}  # fmt: skip
"""What makes it, the file that the line names, and the commands that read that place and so must refuse."""


def commands(folder: Path, checkpoint: Path, out: Path) -> dict[str, Callable[[], int | None]]:
    """Every command that opens a checkpoint; each gives its exit status."""
    data = folder / "data"
    samples = ("--data-path", data / "contrastive.json", "--image-folder", data / "images", "--device", "cpu")
    run = ["--config", str(folder / "finetune.yaml"), "--micro-batch-size", "8", "--contrastive-negatives", "queue"]

    def trained(*flags: str) -> Callable[[], int | None]:
        def start() -> int | None:
            try:
                main([*run, "--train-iters", "3", "--save", str(out / "save"), *flags])
            except SystemExit as leaving:
                return leaving.code
            return None

        return start

    def tool(name: str, *arguments: object) -> Callable[[], int]:
        return lambda: run_tool(name, *arguments)

    return {
        "load": trained("--load", str(checkpoint)),
        "pretrained": trained("--pretrained-checkpoint", str(checkpoint)),
        "evaluate": tool(
            "evaluate", "--load", checkpoint, "--tasks", "preference", *samples, "--output", out / "e.json"
        ),
        "plot": tool("plot_representations", "--load", checkpoint, *samples, "--limit", "4", "--output", out / "plots"),
        "convert": tool("convert_megatron_to_hf", "--load", checkpoint, "--hf-path", out / "hf"),
        "inspect": tool("inspect_checkpoint", checkpoint),
    }


Outcomes = dict[tuple[str, str], tuple[int | None, str, bool]]
"""(kind, command) -> exit status, stderr, and whether code ran."""


def open_all(folder: Path, kinds: dict[str, tuple[str, ...]]) -> tuple[Outcomes, set[str]]:
    """What every command makes of each kind's checkpoint, and all that was looked up by `pickle` for honest ones."""
    looked_up: set[str] = set()
    listening = [True]

    def hear(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class" and listening[0]:
            looked_up.add(f"{arguments[0]}.{arguments[1]}")

    sys.addaudithook(hear)  # for ever: the process is the test's own
    found: Outcomes = {}
    for kind, names in kinds.items():
        listening[0] = kind == "honest"
        marker, checkpoint, out = folder / kind / "ran", folder / kind / "iter_0000002", folder / kind / "out"
        for name in names:
            written = io.StringIO()
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            with contextlib.redirect_stderr(written), contextlib.redirect_stdout(io.StringIO()):
                code = commands(folder, checkpoint, out)[name]()
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            found[kind, name] = code, written.getvalue(), marker.exists()
            if marker.exists():
                marker.rmdir() if marker.is_dir() else marker.unlink()
    return found, looked_up


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes, set[str]]:
    folder = make_inputs(tmp_path_factory.mktemp("hostile"), samples=16)
    flags = [
        "--micro-batch-size",
        "8",
        "--train-iters",
        "2",
        "--contrastive-negatives",
        "queue",
        "--freeze-ViT",
        "false",
    ]
    train([["--config", str(folder / "finetune.yaml"), "--save", str(folder / "honest"), *flags]], 1)
    checkpoint = latest_checkpoint(folder / "honest")
    for kind, (make, _, _) in KINDS.items():
        copy = shutil.copytree(checkpoint, folder / kind / checkpoint.name)
        (copy / "files.json").unlink()  # or forged: nobody signs it
        make(copy, Gun(folder / kind / "ran"))
    wanted = {"honest": OPENERS} | {kind: names for kind, (_, _, names) in KINDS.items()}
    ((outcomes, looked_up),) = run_distributed(open_all, 1, folder, wanted)
    return folder, outcomes, looked_up


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_runs_and_one_line_names_the_file(opened, kind: str) -> None:
    """Catches a loader that unpickles what it was given: torch's and megatron-core's did all of these but weights."""
    folder, outcomes, _ = opened
    _, file, names = KINDS[kind]
    for name in names:
        code, written, ran = outcomes[kind, name]
        lines = [line for line in written.splitlines() if "error: " in line]
        assert not ran, (kind, name)
        assert code == 2 and len(lines) == 1 and "Traceback" not in written, (kind, name, code, written)
        assert str(folder / kind / "iter_0000002" / file) in lines[0], (kind, name, lines)


@pytest.mark.parametrize("kind", ["metadata", "metadata-plan", "metadata-torch", "common", "weight", "random-states"])
def test_the_guns_are_loaded(opened, kind: str) -> None:
    """Pickle's own reader makes the file: else the test above would pass on anything."""
    folder, _, _ = opened
    place, marker = folder / kind / "iter_0000002", folder / kind / "ran"
    with contextlib.suppress(Exception):
        if kind.startswith("metadata"):
            pickle.loads((place / ".metadata").read_bytes())
        elif kind == "common":
            torch.load(place / "common.pt", weights_only=False)
        else:
            length = len(record_with(Gun(marker)))  # of the record at the file's end
            torch.load(io.BytesIO((place / "__0_0.distcp").read_bytes()[-length:]), weights_only=False)
    assert marker.exists()
    marker.rmdir() if marker.is_dir() else marker.unlink()


def test_honest_checkpoints_open_and_pickle_looks_nothing_up_in_them(opened) -> None:
    """Of both megatron-core lines: a file that one of their readers, or torch's, unpickles beside ours shows here."""
    _, outcomes, looked_up = opened
    for name in OPENERS:
        code, written, _ = outcomes["honest", name]
        assert code in (None, 0), (name, written)
    theirs = ("torch.distributed.checkpoint", "torch._utils", "torch.storage", "pathlib", "numpy", "megatron")
    of_checkpoints = {name for name in looked_up if name.startswith(theirs)}
    assert not of_checkpoints, sorted(looked_up)
