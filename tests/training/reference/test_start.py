"""Runs of dpo and their reference: made at the start, kept, given, taken from another layout, refused."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state

from hacl_megatron.train import run
from hacl_megatron.training.reference.scores import ReferenceScores
from tests.tiny_data import swap_twins
from tests.training.runs import layout_flags, make_inputs, metrics, train

TOOLS = Path(__file__).parents[3] / "tools"
DPO = ["--preference-loss", "dpo", "--contrastive-weight", "0", "--freeze-LM", "false"]


def score(arguments: list[str], dies: bool = False) -> None:
    """tools/score_reference.py in this rank; with `dies` it ends after the first step's lines."""
    with mock.patch.object(sys, "path", [str(TOOLS), *sys.path]):
        import score_reference as tool
    from hacl_megatron.training.reference.scoring import ScoredTwins

    step, done = ScoredTwins._step, []

    def once(self, batches):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, batches)

    with mock.patch.object(sys, "argv", ["score_reference.py", *arguments]):
        args, flags = tool.parse()
    try:
        with mock.patch.object(ScoredTwins, "_step", once if dies else step):
            tool.score_reference(args.output, flags)
    except KeyboardInterrupt:
        parallel_state.destroy_model_parallel()


def stopped_while_scoring(arguments: list[str]) -> None:
    """A run whose last rank hears SIGUSR1 in the first step of its reference."""
    from hacl_megatron.training.reference.scoring import ScoredTwins

    step = ScoredTwins._step

    def heard(self, batches):
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batches)

    with mock.patch.object(ScoredTwins, "_step", heard):
        run(arguments)


def heard(arguments: list[str], said: Path) -> None:
    """A run, and what it says, in a file."""
    with said.open("w") as file, contextlib.redirect_stdout(file):
        run(arguments)


def score_with_bars(arguments: list[str], drawn: Path) -> None:
    """Score, with what each rank writes to stderr in a file of its own."""
    with Path(f"{drawn}.{torch.distributed.get_rank()}").open("w") as file, contextlib.redirect_stderr(file):
        score(arguments)


def scored_by_nan(arguments: list[str]) -> None:
    """The reference of damaged weights trained against NaN."""
    from hacl_megatron.training.reference import scoring

    likelihoods = scoring.answer_likelihoods
    with mock.patch.object(scoring, "answer_likelihoods", lambda *given: likelihoods(*given) * math.nan):
        refused(arguments, r"the model's numbers are not finite \(NaN or infinity\) for sample \d+: the weights")


def overwrites(arguments: list[str]) -> None:
    """It wrote over other scores without a word."""
    with pytest.raises(ValueError, match=r"--output .*tp2\.safetensors holds other scores: --model-max-length was 256"):
        score(arguments)
    parallel_state.destroy_model_parallel()


def refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(arguments)
    assert "\n" not in str(error.value)
    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("reference"), samples=12)
    swap_twins(folder / "data")
    records = json.loads((folder / "data" / "pretrain.json").read_text())
    (folder / "data" / "other.json").write_text(json.dumps(records[:-1]))
    lost = next(record for record in records if "image" in record and record.get("Hallucination caption"))
    lost["image"] = "nowhere.jpg"
    (folder / "data" / "lost.json").write_text(json.dumps(records))

    def command(name: str, *more: str, layout: str = "tp1", steps: int = 2) -> list[str]:
        flags = [*layout_flags(layout, samples=4)[1], *DPO, "--global-batch-size", "4", "--train-iters", str(steps)]
        return ["--config", str(folder / "pretrain.yaml"), *flags, "--save", str(folder / name), *more]

    def scored(name: str, *more: str, layout: str = "tp1") -> list[str]:
        return ["--output", str(folder / name), *command("unused", *more, layout=layout)]

    valid = ["--valid-data-path", str(folder / "data" / "pretrain.json"), "--eval-interval", "2", "--eval-iters", "2"]
    given = ["--reference-scores", str(folder / "tp2.safetensors")]
    other = ["--data-path", str(folder / "data" / "other.json")]
    asked = command("asked", layout="tp2")
    train(
        [
            partial(score_with_bars, scored("tp2.safetensors", layout="tp2-pp1-sp"), folder / "bars"),
            partial(stopped_while_scoring, asked),
            partial(shutil.copytree, folder / "asked", folder / "asked_then", dirs_exist_ok=True),
            asked,
        ],
        2,
    )
    train(
        [
            partial(heard, command("whole", *valid, steps=4), folder / "whole.txt"),
            command("cut", *valid, "--exit-interval", "2", steps=4),
            command("cut", *valid, "--load", str(folder / "cut"), steps=4),
            command("given", *given, steps=1),
            command("crops", "--preference-loss", "mdpo", steps=2),
            command("adapters", "--lora-rank", "4", "--freeze-LM", "true", steps=1),
            partial(score, scored("killed.safetensors"), dies=True),
            partial(shutil.copyfile, folder / "killed.jsonl", folder / "killed_lines.jsonl"),
            partial(score, scored("killed.safetensors")),
            command("lost", "--data-path", str(folder / "data" / "lost.json"), "--max-bad-fraction", "1", steps=3),
            partial(refused, command("r1", *given, *other), "content of --data-path was .* and is "),
            partial(refused, command("r2", *given, "--model-max-length", "200"), "max-length was 256 and is 200"),
            partial(
                refused,
                command("r3", *given, "--pretrained-checkpoint", str(folder / "whole")),
                "weights of --pretrained-checkpoint was .* and is ",
            ),
            partial(scored_by_nan, command("nan")),
            partial(overwrites, scored("tp2.safetensors", "--model-max-length", "200")),
            partial(shutil.copytree, folder / "cut", folder / "orphan"),
            partial(Path.unlink, folder / "orphan" / "reference_scores.safetensors"),
            partial(refused, command("r4", "--load", str(folder / "orphan"), steps=6), "has no reference_scores"),
        ],
        1,
    )
    return folder


