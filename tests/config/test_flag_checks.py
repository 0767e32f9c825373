"""`check_flags`: every check has a run that fails it and a near neighbour that passes."""

import copy
import dataclasses
import math
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import get_args

import pytest

from hacl_megatron.config.checks.files import LATEST_FILE, check_inputs, check_writable
from hacl_megatron.config.checks.flags import LIMITS, check_flags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.parser import GROUPS, HINTS
from hacl_megatron.config.run import RunConfig, to_yaml, with_architecture
from tests.config.test_round_trip import MODEL

GROUP_OF = {field.name: name for name, group in GROUPS.items() for field in dataclasses.fields(group)}


@pytest.fixture
def base(tmp_path: Path) -> RunConfig:
    """A run with nothing wrong, beside files for others to point at."""
    for name in ("train.json", "valid.json", "mm_projector.bin"):
        (tmp_path / name).write_text("[]")
    for name in ("images", "llava", "empty", "resumable", "prepared"):
        (tmp_path / name).mkdir()
    (tmp_path / "prepared" / "manifest.arrow").write_text("")
    (tmp_path / "resumable" / LATEST_FILE).write_text("10")
    return changed(
        RunConfig(),
        data_path=[str(tmp_path / "train.json")],
        image_folder=str(tmp_path / "images"),
        pretrained_checkpoint=str(tmp_path / "llava"),
        train_iters=10,
    )


def changed(config: RunConfig, **flags) -> RunConfig:
    config = copy.deepcopy(config)
    for name, value in flags.items():
        group = getattr(config, GROUP_OF[name])
        assert hasattr(group, name)
        setattr(group, name, value)
    return config


def refused(config: RunConfig, world_size: int = 1) -> str:
    with pytest.raises(ValueError) as error:
        check_flags(config, world_size)
    message = str(error.value)
    assert "\n" not in message and ("; " in message)  # found; what to do
    return message


# -------------------------------------------------------------------------------------------------------------- numbers


def test_every_number_has_limits():
    numbers = {name for name, hint in HINTS.items() if {int, float} & {hint, *get_args(hint)}}
    assert set(LIMITS) == numbers - {"mm_vision_select_layer"}  # counts from either end; the architecture bounds it


@pytest.mark.parametrize("name", LIMITS)
def test_numbers_outside_their_limits(base, name):
    low, high = LIMITS[name]
    flag = f"--{name.replace('_', '-')}"
    outside = [low - 1, math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
    for value in outside:
        assert flag in refused(changed(base, **{name: value}))
    if NoneType in get_args(HINTS[name]) and name != "train_iters":
        check_flags(changed(base, **{name: None}), 1)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("initial_temperature", 0.0009, 0.001), ("initial_temperature", 0.51, 0.5), ("lr_warmup_fraction", 1.0, 0.99),
        ("max_bad_fraction", -0.1, 0.0), ("adam_beta1", 1.0, 0.99), ("adam_eps", 0.0, 1e-12),
        ("micro_batch_size", 0, 1), ("clip_grad", -1.0, 0.0), ("contrastive_weight", -0.5, 0.0),
        ("lr", math.inf, 1e3), ("seed", -1, 0),
        ("eval_iters", 0, 1), ("model_max_length", 0, 1), ("log_interval", 0, 1),
    ],
)  # fmt: skip
def test_numbers_on_their_limits(base, name, wrong, right):
    """The table itself, from the meaning of each flag."""
    assert f"--{name.replace('_', '-')} is {wrong}, expected" in refused(changed(base, **{name: wrong}))
    check_flags(changed(base, **{name: right}), 1)


def test_expected_values_are_written_out(base):
    assert "expected 0.001 <= value <= 0.5" in refused(changed(base, initial_temperature=0.6))
    assert "expected 0 <= value < 1" in refused(changed(base, adam_beta2=1.0))
    assert "expected at least 1" in refused(changed(base, num_workers=0))
    assert "expected more than 0" in refused(changed(base, num_train_epochs=0.0, train_iters=None))


