"""A result folder that is whole or absent: written beside its place and renamed at the end."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        ValueError: `out` is taken, or the disk has no room; or, from an OSError while writing, the disk is full.
    """
    out = out.absolute()
    check_target(out, force=force, why_not=why_not)
    out.parent.mkdir(parents=True, exist_ok=True)
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