def twins_scored(path: Path) -> int:
    return len(ReferenceScores.read(path).likelihoods)


def test_the_first_step_costs_log_2(folder: Path) -> None:
    """Scores of the very weights, or of the same at tensor parallel 2 with its sequence cut."""
    for name in ("whole", "given", "lost", "crops", "adapters"):
        row = metrics(folder / name)[0]
        parts = 3 if name == "crops" else 1  # of mdpo's loss, whose image's part sees the very same crop again
        assert row["preference loss"] == pytest.approx(parts * math.log(2), abs=parts * 1e-6), name
        assert row["rewards/chosen"] == pytest.approx(0, abs=2e-6), name
        assert row["logps/chosen"] < -10, name
    assert metrics(folder / "whole")[-1]["rewards/margins"] > 0.05
    assert metrics(folder / "crops")[-1]["preference loss"] != pytest.approx(3 * math.log(2), abs=1e-3)
    assert metrics(folder / "whole")[-1]["rewards/accuracies"] > 0.5


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    """It scored again by the trained weights, or began without a reference."""
    for one, other in zip(metrics(folder / "whole"), metrics(folder / "cut"), strict=True):
        for tag in ("lm loss", "preference loss", "rewards/margins", "grad-norm"):
            assert other[tag] == one[tag], tag
    assert metrics(folder / "cut")[-1]["preference loss validation"] < math.log(2)


def test_another_layout_gives_the_same_scores(folder: Path) -> None:
    found, kept = (
        ReferenceScores.read(path)
        for path in (folder / "tp2.safetensors", folder / "whole" / "reference_scores.safetensors")
    )
    assert found.difference(kept.identity) is None and found.sample_ids.tolist() == kept.sample_ids.tolist()
    assert abs(found.likelihoods - kept.likelihoods).max() < 1e-4
    assert twins_scored(folder / "given" / "reference_scores.safetensors") == len(found.likelihoods)


def test_a_killed_scoring_goes_on_where_it_stopped(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "killed_lines.jsonl").read_text().splitlines()]
    whole = ReferenceScores.read(folder / "killed.safetensors")
    assert 0 < len(lines) < len(whole.sample_ids)
    assert all(whole(line["sample"]).tolist() == line["likelihoods"] for line in lines)
    assert not (folder / "killed.jsonl").exists() and not list(folder.glob("*.settings.json"))
    assert len(whole.likelihoods) == twins_scored(folder / "tp2.safetensors")


def test_a_run_that_is_asked_to_stop_while_its_reference_scores_goes_on_behind_that(folder: Path) -> None:
    """It heard nothing before its first step: a job whose scores took longer than Slurm's notice was killed."""
    status = json.loads((folder / "asked_then" / "run_status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "received SIGUSR1")
    kept = (folder / "asked_then" / "reference_scores.jsonl").read_text().splitlines()
    whole = ReferenceScores.read(folder / "asked" / "reference_scores.safetensors")
    assert 0 < len(kept) < len(whole.sample_ids)
    assert not (folder / "asked" / "reference_scores.jsonl").exists()
    assert json.loads((folder / "asked" / "run_status.json").read_text())["state"] == "finished"
    assert len(metrics(folder / "asked")) == 2


def test_a_sample_that_could_not_be_scored_is_counted_where_its_twins_are_left_out(folder: Path) -> None:
    """Its image is missing then and now: it is a bad sample of the run, and no twin without a reference trains."""
    kept = twins_scored(folder / "lost" / "reference_scores.safetensors")
    assert kept < twins_scored(folder / "tp2.safetensors")
    assert sum(row["bad-samples"] for row in metrics(folder / "lost")[-1:]) == 1


def test_a_reference_without_dpo_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=re.escape("--reference-scores is given with --preference-loss phrase")):
        run(["--preference-loss", "phrase", "--reference-scores", "x", "--train-iters", "1"])
    with pytest.raises(ValueError, match="--preference-label-smoothing is given with --preference-loss phrase"):
        run(["--preference-loss", "phrase", "--preference-label-smoothing", "0.1", "--train-iters", "1"])


def test_no_rank_draws_a_bar_where_there_is_no_terminal(folder: Path) -> None:
    """All but the first would, each its own, where ranks share a log."""
    for rank in (0, 1):
        assert "reference" not in (folder / f"bars.{rank}").read_text(), rank


def test_what_was_scored_is_said_once_for_each_data(folder: Path) -> None:
    """Catches the validation's scores that are told as the training's."""
    lines = [line for line in (folder / "whole.txt").read_text().splitlines() if "reference: " in line]
    assert len(lines) == 2, lines
    twins = twins_scored(folder / "whole" / "reference_scores.safetensors")
    assert lines[0].startswith(f"reference: {twins} twins of ") and " samples scored by the weights that" in lines[0]
    assert " samples of the validation data scored by the weights that" in lines[1]
