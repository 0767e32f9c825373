"""Saves and loads runs through megatron-core's distributed checkpointing, so that any layout can read any other's.

    SAVE/iter_0000100/                         torch_dist shards, common.pt, metadata.json
    SAVE/iter_0000100/run_config.yaml          the resolved configuration; the model can be rebuilt from it alone
    SAVE/iter_0000100/hf_assets/               tokenizer and image-processor files, carried.safetensors
    SAVE/iter_0000100/files.json               sizes of all files (`integrity`)
    SAVE/frozen/0123456789abcdef/              weights that do not train, once for all iterations (`frozen`)
    SAVE/latest_checkpointed_iteration.txt     written last: a killed save never becomes the latest

A save goes to `iter_0000100.partial/` and is renamed when it is complete on every rank (`saver`).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.carried import CARRIED_FILE, write_carried
from hacl_megatron.checkpoint.hf_import import open_sources
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.file_checks import LATEST_FILE

RUN_CONFIG_FILE = "run_config.yaml"
ASSETS_FOLDER = "hf_assets"
_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_ASSET_PATTERNS = (
    *_TOKENIZER_PATTERNS, "chat_template*",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "config.json", CARRIED_FILE,
)  # fmt: skip


def state_metadata() -> dict[str, Any]:
    """How megatron-core lays out a state dict: optimiser state in a form that every TP, PP and DP size can read.

    A fresh dictionary each time, for megatron-core writes its process groups into it.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def iteration_folder(save: Path, iteration: int) -> Path:
    """Where `save` keeps `iteration`."""
    return save / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int | None:
    """Iteration of the newest complete checkpoint in `folder`, None if there is none yet.

    Raises:
        ValueError: the file that names it is damaged, or names a checkpoint that is not there.
    """
    latest = folder / LATEST_FILE
    if not latest.exists():
        return None
    text = latest.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ValueError(f"{latest} holds {text[:40]!r}, expected an iteration number: write one of the iter_* folders")
    if not (iteration_folder(folder, int(text)) / RUN_CONFIG_FILE).is_file():
        raise ValueError(
            f"{latest} names iteration {text}, but {iteration_folder(folder, int(text))} is missing or incomplete: "
            "write the number of a complete iter_* folder into it"
        )
    return int(text)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint folder in a SAVE folder, or `folder` itself if it is one (`iter_*`); None if neither."""
    if (folder / RUN_CONFIG_FILE).is_file():
        return folder
    iteration = latest_iteration(folder)
    return None if iteration is None else iteration_folder(folder, iteration)


def copy_assets(
    source: Path, target: Path, weights_of: ModelConfig | None = None, tokenizer: str | None = None
) -> None:
    """Copy tokenizer and image-processor files of a Hugging Face folder (or of a checkpoint's `hf_assets`).

    Args:
        weights_of: `source` is the Hugging Face folder that the run's weights came from, as a model of these sizes;
            what an export needs of them beside the model's parameters is stored too.
        tokenizer: folder of the tokenizer that the run uses, if it is not `source`'s.
    """
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _ASSET_PATTERNS:
        for file in source.glob(pattern):
            if file.is_file() and not (tokenizer is not None and pattern in _TOKENIZER_PATTERNS):
                shutil.copyfile(file, target / file.name)
    if tokenizer is not None:
        for pattern in _TOKENIZER_PATTERNS:
            for file in Path(tokenizer).glob(pattern):
                shutil.copyfile(file, target / file.name)
    if weights_of is not None:
        write_carried(open_sources(source, weights_of), target / CARRIED_FILE)


def save_checkpoint(
    state: Callable[[], dict[str, Any]],
    save: Path,
    iteration: int,
    *,
    run_config: str,
    write_assets: Callable[[Path], None],
) -> Path:
    """Write one checkpoint, whole, here and now; every rank calls it with its own part. Returns the finished folder.

    Args: see `saver.CheckpointSaver.save`.

    Raises:
        OSError: it could not be written.
    """
    from hacl_megatron.checkpoint.saver import CheckpointSaver

    saver = CheckpointSaver(save, asynchronous=False)
    saver.save(iteration, state, run_config=run_config, write_assets=write_assets)
    error = saver.wait()
    saver.close()
    if error is not None:
        raise OSError(f"checkpoint {iteration_folder(save, iteration)} could not be written: {error}")
    return iteration_folder(save, iteration)


def load_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what the sharded state dict `state` asks for from one checkpoint folder; every rank calls it.

    Raises:
        ValueError: a file of the checkpoint is missing, cut or of other sizes; names the checkpoint.
    """
    from megatron.core import dist_checkpointing

    with _damage_reported(folder):
        _require_whole_metadata(folder)
        return dist_checkpointing.load(state, str(folder))


def load_common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder holds beside tensors; ValueError names a damaged checkpoint."""
    from megatron.core import dist_checkpointing

    with _damage_reported(folder):
        _require_whole_metadata(folder)
        return dist_checkpointing.load_common_state_dict(str(folder))


def _require_whole_metadata(folder: Path) -> None:
    # Before torch looks: it would print the traceback of what it cannot read, and go on without.
    with (folder / ".metadata").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 1))
        if file.read(1) != b".":  # how every pickle ends
            raise EOFError(".metadata is cut short")


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Errors of the loading libraries, which are of any type for files that are not what they were, as ValueError."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, only a BaseException

    try:
        yield
    except (Exception, CheckpointException) as error:
        found: BaseException = error
        if isinstance(error, CheckpointException):  # of all ranks; one tells enough
            found = next((failure for failure, _ in error.failures.values()), error)
        lines = str(found).strip().splitlines()
        reason = f"{type(found).__name__}: {lines[0][:300]}" if lines else type(found).__name__
        raise ValueError(
            f"checkpoint {folder} cannot be loaded ({reason}): it is damaged or belongs to another model; load another "
            "iter_* folder"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file that is complete or absent, never half written."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