# --------------------------------------------------------------------------------------------------------------- layout


def test_layout(base):
    config = changed(
        base, tensor_model_parallel_size=2, pipeline_model_parallel_size=3, micro_batch_size=4, global_batch_size=48,
        contrastive_negatives="micro-batch",
    )  # fmt: skip
    assert check_flags(config, 24) == Layout(
        world_size=24, tp=2, pp=3, dp=4, micro_batch_size=4, global_batch_size=48, num_micro_batches=3
    )


def test_global_batch_defaults_to_one_micro_batch_a_replica(base):
    layout = check_flags(changed(base, micro_batch_size=5), 3)
    assert (layout.global_batch_size, layout.num_micro_batches) == (15, 1)


@pytest.mark.parametrize(
    ("world_size", "fits"), [(6, True), (12, True), (0, False), (3, False), (4, False), (8, False)]
)
def test_world_size(base, world_size, fits):
    config = changed(base, tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    if fits:
        assert check_flags(config, world_size).dp == world_size // 6
    else:
        assert f"{world_size} processes" in refused(config, world_size) and "multiple of 6" in refused(
            config, world_size
        )


@pytest.mark.parametrize(("batch", "fits"), [(8, True), (16, True), (4, False), (12, False), (9, False)])
def test_global_batch_size(base, batch, fits):
    config = changed(base, micro_batch_size=4, global_batch_size=batch, contrastive_negatives="micro-batch")
    if fits:
        assert check_flags(config, 2).num_micro_batches == batch // 8
    else:
        said = refused(config, 2)
        assert "expected a multiple of 8" in said
        workable = {4: 2, 12: 3}.get(batch)
        assert said.endswith(f"or --micro-batch-size {workable}" if workable else "multiple of 8")
        if workable:
            check_flags(changed(config, micro_batch_size=workable), 2)


def test_bf16_switches_the_distributed_optimizer_on(base, capsys):
    config = changed(base, bf16=True, overlap_grad_reduce=True, overlap_param_gather=True)
    check_flags(config, 1)
    assert config.parallel.use_distributed_optimizer is True
    assert "--use-distributed-optimizer is switched on" in capsys.readouterr().out
    fp32 = changed(base)
    check_flags(fp32, 1)
    assert fp32.parallel.use_distributed_optimizer is False


def test_sequence_parallel_alone_is_switched_off(base, capsys, monkeypatch):
    config = changed(base, sequence_parallel=True)
    check_flags(config, 1)
    assert config.parallel.sequence_parallel is False
    assert "--sequence-parallel is switched off" in capsys.readouterr().out
    check_flags(config, 1)  # said once
    assert capsys.readouterr().out == ""

    monkeypatch.setenv("RANK", "1")
    config = changed(base, sequence_parallel=True)
    check_flags(config, 2)
    assert config.parallel.sequence_parallel is False and capsys.readouterr().out == ""

    config = changed(base, sequence_parallel=True, tensor_model_parallel_size=2)
    check_flags(config, 2)
    assert config.parallel.sequence_parallel is True


def test_nothing_else_is_changed(base):
    before = to_yaml(base)
    check_flags(base, 1)
    assert to_yaml(base) == before


# --------------------------------------------------------------------------------------------------- pairs of settings

COMBINATIONS = {
    "overlap without distributed optimiser": (
        {"overlap_param_gather": True, "overlap_grad_reduce": True}, "add --use-distributed-optimizer",
        {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": True},
    ),
    "overlap without overlapped reduction": (
        {"overlap_param_gather": True, "use_distributed_optimizer": True}, "add --overlap-grad-reduce",
        {"use_distributed_optimizer": True},
    ),
    "two lengths": (
        {"num_train_epochs": 1.0}, "both --train-iters and --num-train-epochs",
        {"num_train_epochs": 1.0, "train_iters": None},
    ),
    "no length": ({"train_iters": None}, "neither --train-iters nor --num-train-epochs", {"train_iters": 1}),
    "first layers without stages": (
        {"decoder_first_pipeline_num_layers": 1}, "--pipeline-model-parallel-size is 1", {},
    ),
    "last layers without stages": (
        {"decoder_last_pipeline_num_layers": 1}, "--decoder-last-pipeline-num-layers is given", {},
    ),
    "budget of rows and micro-batch pool": (
        {"micro_batch_tokens": 4096, "contrastive_negatives": "micro-batch"}, "--micro-batch-tokens is given",
        {"micro_batch_tokens": 4096, "contrastive_negatives": "queue"},
    ),
    "balance and micro-batch pool": (
        {"balance_micro_batches": True, "contrastive_negatives": "micro-batch"}, "which pairs are negatives",
        {"balance_micro_batches": False, "contrastive_negatives": "micro-batch"},
    ),
    "two sizes of a micro-batch": (
        {"micro_batch_tokens": 4096, "micro_batch_size": 2}, "both --micro-batch-size 2 and --micro-batch-tokens",
        {"micro_batch_tokens": 4096},
    ),
    "no place in the queue": ({"queue_size": 0}, "--queue-size is 0", {"queue_size": 1}),
    "rate below its floor": ({"min_lr": 2e-3}, "--min-lr 0.002 is above --lr 0.001", {"min_lr": 1e-3}),
    "connector's rate below the floor": (
        {"min_lr": 1e-4, "connector_lr": 1e-5}, "above --connector-lr", {"min_lr": 1e-5, "connector_lr": 1e-5},
    ),
    "heads' rate below the floor": ({"min_lr": 1e-4, "heads_lr": 0.0}, "above --heads-lr", {"heads_lr": 0.0}),
    "nothing to clip apart": (
        {"clip_heads_apart": True, "clip_grad": 0.0}, "--clip-heads-apart is given", {"clip_heads_apart": True},
    ),
    "nothing trains": ({"lr": 0.0}, "nothing would train", {"lr": 0.0, "connector_lr": 1e-4}),
    "the heads alone, unused": (
        {"lr": 0.0, "heads_lr": 1e-4, "contrastive_weight": 0.0}, "nothing would train", {"lr": 0.0, "heads_lr": 1e-4},
    ),
    "no loss with a weight": (
        {"generation_weight": 0.0, "contrastive_weight": 0.0, "preference_weight": 2.0}, "nothing would train",
        {"generation_weight": 0.0, "contrastive_weight": 0.0, "preference_loss": "phrase"},
    ),
    "a frozen model's rate alone": (
        {"lr": 1e-3, "connector_lr": 0.0, "heads_lr": 0.0, "freeze_LM": True}, "nothing would train",
        {"lr": 1e-3, "connector_lr": 0.0, "heads_lr": 0.0, "freeze_LM": True, "freeze_ViT": False},
    ),
    "a frozen tower's rate": (
        {"vision_lr": 2e-6}, "the vision tower is frozen", {"vision_lr": 2e-6, "freeze_ViT": False},
    ),
    "the tower's rate below the floor": (
        {"min_lr": 1e-4, "vision_lr": 2e-6, "freeze_ViT": False}, "above --vision-lr", {"min_lr": 1e-4},
    ),
    "a trained tower's rate of 0": (
        {"lr": 1e-3, "connector_lr": 0.0, "heads_lr": 0.0, "vision_lr": 0.0, "freeze_LM": True, "freeze_ViT": False},
        "nothing would train",
        {"lr": 0.0, "connector_lr": 0.0, "heads_lr": 0.0, "vision_lr": 1e-3, "freeze_LM": True, "freeze_ViT": False},
    ),
    "projector": ({"mm_projector_type": "mlp2x"}, "'mlp2x'", {"mm_projector_type": "mlp3x_gelu"}),
    "validation without data": ({"eval_interval": 5}, "give --valid-data-path", {"eval_interval": 0}),
    "a trace without an end": (
        {"profile_step_start": 2, "save": "{}/new"}, "add --profile-step-end",
        {"profile_step_start": 2, "profile_step_end": 4, "save": "{}/new"},
    ),
    "a trace without a start": (
        {"profile_step_end": 2, "save": "{}/new"}, "--profile-step-end is given alone; add --profile-step-start", {},
    ),
    "a trace of nothing": (
        {"profile_step_start": 3, "profile_step_end": 3, "save": "{}/new"}, "3 is not before --profile-step-end 3",
        {"profile_step_start": 3, "profile_step_end": 4, "save": "{}/new"},
    ),
    "a trace behind the end": (
        {"profile_step_start": 11, "profile_step_end": 12, "save": "{}/new"}, "behind the last of 10 iterations",
        {"profile_step_start": 10, "profile_step_end": 12, "tensorboard_dir": "{}/new"},
    ),
    "a trace nowhere": (
        {"profile_step_start": 2, "profile_step_end": 4}, "add --save or --tensorboard-dir", {"profile_ranks": [7]},
    ),
    "a trace of a rank that is not there": (
        {"profile_step_start": 2, "profile_step_end": 4, "save": "{}/new", "profile_ranks": [0, 1]},
        "--profile-ranks 1: there are 1 processes; expected ranks below 1",
        {"profile_step_start": 2, "profile_step_end": 4, "save": "{}/new", "profile_ranks": [0]},
    ),
    "saving nowhere": (
        {"save_interval": 5}, "--save-interval is given without", {"save_interval": 5, "save": "{}/new"},
    ),
    "stopping without a save": (
        {"exit_interval": 5}, "--exit-interval is given without", {"exit_interval": 5, "save": "{}/new"},
    ),
    "running out of time without a save": (
        {"exit_duration_in_mins": 5.0}, "add --save", {"exit_duration_in_mins": 5.0, "save": "{}/new/deep"},
    ),
    "no data": ({"data_path": []}, "--data-path is empty", {"data_path": ["{}/train.json"]}),
    "missing data": (
        {"data_path": ["{}/train.json", "{}/gone.json"]}, "gone.json: no such file",
        {"data_path": ["{}/train.json", "{}/valid.json"]},
    ),
    "a folder as data": ({"data_path": ["{}/images"]}, "no such file", {}),
    "weights for other files": (
        {"data_weights": [1.0, 2.0]}, "2 numbers for 1 of --data-path",
        {"data_weights": [1.0, 0.5], "data_path": ["{}/train.json", "{}/prepared"]},
    ),
    "a weight of nothing": ({"data_weights": [0.0]}, "--data-weights is 0.0", {"data_weights": [0.01]}),
    "missing contrastive data": (
        {"contrastive_data_path": ["{}/gone.json"]}, "--contrastive-data-path",
        {"contrastive_data_path": ["{}/valid.json"]},
    ),
    "missing validation data": (
        {"valid_data_path": ["{}/gone.json"]}, "--valid-data-path",
        {"valid_data_path": ["{}/valid.json"], "eval_interval": 5},
    ),
    "missing images": ({"image_folder": "{}/gone"}, "--image-folder", {"image_folder": "{}/empty"}),
    "no model": (
        {"pretrained_checkpoint": None}, "nothing to build the model from",
        {"pretrained_checkpoint": None, "load": "{}/resumable"},
    ),
    "missing model": (
        {"pretrained_checkpoint": "liuhaotian/llava-v1.5-7b"}, "no such folder",
        {"pretrained_checkpoint": "liuhaotian/llava-v1.5-7b", "load": "{}/resumable"},
    ),
    "no hallucinated captions to weigh": (
        {"hallucination_weight": 4.0, "hallucination_negatives": "none"}, "--hallucination-negatives none; there is",
        {"hallucination_weight": 4.0, "hallucination_negatives": "own"},
    ),
    "no contrast to weigh them in": (
        {"hallucination_weight": 4.0, "contrastive_weight": 0.0}, "--contrastive-weight 0; there is",
        {"hallucination_weight": 1.0, "contrastive_weight": 0.0},
    ),
    "missing tokenizer": ({"tokenizer": "{}/gone"}, "--tokenizer", {"tokenizer": "{}/llava"}),
    "missing adapter": (
        {"pretrain_mm_mlp_adapter": "{}/gone.bin"}, "--pretrain-mm-mlp-adapter",
        {"pretrain_mm_mlp_adapter": "{}/mm_projector.bin"},
    ),
    "loading a file": ({"load": "{}/train.json"}, "--load", {"load": "{}/not-there-yet"}),
    "an empty folder is no resume": (
        {"pretrained_checkpoint": None, "load": "{}/empty"}, "no checkpoint in --load", {"load": "{}/empty"},
    ),
    "saving over a file": ({"save": "{}/train.json"}, "no folder", {"save": "{}/empty"}),
    "saving below a file": ({"save": "{}/train.json/run"}, "train.json is no folder", {"save": "{}/empty/run"}),
    "saving to nothing": ({"save": ""}, "--save ''", {"save": None}),
    "events over a file": ({"tensorboard_dir": "{}/train.json"}, "--tensorboard-dir", {"tensorboard_dir": "{}/tb"}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations(base, tmp_path, name):
    wrong, expected, right = COMBINATIONS[name]

    def located(flags: dict) -> dict:
        def locate(value):
            if isinstance(value, list):
                return [locate(item) for item in value]
            return value.format(tmp_path) if isinstance(value, str) else value

        return {flag: locate(value) for flag, value in flags.items()}

    assert expected in refused(changed(base, **located(wrong)))
    check_flags(changed(base, **located(right)), 1)
    assert not (tmp_path / "new").exists()  # a check creates nothing


def test_both_contrastive_contexts_have_a_meaning_in_both_templates(base):
    """`plain` has BOS before the image, v1 the system prompt too: `prompt` differs from `image` in either."""
    for version in ("plain", "v1"):
        check_flags(changed(base, version=version, contrastive_image_context="prompt"), 1)


def test_random_weights_need_sizes_and_a_tokenizer(base, tmp_path):
    without = changed(base, pretrained_checkpoint=None)
    assert "nothing to build the model from" in refused(without)
    sized = with_architecture(without, MODEL)
    assert "there is no tokenizer" in refused(sized)
    check_flags(changed(sized, tokenizer=str(tmp_path / "llava")), 1)


def test_folders_that_must_not_be_written_or_searched(base):
    """Root may write anywhere: there, a child process gives its rights up first."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can be searched by its owner alone
        for name, mode in (("open", 0o777), ("read-only", 0o555), ("closed", 0o000)):
            os.mkdir(f"{folder}/{name}")
            os.chmod(f"{folder}/{name}", mode)
        os.chmod(folder, 0o755)

        def check() -> None:
            for name in ("read-only", "closed", "closed/run"):
                with pytest.raises(ValueError, match="not writable"):
                    check_writable("save", f"{folder}/{name}")
            check_writable("save", f"{folder}/open/run")
            closed = changed(base, image_folder=f"{folder}/closed/images", data_path=[f"{folder}/closed/a.json"])
            with pytest.raises(ValueError, match="no such file"):
                check_inputs(closed)

        if os.geteuid() != 0:
            check()
            return
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                check()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wandb_must_be_installed(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what a failed import leaves behind
    assert "pip install wandb" in refused(changed(base, wandb_project="hacl"))


def test_layout_is_immutable(base):
    with pytest.raises(dataclasses.FrozenInstanceError):
        check_flags(base, 1).tp = 2
    assert replace(check_flags(base, 1), tp=2).tp == 2


def test_a_new_run_does_not_overwrite_an_old_one(base, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("100")
    assert "holds a run already" in refused(changed(base, save=str(save)), 1)
    check_flags(changed(base, save=str(save), load=str(save)), 1)
