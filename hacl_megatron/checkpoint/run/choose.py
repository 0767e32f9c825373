"""Which checkpoint of a folder a run loads: the newest if it is whole, else what is wrong and what is whole instead."""

from pathlib import Path

import torch.distributed as dist

from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, find_checkpoint, iteration_folder
from hacl_megatron.checkpoint.run.integrity import damage, is_finite, record_checksums
from hacl_megatron.checkpoint.run.retain import last_finite, saved_iterations


def choose_checkpoint(folder: Path, *, fallback: bool, flag: str = "--load") -> tuple[Path | None, str | None]:
    """The checkpoint to load from a SAVE folder or an `iter_*` folder, None if there is none yet; and a note on it.

    Args:
        fallback: take the newest whole one where the newest is damaged.
        flag: that `folder` was given with.

    Raises:
        ValueError: the newest is damaged, and `fallback` is off or there is no whole one.
    """
    newest = None
    try:
        newest = find_checkpoint(folder)
        wrong = damage(newest) if newest is not None else None
    except ValueError as error:  # what says which is the newest is damaged itself
        wrong = str(error)
    if wrong is None:
        return newest, None if newest is None else _note(newest)
    if newest is not None:
        wrong = f"checkpoint {newest} is damaged: {wrong}"
    save = folder.parent if (folder / RUN_CONFIG_FILE).is_file() else folder
    whole = _newest_whole(save, before=newest)
    if whole is None:
        raise ValueError(f"{wrong}; no older checkpoint in {save} is whole")
    if fallback:
        return whole, f"{wrong}; going back to {whole}"
    automatic = ", or add --load-fallback to go back to it" if flag == "--load" else ""
    raise ValueError(f"{wrong}; give {flag} {whole}, which is whole{automatic}")


def agree_on_checkpoint(folder: Path, *, fallback: bool, flag: str = "--load") -> tuple[Path | None, str | None]:
    """`choose_checkpoint` by rank 0 for all ranks: one look at the files, and one decision."""
    chosen: list[tuple[Path | None, str | None, str | None]] = [(None, None, None)]
    if dist.get_rank() == 0:
        try:
            chosen = [(*choose_checkpoint(folder, fallback=fallback, flag=flag), None)]
        except ValueError as error:
            chosen = [(None, None, str(error))]
    dist.broadcast_object_list(chosen, src=0)
    path, note, error = chosen[0]
    if error is not None:
        raise ValueError(error)
    return path, note


def _note(checkpoint: Path) -> str | None:
    if not is_finite(checkpoint):
        number = checkpoint.name.removeprefix("iter_")
        last = last_finite(checkpoint.parent, up_to=int(number)) if number.isdecimal() else None
        instead = "" if last is None else f"; the last finite one is {iteration_folder(checkpoint.parent, last)}"
        return f"checkpoint {checkpoint} holds values that are not finite (NaN or infinity){instead}"
    if record_checksums(checkpoint) is None:
        return f"{checkpoint} has no checksums (a version before them wrote it): damage to its values cannot be seen"
    return None


def _newest_whole(save: Path, before: Path | None) -> Path | None:
    folders = [iteration_folder(save, iteration) for iteration in saved_iterations(save)]
    for folder in reversed(folders):
        older = before is None or folder.name < before.name
        there = all((folder / name).is_file() for name in (RUN_CONFIG_FILE, ".metadata", "metadata.json"))
        if older and there and damage(folder) is None:
            return folder
    return None
