"""Mistakes that people make, each answered in one line that says what to do: the list, and the answers.

Tried by hand first; where the answer was bad, the program was mended. What is allowed and seldom meant gets a note.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hacl_megatron.config.checks.files import LATEST_FILE
from hacl_megatron.config.run import RunConfig
from hacl_megatron.platform.folder_lock import FolderLock
from hacl_megatron.train import main, run
from hacl_megatron.training.reporting.doubts import doubts
from tests.config.test_round_trip import MODEL
from tests.distributed import run_distributed
from tests.tool_runs import run_tool
from tests.training.runs import make_inputs


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """Flags behind a stage's own, in which `IN` is the folder of inputs, and what must be in the one line."""

    stage: str
    flags: str
    says: str


TRAINING = {
    # Wrong folders and files.
    "a name of the hub": Mistake(
        stage="pretrain",
        flags="--pretrained-checkpoint liuhaotian/llava-v1.5-7b",
        says="hf download liuhaotian/llava-v1.5-7b --local-dir DIR, and give DIR",
    ),
    "a misspelt model": Mistake(
        stage="pretrain", flags="--pretrained-checkpoint IN/lava", says="no such folder; did you mean IN/llava?"
    ),
    "a folder that is no model": Mistake(
        stage="pretrain",
        flags="--pretrained-checkpoint IN/data",
        says="IN/data/config.json: no such file; expected a Hugging Face model folder",
    ),
    "a misspelt file of data": Mistake(
        stage="pretrain", flags="--data-path IN/data/pretrian.json", says="did you mean IN/data/pretrain.json"
    ),
    "no JSON": Mistake(stage="pretrain", flags="--data-path IN/pretrain.yaml", says="not JSON (starts with"),
    "the image folder one level too high": Mistake(
        stage="finetune",
        flags="--image-folder IN/data",
        says="it is in IN/data/images: give --image-folder IN/data/images",
    ),
    "the image folder one level too low": Mistake(
        stage="finetune",
        flags="--data-path IN/below.json --contrastive-data-path IN/below.json --image-folder IN/data/images/part_0",
        says="it is in IN/data/images: give --image-folder IN/data/images",
    ),
    "names with a prefix": Mistake(
        stage="finetune",
        flags="--data-path IN/prefixed.json",
        says="it is there as part_0/0000.jpg: take coco/train2017/ out of the data's names",
    ),
    "--load of a model": Mistake(
        stage="pretrain", flags="--load IN/llava", says="holds no run to go on with; give it to --pretrained-checkpoint"
    ),
    "--save into a model": Mistake(
        stage="pretrain",
        flags="--save IN/llava",
        says="is a Hugging Face model, among whose files no run is saved; give",
    ),
    "two runs in one folder": Mistake(
        stage="pretrain", flags="--save IN/held", says="--save IN/held is in use by process"
    ),
    "no permission": Mistake(
        stage="pretrain", flags="--save /proc/runs", says="--save /proc/runs cannot be written to"
    ),
    # Sizes and processes.
    "tensor parallelism that does not divide": Mistake(
        stage="pretrain",
        flags="--tensor-model-parallel-size 4 --dry-run --world-size 4",
        says="cannot be shared by 4 tensor-parallel ranks; choose a --tensor-model-parallel-size that divides 6",
    ),
    "too few processes": Mistake(
        stage="pretrain", flags="--tensor-model-parallel-size 2", says="start a multiple of 2, or change --tensor-model"
    ),
    "a batch that does not divide": Mistake(
        stage="pretrain", flags="--global-batch-size 9", says="expected a multiple of 8, or --micro-batch-size 3"
    ),
    "no room for text": Mistake(
        stage="finetune", flags="--model-max-length 16", says="the 36 tokens of an image; give more than 36"
    ),
    "no GPU, or a driver too old for it": Mistake(
        stage="pretrain", flags="--device cuda", says="use --device cpu, or check the driver (nvidia-smi)"
    ),
    # Flags.
    "the template of another model": Mistake(
        stage="finetune", flags="--version llama_3", says="give the --version that the language model was trained with"
    ),
    "transformers' flag": Mistake(
        stage="pretrain", flags="--learning_rate 1e-3", says="unknown flag --learning_rate; did you mean --lr?"
    ),
    "DeepSpeed's flag": Mistake(
        stage="pretrain", flags="--deepspeed zero3.json", says="did you mean --use-distributed-optimizer"
    ),
    "a number that is none": Mistake(stage="pretrain", flags="--lr 1e-3,", says="invalid float value: '1e-3,'"),
}
TOOLS = {
    "a run in place of its export": (
        "evaluate --hf IN/run --task pope --questions IN/questions.json --images IN/data/images --output IN/r.json",
        "it holds a run of this trainer; tools/convert_megatron_to_hf.py --load IN/run exports it",
    ),
    "questions in place of answers": (
        "evaluate --task pope --questions IN/questions.json --answers IN/questions.json --output IN/r.json",
        "holds POPE's questions, which have a label and no answer; give --answers the file of answers",
    ),
    "converting the wrong way": (
        "convert_megatron_to_hf --load IN/llava --hf-path IN/out",
        "IN/llava holds no checkpoint of this trainer",
    ),
    "a name of the hub to convert": (
        "convert_hf_to_megatron --hf-path lmsys/vicuna-7b-v1.5 --save IN/out",
        "hf download lmsys/vicuna-7b-v1.5 --local-dir DIR, and give DIR",
    ),
    "an export over other files": (
        "convert_hf_to_megatron --hf-path IN/llava --save IN/data",
        "IN/data exists already; choose another folder",
    ),
    "no space": ("convert_hf_to_megatron --hf-path IN/llava --save IN/out", "0.0 GB free, but 0.0 GB are needed"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("mistakes"), samples=12, layers=1, vision_layers=2)
    records = json.loads((folder / "data" / "finetune.json").read_text())
    with_images = [record for record in records if "image" in record]
    for name, change in (("prefixed", lambda image: f"coco/train2017/{image}"), ("below", lambda image: image)):
        changed = [{**record, "image": change(record["image"])} for record in with_images]
        chosen = [r for r in changed if name == "prefixed" or r["image"].startswith("part_0/")]
        (folder / f"{name}.json").write_text(json.dumps(chosen))
    (folder / "questions.json").write_text('{"question_id": 1, "image": "1.jpg", "text": "Is it?", "label": "yes"}\n')
    (folder / "run").mkdir()
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "held").mkdir()
    return folder


