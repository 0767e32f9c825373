"""`SAVE/bad_samples.jsonl`: every sample that could not be used or trained nothing, with its file and the reason."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from hacl_megatron.batch import BadSample

BAD_SAMPLES_FILE = "bad_samples.jsonl"
UNTRAINED = "trains nothing"
"""`class` of the lines of samples that were used and had no target token and no pair."""
UNCOMPARED = "has a twin that is not compared"
"""`class` of the lines of twins that give a likelihood objective nothing; the rest of their samples is used."""
_SAID = 3
"""So many of a step are named in the terminal too; of samples that train nothing, so many of a kind and a run."""


def report_bad_samples(bad: list[BadSample], iteration: int, save: str | None, say: Callable[[str], None]) -> None:
    """Write the bad samples of all ranks' parts of a step; every rank calls it with its own.

    Args:
        save: folder of the run, or None.
        say: shows a line to the user; called on rank 0.
    """
    samples = of_all_ranks(bad)
    for sample in samples[:_SAID]:
        say(f"bad sample {sample.name}: {sample.source}: {sample.reason}")
    _append(samples, {"iteration": iteration}, save, say)


class UntrainedSamples:
    """Counts the samples that train nothing, or not all that they have, by their kind; names the first of each, writes
    them all.

    Args:
        what: `UNTRAINED` or `UNCOMPARED`.
        kinds: how many there are of each kind since the run began, the same on every rank; it is added to.
    """

    def __init__(
        self, kinds: dict[str, int], save: str | None, say: Callable[[str], None], what: str = UNTRAINED
    ) -> None:
        self._kinds, self._save, self._say, self._what = kinds, save, say, what
        self._first: dict[str, list[str]] = {}

    def report(self, own: list[BadSample], iteration: int) -> None:
        """Every rank calls it with its own of a step."""
        samples = of_all_ranks(own)
        for sample in samples:
            self._kinds[sample.reason] = self._kinds.get(sample.reason, 0) + 1
            first = self._first.setdefault(sample.reason, [])
            if len(first) < _SAID and sample.name not in first:
                first.append(sample.name)
                self._say(f"sample {sample.name} {self._what}: {sample.source}: {sample.reason}")
        _append(samples, {"iteration": iteration, "class": self._what}, self._save, self._say)

    def lines(self) -> list[str]:
        """`12 samples drawn (a, b, c, ...) trained nothing: it has no answer with words`, one line a kind.

        Of all that `kinds` counts; named are the first that were drawn since this process began.
        """
        lines = []
        for kind, number in Counter(self._kinds).most_common():
            first = self._first.get(kind, [])
            named = f" ({', '.join(first)}{', ...' if number > len(first) else ''})" if first else ""
            if self._what == UNTRAINED:
                lines.append(f"{number:,} samples drawn{named} trained nothing: {kind}")
            else:
                lines.append(f"{number:,} twins of samples drawn{named} were not compared: {kind}")
        return lines


def of_all_ranks(own: list[BadSample]) -> list[BadSample]:
    """All ranks' samples, on every rank."""
    everywhere: list[list[BadSample] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return [sample for part in everywhere for sample in part or []]


def _append(samples: list[BadSample], facts: dict[str, object], save: str | None, say: Callable[[str], None]) -> None:
    if save is None or not samples or dist.get_rank() != 0:
        return
    target = Path(save) / BAD_SAMPLES_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({**facts, **asdict(sample)}) + "\n")
    except OSError as error:  # a full disk is no reason to end a run
        say(f"{len(samples)} bad samples are not in {target}: {error}")
