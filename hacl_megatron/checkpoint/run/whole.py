"""A checkpoint that needs nothing beside its folder: the frozen files it refers to are copied into it."""

import shutil
from pathlib import Path

from hacl_megatron.checkpoint.hf.fresh_folder import fresh_folder
from hacl_megatron.checkpoint.run.choose import choose_checkpoint
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE
from hacl_megatron.checkpoint.run.integrity import FILES_FILE, read_files, record_checksums, write_files
from hacl_megatron.checkpoint.run.publish import WHOLE_INDEX, inside_name


def make_whole(load: Path, out: Path) -> Path:
    """Copy the checkpoint that `load` names (an `iter_*` folder, or a SAVE folder's newest) to `out`, with all of it.

    Returns `out`, which is given wherever an `iter_*` folder is.

    Raises:
        ValueError: there is no checkpoint, a file of it is missing or cut, `out` exists, or the disk has no room.
    """
    checkpoint, _ = choose_checkpoint(load, fallback=False)
    if checkpoint is None:
        raise ValueError(f"{load} holds no checkpoint of this trainer: neither {RUN_CONFIG_FILE} nor a latest file")
    listed = (checkpoint / FILES_FILE).is_file()
    sizes = read_files(checkpoint)["files"] if listed else {}
    records = record_checksums(checkpoint)
    outside = {name: size for name, size in sizes.items() if name.startswith("../")}
    inside = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != FILES_FILE]
    total = sum(path.stat().st_size for path in inside) + sum(outside.values())

    def taken(_: Path) -> str:
        return "exists"

    with fresh_folder(out, total, force=False, why_not=taken) as partial:
        for path in inside:
            target = partial / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for name in outside:
            shutil.copyfile(checkpoint / name, partial / inside_name(name))
        if outside:
            (partial / WHOLE_INDEX).replace(partial / ".metadata")
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        if records is not None:  # of what was written, not of the copy: one that went wrong is found
            records = {inside_name(file): sums for file, sums in records.items()}
        write_files(partial, [name for name in names if name != RUN_CONFIG_FILE], records)
    return out
