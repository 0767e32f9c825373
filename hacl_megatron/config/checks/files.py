"""Checks of the files and folders that a run reads and writes, on the machine that looks."""

import importlib.util
import os
import re
from pathlib import Path

from hacl_megatron.config.checks.require import dashed, require
from hacl_megatron.config.connectors import connector_file
from hacl_megatron.config.files.objects import expect_bucket, expect_object
from hacl_megatron.config.files.urls import check_url, data_object, is_url, refuse_url
from hacl_megatron.config.flags import MANIFEST_FILE
from hacl_megatron.config.names import did_you_mean
from hacl_megatron.config.run import RunConfig

LATEST_FILE = "latest_checkpointed_iteration.txt"
"""Says that a folder holds a checkpoint of this trainer, as in Megatron-LM."""


class HoldsAnotherRun(ValueError):
    """--save is another run's, whose files are to stay as they are, its status too."""


_MODEL_PATHS = ("pretrained_checkpoint", "pretrain_mm_mlp_adapter", "vision_tower", "tokenizer")

# os.path says False where pathlib raises, for instance below a folder that may not be searched.


def check_places(config: RunConfig) -> None:
    """ValueError for a URL that holds a secret or is of no store that is read, and for one where a path has to be.

    Before anything is shown or written, for a URL stands wherever the configuration does.
    """
    data, checkpoint = config.data, config.checkpoint
    for name in ("data_path", "contrastive_data_path", "valid_data_path", "image_folder"):
        places = getattr(data, name)
        for place in [places] if isinstance(places, str) else places:
            if is_url(place):
                check_url(dashed(name), place)
    for name, place in (("save", checkpoint.save), ("load", checkpoint.load)):
        refuse_url(f"--{name}", place, "checkpoints stay on file systems: give a folder")
    others = {name: getattr(config.model, name) for name in _MODEL_PATHS}
    others |= {"tensorboard_dir": config.logging.tensorboard_dir, "data_cache_dir": data.data_cache_dir}
    others["reference_scores"] = config.preference.reference_scores
    for name, place in others.items():
        refuse_url(dashed(name), place, "only data is read from stores: give a path")


def check_inputs(config: RunConfig) -> None:
    """ValueError unless data, weights and tokenizer are there."""
    model, data = config.model, config.data
    require(bool(data.data_path), "--data-path is empty", "give one or more LLaVA JSON files")
    for name in ("data_path", "contrastive_data_path", "valid_data_path"):
        for path in getattr(data, name):
            if is_url(path):
                expect_object(dashed(name), data_object(path))
                continue
            require(
                os.path.isfile(path) or os.path.isfile(os.path.join(path, MANIFEST_FILE)),
                f"{dashed(name)} {path}: no such file, or a folder without {MANIFEST_FILE}",
                _instead(path, "expected a LLaVA JSON file or a folder of tools/prepare_data.py"),
            )
    require(
        len(data.data_weights) in (0, len(data.data_path)),
        f"--data-weights has {len(data.data_weights)} numbers for {len(data.data_path)} of --data-path",
        "give one for each",
    )
    if is_url(data.image_folder):
        expect_bucket("--image-folder", data.image_folder)
    require(
        is_url(data.image_folder) or os.path.isdir(data.image_folder),
        f"--image-folder {data.image_folder}: no such folder",
        _instead(data.image_folder, "expected the folder that image names are relative to"),
    )
    if _resumes(config):  # model, weights and tokenizer come out of --load
        return
    require(
        model.pretrained_checkpoint is not None or config.architecture is not None,
        "there is nothing to build the model from: no --pretrained-checkpoint, no `model:` section in the --config "
        "file, no checkpoint in --load",
        "give one of them",
    )
    require(
        model.tokenizer is not None or model.pretrained_checkpoint is not None,
        "there is no tokenizer: neither --tokenizer nor --pretrained-checkpoint is given",
        "give --tokenizer",
    )
    for name in ("pretrained_checkpoint", "vision_tower", "tokenizer"):
        path = getattr(model, name)
        require(
            path is None or os.path.isdir(path),
            f"{dashed(name)} {path}: no such folder",
            _instead(path or "", "expected a local folder"),
        )
    adapter = model.pretrain_mm_mlp_adapter
    require(
        adapter is None or connector_file(Path(adapter)).is_file(),
        f"--pretrain-mm-mlp-adapter {adapter}: no such file, or no folder with one",
        "expected LLaVA's mm_projector.bin",
    )


