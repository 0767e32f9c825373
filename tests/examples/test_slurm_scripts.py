"""What the Slurm scripts submit and hand to the trainer, without Slurm: `tests/slurm` runs them under a real one.

A program called sbatch writes down how it was called, and a launch.sh in a copy of the scripts prints its arguments.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.run import RunConfig, parse_run_config
from tests.examples.command_lines import ROOT

_SBATCH = """#!{python}
import json, os, sys
with open({log!r}, "a+") as log:
    log.seek(0)
    number = 7 + len(log.readlines())
    print(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in ("RUN", "PREFERENCE")}}]), file=log)
print(f"{{number}};cluster")
"""
_ALWAYS = ["--parsable", "--export=ALL", "--kill-on-invalid-dep=yes"]
_SITE = {name: value for name, value in os.environ.items() if name not in ("RUN", "OUTPUT", "PREFERENCE")}


def chain(folder: Path, *arguments: str, **env: str) -> tuple[subprocess.CompletedProcess, list]:
    """chain.sh, and what it submits: [arguments of sbatch but those that every call has, variables] of each job."""
    program, log = folder / "sbatch", folder / "log"
    program.write_text(_SBATCH.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "examples/slurm/chain.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**_SITE, **env, "PATH": path}, capture_output=True, text=True)
    jobs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert all(words[:3] == _ALWAYS for words, _ in jobs)
    return done, [[words[3:], variables] for words, variables in jobs]


def script(name: str) -> str:
    return f"examples/slurm/{name}.sbatch"


def test_chain_without_a_preference_is_both_stages_and_the_export(tmp_path: Path) -> None:
    """Catches a job of a likelihood objective that nobody asked for, and options that do not reach the trainings."""
    done, jobs = chain(tmp_path, "13b", "--nodes", "2", "--", "--train-iters", "3")
    assert done.returncode == 0 and done.stdout == "7 8 9\n", done.stderr
    variables = {"RUN": "llava-1.5-13b", "PREFERENCE": None}
    assert jobs == [
        [["--nodes", "2", script("pretrain_13b"), "--train-iters", "3"], variables],
        [["--dependency=afterok:7", "--nodes", "2", script("finetune_13b"), "--train-iters", "3"], variables],
        [["--dependency=afterok:8", script("convert")], variables],
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/slurm/*.s*h*")), ids=lambda path: path.name)
def test_srun_is_told_the_jobs_cores(path: Path) -> None:
    """Since Slurm 22.05 it takes them from no job: catches programs that are left with one core of 32."""
    text = path.read_text().replace("\\\n", "")
    calls = [line for line in text.splitlines() if re.match(r"(setsid )?srun ", line)]
    assert all('--cpus-per-task="$' in line for line in calls), calls
    assert calls or path.name not in ("launch.sh", "prepare.sbatch", "convert.sbatch", "evaluate.sbatch")


@pytest.mark.parametrize("given", [["--preference", "phrase", "--nodes=2"], ["--nodes=2", "--preference=phrase"]])
def test_chain_with_a_preference_trains_behind_stage_2_and_exports_that(tmp_path: Path, given: list[str]) -> None:
    """Catches an export of stage 2 in the place of what came after it, a job that does not wait for stage 2, and
    --preference handed on to sbatch."""
    done, jobs = chain(tmp_path, "7b", *given, "--", "--lr", "1e-6", RUN="mine")
    assert done.returncode == 0 and done.stdout == "7 8 9 10\n", done.stderr
    assert [words for words, _ in jobs[2:]] == [
        ["--dependency=afterok:8", "--nodes=2", script("preference_7b"), "--lr", "1e-6"],
        ["--dependency=afterok:9", script("convert")],
    ]
    assert [variables["RUN"] for _, variables in jobs] == ["mine", "mine", "mine", "mine-phrase"]
    assert jobs[2][1]["PREFERENCE"] == "phrase"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: chain.sh"),
        (["70b"], "usage: chain.sh"),
        (["7b", "--preference"], "--preference: expected phrase, dpo or mdpo"),
        (["7b", "--preference", "pretrain"], "--preference 'pretrain': expected phrase, dpo or mdpo"),
        (["7b", "--preference="], "--preference '': expected phrase, dpo or mdpo"),
        (["7b", "--preference", "--", "--lr", "1"], "--preference '--': expected phrase, dpo or mdpo"),
        (["13b", "--preference", "dpo"], "--preference dpo: not with 13b; expected 7b"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_in_a_line_before_anything_is_submitted(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    """Catches a first stage that trains for hours before the mistake in the last one is found."""
    done, jobs = chain(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
    assert not jobs and not done.stdout


def launched(folder: Path, name: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """A script of `examples`, which Slurm would run, in a copy whose launch.sh prints its arguments by line.

    `name`: with its folder where that is not `slurm`.
    """
    path = Path(script(name) if "/" not in name else f"examples/{name}.sbatch")
    for made in ("examples/slurm", path.parent):
        (folder / made).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, folder / path)
    (folder / "examples/slurm/launch.sh").write_text("printf '%s\\n' \"$@\"\n")
    command = ["bash", str(folder / path), *flags]
    env = {**_SITE, "SLURM_SUBMIT_DIR": str(folder), **env}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def config_of(done: subprocess.CompletedProcess, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The trainer's own reading of what it was started with."""
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(ROOT)
    config = parse_run_config(done.stdout.splitlines())
    check_flags(config, 8, files=False)
    return config


