"""The folders and files of a run's checkpoints.

    SAVE/iter_0000100/                         torch_dist shards, common.pt, metadata.json
    SAVE/iter_0000100/run_config.yaml          the resolved configuration; the model can be rebuilt from it alone
    SAVE/iter_0000100/hf_assets/               tokenizer and image-processor files, carried.safetensors
    SAVE/iter_0000100/files.json               sizes of all files (`integrity`)
    SAVE/frozen/0123456789abcdef/              weights that do not train, once for all iterations (`frozen`)
    SAVE/latest_checkpointed_iteration.txt     written last: a killed save never becomes the latest

A save goes to `iter_0000100.partial/` and is renamed when it is complete on every rank (`publish`).
"""

import os
import shutil
from pathlib import Path

from hacl_megatron.checkpoint.hf.carried import CARRIED_FILE, write_carried
from hacl_megatron.checkpoint.hf.import_weights import open_sources
from hacl_megatron.checkpoint.run.integrity import read_whole
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.files import LATEST_FILE
from hacl_megatron.config.checks.foreign_files import LARGEST_TOKENIZER, own_file
from hacl_megatron.config.run import RunConfig, from_yaml
from hacl_megatron.config.yaml_files.text import read_yaml_text

RUN_CONFIG_FILE = "run_config.yaml"
ASSETS_FOLDER = "hf_assets"
_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_ASSET_PATTERNS = (
    *_TOKENIZER_PATTERNS, "chat_template*", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "config.json", CARRIED_FILE,
)  # fmt: skip


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
    text = read_whole(latest, 1 << 20)[:100].decode("utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 18):  # "²" is a digit too
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


def assets_of(source: Path) -> Path:
    """Where a model's tokenizer and image-processor files are: in its checkpoint, or in the Hugging Face folder."""
    own = find_checkpoint(source)
    return source if own is None else own / ASSETS_FOLDER


def copy_assets(
    source: Path, target: Path, weights_of: ModelConfig | None = None, tokenizer: str | None = None
) -> None:
    """Copy tokenizer and image-processor files of a Hugging Face folder (or of a checkpoint's `hf_assets`).

    Args:
        weights_of: `source` is the Hugging Face folder that the run's weights came from, as a model of these sizes;
            what an export needs of them beside the model's parameters is stored too.
        tokenizer: folder of the tokenizer that the run uses, if it is not `source`'s.

    Raises:
        ValueError: one of them is a link out of its folder, no file, or too large.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file, name in asset_files(source, tokenizer):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
    if weights_of is not None:
        write_carried(open_sources(source, weights_of), target / CARRIED_FILE)


def asset_files(source: Path, tokenizer: str | None = None) -> list[tuple[Path, Path]]:
    """What `copy_assets` copies: each file, and its name in the copy. Raises as that does."""
    found = []
    for pattern in _ASSET_PATTERNS:
        folder = Path(tokenizer) if tokenizer is not None and pattern in _TOKENIZER_PATTERNS else source
        for file in sorted(folder.glob(pattern)):
            if file.is_dir() and not file.is_symlink():  # such as the folder of a tokenizer in another format
                continue
            if own_file(file, None if pattern == CARRIED_FILE else LARGEST_TOKENIZER):
                found.append((file, file.relative_to(folder)))
    return found


def locate_checkpoint(folder: str | Path) -> Path:
    """The checkpoint in `folder`: itself (`iter_*`), or the newest of a SAVE folder; ValueError when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a SAVE folder of this trainer or an iter_* folder in it")
    if (found := find_checkpoint(folder)) is None:
        raise ValueError(f"{folder} holds no checkpoint of this trainer: neither {RUN_CONFIG_FILE} nor a latest file")
    return found


def read_run_config(checkpoint: Path) -> RunConfig:
    """`run_config.yaml` of a checkpoint folder, the model's sizes included; ValueError when they are not there."""
    path = checkpoint / RUN_CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {checkpoint} is no whole checkpoint of this trainer")
    config = from_yaml(read_yaml_text(path, str(path)), str(path))
    if config.architecture is None:
        raise ValueError(f"{path} does not describe its model: the checkpoint is not one of this trainer's")
    return config


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file that is complete or absent, never half written."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
