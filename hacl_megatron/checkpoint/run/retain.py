"""Which checkpoints of a run are kept, and how the others go."""

import re
import shutil
from pathlib import Path

from hacl_megatron.checkpoint.run.integrity import is_finite

_ITERATION = re.compile(r"iter_(\d{7,})")


def saved_iterations(save: Path) -> list[int]:
    """Iterations with a folder of their own in `save`, oldest first. What is being written has another name."""
    found = [_ITERATION.fullmatch(path.name) for path in save.iterdir() if path.is_dir()] if save.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def superfluous(iterations: list[int], *, latest: int, newest: int, every: int | None) -> list[int]:
    """Those to delete: all but the `newest` ones up to `latest`, every multiple of `every`, and whatever is beyond.

    Iterations beyond `latest` are of a past that this run, resumed from an older one, has not reached again.
    """
    past = sorted(iteration for iteration in iterations if iteration <= latest)
    return [i for i in past[:-newest] if i != latest and not (every and i % every == 0)]


def prune(save: Path, *, latest: int, newest: int, every: int | None) -> list[int]:
    """Delete the superfluous checkpoints of `save`; returns their iterations.

    The last one whose values are finite stays, however many were saved since: a run that diverged goes back to it.
    Each gets the name of an unfinished save first, so that a kill on the way leaves nothing that looks whole.
    """
    saved = saved_iterations(save)
    gone = superfluous(saved, latest=latest, newest=newest, every=every)
    if gone and (last := last_finite(save, up_to=latest)) in gone:
        gone.remove(last)
    for iteration in gone:
        folder = save / f"iter_{iteration:07d}"
        leaving = folder.with_name(folder.name + ".deleted.partial")
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
    return gone


def last_finite(save: Path, up_to: int) -> int | None:
    """The newest iteration in `save`, up to one, whose values are finite; None if there is none."""
    before = (iteration for iteration in reversed(saved_iterations(save)) if iteration <= up_to)
    return next((iteration for iteration in before if is_finite(save / f"iter_{iteration:07d}")), None)