def words_of(flags: str, inputs: Path) -> list[str]:
    return flags.replace("IN/", f"{inputs}/").split()


@pytest.fixture(scope="module")
def answers(inputs: Path) -> dict[str, str]:
    """What the trainer said to each of `TRAINING`."""
    lock = FolderLock(inputs / "held", what="the other run")
    lock.take()
    try:
        commands = [
            ["--config", str(inputs / f"{mistake.stage}.yaml"), "--micro-batch-size", "8", "--train-iters", "1",
             "--max-bad-fraction", "0.01", *words_of(mistake.flags, inputs)]
            for mistake in TRAINING.values()
        ]  # fmt: skip
        return dict(zip(TRAINING, run_distributed(said_to, 1, commands)[0], strict=True))
    finally:
        lock.release()


def said_to(commands: list[list[str]]) -> list[str]:
    from megatron.core import parallel_state

    def answer(command: list[str]) -> str:
        try:
            run(command)
        except ValueError as error:
            return str(error)
        except SystemExit:
            return captured(lambda: run(command))
        finally:
            parallel_state.destroy_model_parallel()
        return "it ran"

    return [answer(command) for command in commands]


def captured(call: Callable[[], None]) -> str:
    """The one line on standard error of a program that leaves."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        call()
    return printed.getvalue().rstrip("\n")


@pytest.mark.parametrize("mistake", TRAINING)
def test_a_training_that_cannot_be_meant_is_refused_with_advice(
    mistake: str, answers: dict[str, str], inputs: Path
) -> None:
    """Catches a run that goes on with it, a page of traceback, and a line that leaves one alone with the mistake."""
    line = answers[mistake]
    assert TRAINING[mistake].says.replace("IN/", f"{inputs}/") in line and "\n" not in line, line


@pytest.mark.parametrize("mistake", TOOLS)
def test_a_tool_used_wrongly_says_how_it_is_used(
    mistake: str, inputs: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the same of the tools, and a score of something that is none."""
    if mistake == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    command, says = TOOLS[mistake]
    name, *words = words_of(command, inputs)
    assert run_tool(name, *words) == 2
    err = capfd.readouterr().err.strip()
    assert says.replace("IN/", f"{inputs}/") in err and err.count("\n") == 0, err
    assert not (inputs / "out").exists() and not (inputs / "r.json").exists()


def configured(width: int = 4096, **flags: object) -> RunConfig:
    """A run of a model as wide as real ones, with these flags."""
    config = RunConfig(architecture=replace(MODEL, language=replace(MODEL.language, hidden_size=width)))
    for name, value in flags.items():
        setattr(next(group for group in vars(config).values() if hasattr(group, name)), name, value)
    return config


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"version": "plain", "lr": 2e-5}, "add --freeze-LM if this is one"),  # forgotten in stage 1
        ({"version": "plain", "freeze_LM": True, "lr": 1e-3}, None),  # stage 1
        ({"version": "plain", "freeze_LM": True, "lr": 2e-5}, "--lr 2e-05 is for the connector alone here"),
        ({"version": "plain", "freeze_LM": True, "lr": 2e-5, "connector_lr": 1e-3}, None),
        ({"version": "v1", "lr": 2e-5}, None),  # stage 2
        ({"version": "v1", "lr": 1e-3}, "--lr 0.001 is for the whole language model here"),
        ({"version": "v1", "lr": 1e-3, "width": 128}, None),  # of a tiny model it is usual
        ({"version": "v1", "lr": 2e-4, "lora_rank": 128}, None),
    ],
)
def test_flags_of_the_other_stage_get_a_note(flags: dict[str, object], says: str | None) -> None:
    """Catches stages that are swapped without a word, and a note on what is usual."""
    lines = doubts(configured(**flags))
    assert len(lines) == (says is not None), lines
    assert says is None or says in lines[0], lines


def test_a_start_that_a_finished_run_refuses_leaves_its_status(inputs: Path, tmp_path: Path, capfd) -> None:
    """Catches "failed" over "finished": whoever watches the run would wait for it to go on."""
    (tmp_path / LATEST_FILE).write_text("3")
    (tmp_path / "run_status.json").write_text('{"status": "finished"}')
    with pytest.raises(SystemExit):
        main(["--config", str(inputs / "pretrain.yaml"), "--save", str(tmp_path)])
    assert "holds a run already, which a new one would overwrite; add --load" in capfd.readouterr().err
    assert json.loads((tmp_path / "run_status.json").read_text()) == {"status": "finished"}
