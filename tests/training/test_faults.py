"""What must not kill a run, and what must end it with one clear line."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from PIL import Image

from hacl_megatron.train import main, run
from hacl_megatron.training.losses import StepLosses
from hacl_megatron.training.reporting.status import TrainingStopped
from hacl_megatron.training.step import Step
from tests.distributed import run_distributed
from tests.selection import selected
from tests.training.runs import LOSSES, common_state, layout_flags, make_inputs, metrics, tensors, train, weights
from tests.warm import run_warm


def command(folder: Path, stage: str, layout: str, save: str, *extra: str, samples: int = 8) -> list[str]:
    _, flags = layout_flags(layout, samples=samples)
    return ["--config", str(folder / f"{stage}.yaml"), "--save", str(folder / save), *flags, *extra]


# ---------------------------------------------------------------------------------------------- non-finite steps


def run_with_overflow(arguments: Sequence[str], *, steps: Sequence[int], where: str, stops: bool = False) -> None:
    """Train, while in `steps` (counted from 1) something overflows on the last rank alone.

    `weight`: an infinite entry of the heads, mended after the step, so that the loss is not a number.
    `gradient`: the loss is finite, but its gradient is not.
    """
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    forward_backward, loss, done = Step.forward_backward, StepLosses.of_micro_batch, 0

    def overflowing(self: Step, *inputs, **options):
        nonlocal done
        done += 1
        if not last or where != "weight" or done not in steps:
            return forward_backward(self, *inputs, **options)
        weight = self.model.module.heads.text_projector.weight.data
        kept = weight.clone()
        weight[0, 0] = math.inf
        metrics = forward_backward(self, *inputs, **options)
        weight.copy_(kept)
        return metrics

    def overflowing_loss(self: StepLosses, output, index):
        value, sums = loss(self, output, index)
        return (value * math.inf if last and where == "gradient" and done in steps else value), sums

    with (
        mock.patch.object(Step, "forward_backward", overflowing),
        mock.patch.object(StepLosses, "of_micro_batch", overflowing_loss),
        pytest.raises(TrainingStopped, match=r"2 steps in a row.*--max-skipped-steps 1.*--lr")
        if stops
        else contextlib.nullcontext(),
    ):
        run(arguments)
    if stops:
        parallel_state.destroy_model_parallel()


def overflows(arguments: Sequence[str], **how) -> Callable[[], None]:
    return partial(run_with_overflow, arguments, **how)


SKIPPED = [("tp1", "weight"), ("tp1", "gradient"), ("dp2-dist", "weight"), ("dp2-dist", "gradient"), ("pp2", "weight")]


@pytest.fixture(scope="module")
def skipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layouts = selected(request, "layout", dict.fromkeys(layout for layout, _ in SKIPPED))
    folder = make_inputs(tmp_path_factory.mktemp("skips"))
    commands: dict[int, list] = {1: [], 2: []}
    for layout, where in SKIPPED:
        if layout not in layouts:
            continue
        name = f"{layout}-{where}"
        arguments = command(folder, "finetune", layout, name, "--save-interval", "1")
        commands[layout_flags(layout)[0]].append(overflows(arguments, steps=[3], where=where))
    for layout in {"tp1", "dp2-dist"} & {*layouts}:
        # Not one step is applied before the run gives up, and still what it saves can be gone on from.
        arguments = command(folder, "finetune", layout, f"hopeless-{layout}", "--max-skipped-steps", "1")
        resumed = [*arguments, "--load", str(folder / f"hopeless-{layout}")]
        commands[layout_flags(layout)[0]] += [
            overflows(arguments, steps=[1, 2, 3, 4], where="gradient", stops=True),
            overflows(resumed, steps=[1], where="gradient"),
        ]
    for size, listed in commands.items():
        if listed:
            train(listed, size)
    return folder


def state_at(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Tensors of one checkpoint among several in `save`."""
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return tensors(save)