@pytest.mark.parametrize("loss", ["phrase", "dpo", "mdpo"])
def test_the_preference_job_goes_on_from_stage_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """Catches another recipe than was asked for, another start than stage 2's output, and a SAVE that is not what
    chain.sh exports; flags behind the script win."""
    done = launched(tmp_path, "preference_7b", "--lr", "1e-6", PREFERENCE=loss, RUN="mine", OUTPUT="out")
    config = config_of(done, monkeypatch)
    assert config.preference.preference_loss == loss and config.lora.lora_rank == (64 if loss == "mdpo" else 128)
    assert config.preference.generation_weight == (1 if loss == "phrase" else 0)
    assert config.model.pretrained_checkpoint == "out/mine" and config.optimizer.lr == 1e-6
    assert config.checkpoint.save == config.checkpoint.load == f"out/mine-{loss}"


def test_the_preference_job_trains_what_it_is_named_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a configuration of one's own that has no loss, or another, and trains that into this one's folder."""
    stage_2 = "examples/llava_1_5/finetune_7b.yaml"
    done = launched(tmp_path, "preference_7b", PREFERENCE="dpo", PREFERENCE_CONFIG=stage_2)
    config = config_of(done, monkeypatch)
    assert config.preference.preference_loss == "dpo" and config.checkpoint.save == "output/llava-1.5-7b-dpo"


@pytest.mark.parametrize("env", [{}, {"PREFERENCE": "pretrain"}])
def test_the_preference_job_needs_a_loss(tmp_path: Path, env: dict[str, str]) -> None:
    """Catches a job that falls back on a loss of its own choice, or takes another stage's file for a recipe."""
    done = launched(tmp_path, "preference_7b", **env)
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr
        == f"PREFERENCE is '{env.get('PREFERENCE', '')}'; expected phrase, dpo or mdpo: set it in front of sbatch\n"
    )


@pytest.mark.parametrize(("model", "run"), [("qwen2_5_7b", "llava-qwen2.5-7b"), ("llama3_1_8b", "llava-llama-3.1-8b")])
def test_the_stages_of_a_backbone_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, run: str
) -> None:
    """Catches a second stage that starts from another folder than the first one saves to, or is another model's; and
    folders of the scripts that are not those of the files."""
    first = config_of(launched(tmp_path, "backbones/pretrain", MODEL=model), monkeypatch)
    second = config_of(launched(tmp_path, "backbones/finetune", "--lr", "1e-6", MODEL=model), monkeypatch)
    assert first.model.freeze_LM and not second.model.freeze_LM and second.optimizer.lr == 1e-6
    assert first.architecture == second.architecture
    assert first.checkpoint.save == second.model.pretrained_checkpoint == f"output/{run}-pretrain"
    assert second.checkpoint.save == second.checkpoint.load == f"output/{run}"
    for name, found in ((f"pretrain_{model}", first), (model, second)):
        alone = parse_run_config(["--config", f"examples/backbones/{name}.yaml"])
        assert (alone.checkpoint, alone.model) == (found.checkpoint, found.model)


def test_a_backbone_needs_its_name(tmp_path: Path) -> None:
    """Catches a job that trains a model of its own choice."""
    done = launched(tmp_path, "backbones/pretrain", MODEL="qwen3")
    line = "MODEL is 'qwen3'; expected qwen2_5_7b or llama3_1_8b: set it in front of sbatch"
    assert done.returncode == 2 and not done.stdout and done.stderr == f"{line}\n"


def test_the_evaluation_waits_for_the_training_and_follows_its_folder(tmp_path: Path) -> None:
    """Catches a job that ends before its training has begun, follows another folder, or loses flags on the way."""
    for name in ("evaluate.sbatch", "run_in.sh", "launch.sh"):
        (tmp_path / "examples/slurm").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "examples/slurm" / name, tmp_path / "examples/slurm")
    for name, body in (("srun", "printf '%s\\n' \"$@\""), ("sleep", "mkdir -p out/mine; touch out/mine/metrics.jsonl")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {**_SITE, "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path, "RUN": "mine", "OUTPUT": "out", "RUN_IN": ""}
    command = ["bash", "examples/slurm/evaluate.sbatch", "--tasks", "pope", "--keep-best", "pope f1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/mine/metrics.jsonl").exists()
    words = done.stdout.splitlines()
    assert words[:2] == ["--ntasks=1", "--cpus-per-task=1"]
    assert words[2:6] == ["python", "tools/evaluate.py", "--watch", "out/mine"]
    assert words[-4:] == ["--tasks", "pope", "--keep-best", "pope f1"]


def prepared(folder: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """prepare.sbatch, whose tool writes into `folder`; srun, where there is none, runs what it is given."""
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (folder / "srun").chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**_SITE, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": path, "RUN_IN": "", "DATA": str(folder / "out"), **env}
    command = ["bash", str(ROOT / "examples/slurm/prepare.sbatch"), *flags]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def test_an_array_prepares_and_a_job_behind_it_joins(tmp_path: Path) -> None:
    """Catches tasks that divide by another number than the array's, as when some are submitted again alone."""
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a cat"}]
    lines = [json.dumps({"id": number, "image": "a.jpg", "conversations": turns}) + "\n" for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    flags = ["--num-shards", "2", "--input", str(tmp_path / "a.jsonl")]
    for index in "10":
        done = prepared(tmp_path, *flags, SLURM_ARRAY_TASK_ID=index, SLURM_ARRAY_TASK_COUNT="1")
        assert done.returncode == 0 and "left to do: --merge, when all 2 shares are done" in done.stdout, done.stderr
    done = prepared(tmp_path, *flags, "--merge")
    assert done.returncode == 0 and "samples: 50" in done.stdout, done.stderr
    assert not (tmp_path / "out/.partial").exists()


def test_an_array_without_a_number_of_shares_is_refused(tmp_path: Path) -> None:
    """Catches an array of which each task prepares everything, into one folder."""
    done = prepared(tmp_path, "--input", "a.jsonl", SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 2 and done.stderr == "an array needs --num-shards, the number of its tasks\n"
