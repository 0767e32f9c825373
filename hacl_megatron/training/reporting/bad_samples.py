"""`SAVE/bad_samples.jsonl`: every sample that could not be used, with its file and the reason."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from hacl_megatron.batch import BadSample

BAD_SAMPLES_FILE = "bad_samples.jsonl"
_SAID = 3
"""So many of a step are named in the terminal too."""


def report_bad_samples(bad: list[BadSample], iteration: int, save: str | None, say: Callable[[str], None]) -> None:
    """Write the bad samples of all ranks' parts of a step; every rank calls it with its own.

    Args:
        save: folder of the run, or None.
        say: shows a line to the user; called on rank 0.
    """
    everywhere: list[list[BadSample] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, bad)
    if dist.get_rank() != 0:
        return
    samples = [sample for part in everywhere for sample in part or []]
    for sample in samples[:_SAID]:
        say(f"bad sample {sample.name}: {sample.source}: {sample.reason}")
    if save is None:
        return
    target = Path(save) / BAD_SAMPLES_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"iteration": iteration, **asdict(sample)}) + "\n")
    except OSError as error:  # a full disk is no reason to end a run
        say(f"{len(samples)} bad samples are not in {target}: {error}")