@pytest.mark.parametrize(("layout", "where"), SKIPPED)
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(skipped: Path, layout: str, where: str) -> None:
    save = skipped / f"{layout}-{where}"
    before, after, later = (state_at(save, iteration) for iteration in (2, 3, 4))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not torch.equal(after["connector.0.weight"], later["connector.0.weight"])
    assert all(tensor.isfinite().all() for tensor in later.values())

    rows = metrics(save)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["skipped-steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert ("contrastive loss" in rows[2]) == (where == "gradient"), "JSON knows no NaN"
    assert "grad-norm" not in rows[2]
    # The schedule waits for the step; the data does not.
    expected = [1e-3 * (1 + math.cos(math.pi * done / 5)) / 2 for done in (0, 1, 2, 2, 3)]
    assert [row["learning-rate"] for row in rows] == pytest.approx(expected)
    (save / "latest_checkpointed_iteration.txt").write_text("5\n")
    state = common_state(save)
    assert state["scheduler"]["num_steps"] == 4 and state["data_state"]["consumed_samples"] == 40
    assert state["progress"]["skipped_steps"] == 1 and state["progress"]["consecutive_skips"] == 0


@pytest.mark.parametrize("layout", ["tp1", "dp2-dist"])
def test_too_many_skipped_steps_stop_the_run_and_leave_a_checkpoint(skipped: Path, layout: str) -> None:
    save = skipped / f"hopeless-{layout}"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002", "iter_0000005"]
    # Resumed, it may fail as often again: steps 1 and 2 before the stop, step 3 after it.
    assert [row["skipped-steps"] for row in metrics(save)] == [1, 2, 3, 3, 3]


# --------------------------------------------------------------------------------------------------- bad samples

BAD = {"no such file": 1, "Truncated": 3, "known format": 4, "empty": 6, "no turns": 7}
"""Word of the reason -> which of the 12 samples it is."""
GIF = 2
GOOD = [index for index in range(12) if index not in BAD.values()]


def spoil(folder: Path, stage: str) -> None:
    """Break five of the 12 samples of `stage`, each in its own way; make one a GIF named .jpg, as LLaVA's data has."""
    path = folder / "data" / f"{stage}.json"
    samples = json.loads(path.read_text())
    images = [folder / "data" / "images" / sample["image"] for sample in samples]
    images[1].unlink()
    images[3].write_bytes(images[3].read_bytes()[:200])
    images[4].write_text("<html>404 Not Found</html>")
    images[6].write_bytes(b"")
    samples[7]["conversations"] = []
    samples[7].pop("text", None)
    Image.open(images[GIF]).save(images[GIF], format="GIF")
    path.write_text(json.dumps(samples))
    (folder / "data" / "good.json").write_text(json.dumps([samples[index] for index in GOOD]))


def forget_later_checkpoints(save: Path, iteration: int) -> None:
    """What a run leaves that logged further than its last checkpoint."""
    (save / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch is a step, so that the 12 samples and the good ones among them make the same steps."""
    folder = make_inputs(tmp_path_factory.mktemp("spoilt"), samples=12)
    spoil(folder, "pretrain")
    all_12 = ["--global-batch-size", "12", "--train-iters", "3"]
    good = ["--data-path", str(folder / "data" / "good.json"), "--global-batch-size", "7", "--train-iters", "3"]
    missing = folder / "data" / "missing.json"
    sample = json.loads((folder / "data" / "good.json").read_text())[0]
    missing.write_text(json.dumps([{**sample, "image": "nowhere.jpg"}] * 4))
    hopeless = ["--data-path", str(missing), "--global-batch-size", "4", "--train-iters", "2", "--weight-decay", "0"]
    one = [
        command(folder, "pretrain", "tp1", "spoilt", *all_12, samples=12),
        command(folder, "pretrain", "tp1", "good", *good, samples=7),
    ]
    two = [
        command(folder, "pretrain", "dp2", "spoilt-dp2", *all_12, samples=12),
        command(folder, "pretrain", "pp2", "spoilt-pp2", *all_12, samples=12),
        command(folder, "pretrain", "dp2", "hopeless", *hopeless, samples=4),
    ]
    resumed = command(folder, "pretrain", "tp1", "spoilt-resumed", *all_12, samples=12)
    one += [
        [*resumed, "--save-interval", "1"],
        partial(forget_later_checkpoints, folder / "spoilt-resumed", 1),
        [*resumed, "--load", str(folder / "spoilt-resumed")],
    ]
    train(one, 1)
    train(two, 2)
    return folder


@pytest.mark.parametrize("name", ["spoilt", "spoilt-dp2", "spoilt-pp2", "spoilt-resumed"])
def test_bad_samples_leave_empty_slots_and_move_nothing_else(spoilt: Path, name: str) -> None:
    """What is trained on with 5 of 12 samples unusable is what is trained on with the 7 others alone."""
    for row, expected in zip(metrics(spoilt / name), metrics(spoilt / "good"), strict=True):
        for tag in (*LOSSES, "hallucination margin", "grad-norm"):
            assert math.isclose(row[tag], expected[tag], rel_tol=1e-4, abs_tol=1e-6), (tag, row, expected)


@pytest.mark.parametrize("name", ["spoilt", "spoilt-dp2", "spoilt-pp2", "spoilt-resumed"])
def test_bad_samples_are_listed_with_file_and_reason(spoilt: Path, name: str) -> None:
    lines = [json.loads(line) for line in (spoilt / name / "bad_samples.jsonl").read_text().splitlines()]
    samples = json.loads((spoilt / "data" / "pretrain.json").read_text())
    assert sorted((line["iteration"], line["sample_id"]) for line in lines) == [
        (iteration, index) for iteration in (1, 2, 3) for index in sorted(BAD.values())
    ]
    reasons = {line["sample_id"]: line for line in lines}
    for word, index in BAD.items():
        assert word in reasons[index]["reason"], reasons[index]
        assert reasons[index]["name"] == f"pretrain-{index}"
        source = "pretrain.json" if index == 7 else samples[index]["image"]
        assert reasons[index]["source"].endswith(source), reasons[index]
    assert common_state(spoilt / name)["progress"]["bad_samples"] == 15


def test_a_step_without_one_usable_sample_changes_nothing(spoilt: Path) -> None:
    rows = metrics(spoilt / "hopeless")
    assert len(rows) == 2 and all("lm loss" not in row and row["grad-norm"] == 0 for row in rows)
    assert [row["skipped-steps"] for row in rows] == [0, 0]
    assert weights(spoilt / "hopeless")["heads.temperature"].item() == pytest.approx(0.07, rel=1e-6)


# ------------------------------------------------------------------------------------------------- users' mistakes

ERROR = "hacl_megatron: error: "


def _mains(commands: Sequence[Sequence[str]]) -> list[tuple[int | None, str]]:
    """Exit code and stderr of the trainer's `main` for each command."""
    found = []
    for arguments in commands:
        written, code = io.StringIO(), None
        with contextlib.redirect_stderr(written):
            try:
                main(arguments)
            except SystemExit as leaving:
                code = leaving.code
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        found.append((code, written.getvalue()))
    return found


def damaged(saved: Path, name: str, damage: Callable[[Path], None]) -> Path:
    """A copy of `saved` with its checkpoint folder damaged."""
    copy = saved.with_name(name)
    shutil.copytree(saved, copy)
    damage(copy / "iter_0000002")
    return copy


def cut_shard(folder: Path) -> None:
    """The largest tensor file loses its second half, as on a full disk."""
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def other_sizes(folder: Path) -> None:
    config = folder / "run_config.yaml"
    text = config.read_text()
    assert text.count("hidden_size: 48") == 1
    config.write_text(
        text.replace("hidden_size: 48", "hidden_size: 60").replace("ffn_hidden_size: 88", "ffn_hidden_size: 90")
    )


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "cut-shard": (cut_shard, ("damaged",)),
    "no-shards": (lambda folder: [shard.unlink() for shard in folder.glob("*.distcp")], ("damaged",)),
    "no-metadata": (lambda folder: (folder / ".metadata").unlink(), ("damaged",)),
    "cut-metadata": (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"), ("damaged",)),
    "no-common": (lambda folder: (folder / "common.pt").unlink(), ("damaged",)),
    "cut-common": (lambda folder: (folder / "common.pt").write_bytes(b"PK"), ("damaged",)),
    "no-run-config": (lambda folder: (folder / "run_config.yaml").unlink(), ("iteration 2", "missing or incomplete")),
    "not-a-number": (
        lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_text("newest"), ("'newest'",)
    ),
    "other-sizes": (other_sizes, ("another model",)),
}  # fmt: skip


_COMMON_DAMAGES = ("no-common", "cut-common")
"""For versions of megatron-core (0.16) that keep what is no tensor in a file of its own."""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int | None, str]]]:
    """What `main` says to every mistake, all in one process, after the run whose checkpoint some of them load."""
    folder = make_inputs(tmp_path_factory.mktemp("mistakes"))
    train([command(folder, "pretrain", "tp1", "run", "--train-iters", "2")], 1)

    def load(name: str, *extra: str) -> list[str]:
        return command(folder, "pretrain", "tp1", "out", "--load", str(folder / name), *extra)

    def stage_2(name: str, *extra: str) -> list[str]:
        return command(
            folder, "finetune", "tp1", "out of stage 2", "--pretrained-checkpoint", str(folder / name), *extra
        )

    commands = {
        "other connector": load("run", "--mm-projector-type", "linear"),
        "other connector for stage 2": stage_2("run", "--mm-projector-type", "linear"),
        "other data": load("run", "--data-path", str(folder / "data" / "few.json"), "--train-iters", "4"),
        "empty folder": load("empty", "--train-iters", "1"),
    }
    (folder / "empty").mkdir()
    few = ["--data-path", str(folder / "data" / "few.json")]
    samples = json.loads((folder / "data" / "pretrain.json").read_text())[:8]
    samples[3]["image"] = "nowhere.jpg"
    (folder / "data" / "few.json").write_text(json.dumps(samples))
    commands["too many bad"] = command(folder, "pretrain", "tp1", "bad", *few, "--max-bad-fraction", "0.1")
    commands["few enough bad"] = command(
        folder, "pretrain", "tp1", "fine", *few, "--max-bad-fraction", "0.125"
    )  # just 1 of 8
    for name, (damage, _) in DAMAGES.items():
        if name in _COMMON_DAMAGES and not (folder / "run" / "iter_0000002" / "common.pt").exists():
            continue
        damaged(folder / "run", name, damage)
        commands[name] = load(name)
    commands["cut-shard for stage 2"] = stage_2("cut-shard")
    (found,) = run_distributed(_mains, 1, list(commands.values()))
    return folder, dict(zip(commands, found, strict=True))


