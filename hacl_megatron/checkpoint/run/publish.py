"""Makes a checkpoint of the files that all ranks have written. Rank 0 alone calls this; `save` is who calls.

    begin    what killed saves left is deleted; iter_0000100.partial/ is made, and the ranks write into it
    publish  index, run_config.yaml, tokenizer, files.json ─ renamed to iter_0000100/
             ─ latest_checkpointed_iteration.txt names it: now it is the latest

A process that is killed before the rename leaves a `.partial` folder, which nothing loads; one that is killed behind it
leaves a whole checkpoint more, and the latest file names the one before.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, RUN_CONFIG_FILE, iteration_folder, write_atomically
from hacl_megatron.checkpoint.run.integrity import FROZEN_FOLDER, sync_folder, write_files
from hacl_megatron.checkpoint.run.part_files import StoredPart, checksums_of, write_format, write_index
from hacl_megatron.config.checks.files import LATEST_FILE

WHOLE_INDEX = ".metadata.whole"
"""The index that a checkpoint has once its frozen files lie in its own folder (`whole`)."""


def partial_folder(save: Path, iteration: int) -> Path:
    """Where an iteration is until it is whole."""
    final = iteration_folder(save, iteration)
    return final.with_name(final.name + ".partial")


def begin(save: Path, iteration: int) -> None:
    """Make the partial folder, after deleting what killed saves have left behind."""
    clean(save)
    partial_folder(save, iteration).mkdir(parents=True)


def clean(save: Path) -> None:
    """Delete partial folders, of frozen files too. For the holder of the folder's lock: so all are of killed saves."""
    for replaced in save.glob("iter_*.replaced.partial"):  # a kill between two renames of `publish`
        final = replaced.with_name(replaced.name.removesuffix(".replaced.partial"))
        if not final.exists():
            replaced.rename(final)
    for left_behind in (*save.glob("iter_*.partial"), *(save / FROZEN_FOLDER).glob("*.partial")):
        shutil.rmtree(left_behind, ignore_errors=True)


def publish(
    save: Path,
    iteration: int,
    stored: list[StoredPart],
    *,
    common: bytes,
    run_config: str,
    write_assets: Callable[[Path], None],
    not_finite: str | None = None,
) -> None:
    """Make the partial folder the latest checkpoint.

    Args:
        stored: of all ranks, frozen ones included.
        common: see `write_format`.
        run_config, write_assets: see `CheckpointSaver.save`.
        not_finite: key of a tensor with NaN or infinity in it, which marks the checkpoint.
    """
    partial, final = partial_folder(save, iteration), iteration_folder(save, iteration)
    outside = sorted({part.file for part in stored if part.file.startswith("../")})
    if outside:
        write_index(partial, [replace(part, file=inside_name(part.file)) for part in stored], WHOLE_INDEX)
    write_index(partial, stored)
    write_format(partial, common)
    write_atomically(partial / RUN_CONFIG_FILE, run_config)
    write_assets(partial / ASSETS_FOLDER)
    inside = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    inside.remove(RUN_CONFIG_FILE)  # a text that people edit
    write_files(
        partial, [*inside, *outside], checksums_of(stored), **({"not_finite": not_finite} if not_finite else {})
    )
    # Saved again, an iteration's old folder steps aside: deleting it takes long, and "latest" may name it.
    replaced = final.with_name(final.name + ".replaced.partial")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(save)
    write_atomically(save / LATEST_FILE, f"{iteration}\n")
    shutil.rmtree(replaced, ignore_errors=True)


def inside_name(file: str) -> str:
    """Name that a frozen file gets in the folder of a checkpoint that is made whole."""
    return "-".join(file.split("/")[1:]) if file.startswith("../") else file
