"""Which checkpoints of a run are kept, and how the others go."""

import re
import shutil
from pathlib import Path

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

    Each gets the name of an unfinished save first, so that a kill on the way leaves nothing that looks whole.
    """
    gone = superfluous(saved_iterations(save), latest=latest, newest=newest, every=every)
    for iteration in gone:
        folder = save / f"iter_{iteration:07d}"
        leaving = folder.with_name(folder.name + ".deleted.partial")
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
    return gone