def assert_one_line(outcome: tuple[int | None, str], *words: str) -> None:
    code, text = outcome
    lines = [line for line in text.splitlines() if line.startswith(ERROR)]
    assert code == 2 and len(lines) == 1, outcome
    assert "Traceback" not in text, text
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_in_one_line(mistakes, name: str) -> None:
    if name not in mistakes[1]:
        pytest.skip("this megatron-core keeps everything in the shards")
    assert_one_line(mistakes[1][name], str(mistakes[0] / name), *DAMAGES[name][1])


def test_a_damaged_checkpoint_is_no_start_for_stage_2(mistakes) -> None:
    assert_one_line(mistakes[1]["cut-shard for stage 2"], str(mistakes[0] / "cut-shard"), "damaged")


@pytest.mark.parametrize("name", ["other connector", "other connector for stage 2"])
def test_a_checkpoint_with_another_connector_is_refused(mistakes, name: str) -> None:
    """A linear connector is the first layer of an MLP: what is left out would go unnoticed."""
    assert_one_line(mistakes[1][name], "--mm-projector-type", "linear", "mlp2x_gelu")


def test_resuming_on_other_data_is_refused(mistakes) -> None:
    assert_one_line(mistakes[1]["other data"], "num_samples", "--data-path")


def test_loading_an_empty_folder_starts_fresh(mistakes) -> None:
    assert mistakes[1]["empty folder"][0] is None
    assert common_state(mistakes[0] / "out")["progress"]["iteration"] == 1