def how_to_fetch(path: str) -> str | None:
    """What to do where a path that is not there looks like `owner/name` of the Hugging Face hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) or os.path.isdir(os.path.dirname(path)):
        return None
    return f"if it is a name of the Hugging Face hub: hf download {path} --local-dir DIR, and give DIR"


def _instead(path: str, expected: str) -> str:
    """What to do about a path that is not there: its nearest neighbour's name, or how to fetch what a hub has."""
    if advice := how_to_fetch(path):
        return f"{expected}; {advice}"
    folder, name = os.path.split(path.rstrip("/"))
    try:
        beside = os.listdir(folder or ".")[:10_000]
    except OSError:
        return expected
    if os.path.exists(path):
        return expected
    return did_you_mean(name, beside, expected, prefix=f"{folder}/" if folder else "")


def _is_hf_model(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def _resumes(config: RunConfig) -> bool:
    """Whether --load names a SAVE folder with a checkpoint in it, or one of its iter_* folders."""
    load = config.checkpoint.load
    return load is not None and any(os.path.isfile(os.path.join(load, f)) for f in (LATEST_FILE, "run_config.yaml"))


def check_outputs(config: RunConfig) -> None:
    """ValueError unless what the run leaves behind can be written, and overwrites nothing."""
    checkpoint, training, logging = config.checkpoint, config.training, config.logging
    for name, wanted in (
        ("save_interval", checkpoint.save_interval > 0),
        ("save_retain", checkpoint.save_retain is not None),
        ("exit_interval", training.exit_interval is not None),
        ("exit_duration_in_mins", training.exit_duration_in_mins is not None),
    ):
        require(
            not wanted or bool(checkpoint.save), f"{dashed(name)} is given without a folder to save to", "add --save"
        )
    require(
        checkpoint.save_keep_interval is None or checkpoint.save_retain is not None,
        f"--save-keep-interval {checkpoint.save_keep_interval} is given, but without --save-retain nothing is deleted",
        "add --save-retain, or leave it out",
    )
    holds_a_run = checkpoint.save is not None and (Path(checkpoint.save) / LATEST_FILE).is_file()
    if holds_a_run and not _resumes(config):
        raise HoldsAnotherRun(
            f"--save {checkpoint.save} holds a run already, which a new one would overwrite; add --load "
            f"{checkpoint.save} to go on with it, or give another --save"
        )
    require(
        checkpoint.save is None or not _is_hf_model(checkpoint.save),
        f"--save {checkpoint.save} is a Hugging Face model, among whose files no run is saved",
        "give a folder of its own",
    )
    require(
        checkpoint.load is None or _resumes(config) or not _is_hf_model(checkpoint.load),
        f"--load {checkpoint.load} is a Hugging Face model, which holds no run to go on with",
        "give it to --pretrained-checkpoint, and to --load the --save folder of a run",
    )
    for name, path in (("save", checkpoint.save), ("tensorboard_dir", logging.tensorboard_dir)):
        if path is not None:
            check_writable(name, path)
    require(
        checkpoint.load is None or os.path.isdir(checkpoint.load) or not os.path.exists(checkpoint.load),
        f"--load {checkpoint.load}: is no folder",
        "expected the --save folder of an earlier run, which need not exist yet",
    )
    require(
        logging.wandb_project is None or importlib.util.find_spec("wandb") is not None,
        "--wandb-project is given, but the package wandb is not installed",
        "pip install wandb, or leave the flag out",
    )


def check_writable(name: str, path: str) -> None:
    """ValueError unless the folder, or the nearest one above it that exists, is a folder that can be written to."""
    existing = Path(path).absolute()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    require(
        path != "" and os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK),
        f"{dashed(name)} {path!r}: {existing} is {'not writable' if os.path.isdir(existing) else 'no folder'}",
        "expected a folder that can be written to or created",
    )
