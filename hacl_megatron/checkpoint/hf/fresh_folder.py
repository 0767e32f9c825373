"""A result folder that is whole or absent: written beside its place, by one process at a time, renamed at the end."""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hacl_megatron.config.console import notify
from hacl_megatron.platform.folder_lock import held

ROOM = 1.02
"""Share of the tensors' bytes that must be free: headers, indices and the tokenizer come on top."""


def check_target(out: Path, *, force: bool, why_not: Callable[[Path], str | None]) -> None:
    """ValueError if `out` is taken: it is never replaced without `force`, and with it only if `why_not` says None."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not force:
            raise ValueError(f"{out} exists already; choose another folder, or replace it with --force")
        if reason := why_not(out):
            raise ValueError(f"{out} {reason}; it is not replaced, choose another folder")


@contextmanager
def fresh_folder(out: Path, num_bytes: int, *, force: bool, why_not: Callable[[Path], str | None]) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end; whatever goes wrong before leaves nothing behind.

    Args:
        num_bytes: of all tensors that will be written.
        why_not: why the folder that is there may not be replaced even with `force`, or None.

    Raises:
        ValueError: `out` is taken, another process is writing it, or the disk has no room; or, from an OSError while
            writing, the disk is full.
    """
    out = out.absolute()
    check_target(out, force=force, why_not=why_not)
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out.parent, what=str(out), name=f".{out.name}", say=notify):
        _clean(out)
        with _written_beside(out, num_bytes, force=force, why_not=why_not) as partial:
            yield partial


def _clean(out: Path) -> None:
    """Remove what killed processes have left beside `out`; for the holder of its lock, so that none of them lives."""
    for old in out.parent.glob(f"{glob.escape(out.name)}.replaced-*"):  # a kill between two renames
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for left_behind in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        shutil.rmtree(left_behind, ignore_errors=True)


@contextmanager
def _written_beside(out: Path, num_bytes: int, *, force: bool, why_not: Callable[[Path], str | None]) -> Iterator[Path]:
    check_target(out, force=force, why_not=why_not)  # whoever held the lock before may have written it
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes * ROOM:
        raise ValueError(f"{out.parent}: {free / 1e9:.1f} GB free, but {num_bytes * ROOM / 1e9:.1f} GB are needed")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