def test_too_many_bad_samples_stop_the_run_after_saving(mistakes) -> None:
    assert_one_line(mistakes[1]["too many bad"], "1 of 8 samples", "--max-bad-fraction 0.1", "bad_samples.jsonl")
    assert common_state(mistakes[0] / "bad")["progress"]["iteration"] == 1
    assert mistakes[1]["few enough bad"][0] is None


@pytest.fixture(scope="module")
def processes(mistakes) -> dict[str, subprocess.CompletedProcess[str]]:
    """The same for real: `python -m hacl_megatron.train`, in processes."""
    folder = mistakes[0]
    broken, keyless = folder / "broken.json", folder / "keyless.json"
    broken.write_text('[{"id": "a", "image": "b.jpg", "conversations": [}]')
    keyless.write_text('[{"id": "a", "image": "b.jpg"}]')
    commands = {
        "unknown flag": command(folder, "pretrain", "tp1", "out of a process", "--train-iter", "1"),
        "impossible layout": command(folder, "pretrain", "tp2", "out of a process"),
        "broken JSON": command(folder, "pretrain", "tp1", "out of a process", "--data-path", str(broken)),
        "missing key": command(folder, "pretrain", "tp1", "out of a process", "--data-path", str(keyless)),
        "damaged checkpoint": command(
            folder, "pretrain", "tp1", "out of a process", "--load", str(folder / "cut-shard")
        ),
    }
    cold = ("unknown flag", "damaged checkpoint")  # interpreters of their own, the second with all its imports
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "hacl_megatron.train", *commands[name]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in cold
    }  # fmt: skip
    found = {
        name: run_warm(["-m", "hacl_megatron.train", *arguments])
        for name, arguments in commands.items()
        if name not in cold
    }
    for name, process in started.items():
        output, errors = process.communicate(timeout=300)
        found[name] = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown flag", ["unknown flag --train-iter", "--train-iters"]),
        ("impossible layout", ["1 processes", "2 tensor-parallel", "--tensor-model-parallel-size"]),
        ("broken JSON", ["broken.json", "1"]),
        ("missing key", ["keyless.json", "conversations"]),
        ("damaged checkpoint", ["cut-shard", "damaged"]),
    ],
)
def test_mistakes_end_the_process_with_one_line(processes, name: str, words: list[str]) -> None:
    ended = processes[name]
    assert_one_line((ended.returncode, ended.stderr), *words)
    assert not ended.stdout or "iteration" not in ended.stdout
