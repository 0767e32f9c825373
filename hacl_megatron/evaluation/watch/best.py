"""`--keep-best`: the export with the best of one score, in a folder that is replaced whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.convert.model_card import keep_own_card
from hacl_megatron.checkpoint.hf.export import why_no_export
from hacl_megatron.checkpoint.hf.fresh_folder import check_target, fresh_folder
from hacl_megatron.config.console import say
from hacl_megatron.config.names import did_you_mean
from hacl_megatron.evaluation.answers.benchmarks import BENCHMARKS

FACTS_FILE = "evaluation.json"
"""In the folder: of which checkpoint it is, and its scores."""


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Which score decides, and where its best export is kept."""

    score: str
    """A task and its metric, `pope f1`."""
    folder: Path
    """An earlier export there is replaced, but for a README.md of the user's own."""

    def check(self, tasks: Iterable[str]) -> None:
        """Raises ValueError, in one line, for a score that none of `tasks` has, and for a folder of something else."""
        scores = [f"{task} {metric}" for task in tasks for metric in BENCHMARKS[task].better]
        if self.score not in scores:
            known = f"these have {', '.join(scores)}" if scores else f"{', '.join(tasks)} has no score"
            raise ValueError(f"--keep-best {self.score!r}: no such score; {did_you_mean(self.score, scores, known)}")
        check_target(self.folder, force=True, why_not=why_no_export)

    def is_better(self, scores: dict[str, float], than: Iterable[dict[str, float]]) -> bool:
        """Whether `scores` beat all of `than`; the first of equal ones is kept, and no score is worse than any."""
        sign = self._sign()
        others = [sign * other[self.score] for other in than if self.score in other]
        return self.score in scores and sign * scores[self.score] > max(others, default=float("-inf"))

    def best(self, records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        """The record with the best score, the first of equal ones."""
        scored = [record for record in records if self.score in record["scores"]]
        return max(scored, key=lambda record: self._sign() * record["scores"][self.score], default=None)

    def kept(self) -> str | None:
        """Digest of the checkpoint of which the folder has the export; None where it has none."""
        try:
            return json.loads((self.folder / FACTS_FILE).read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def keep(self, export: Path, record: dict[str, Any]) -> None:
        """Put a copy of `export` into the folder; of the same file system's files, links to them. A README.md of the
        user's own that is there stays, and is said to."""
        self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        files = [path for path in export.rglob("*") if path.is_file()]
        linked = os.stat(self.folder.absolute().parent).st_dev == os.stat(export).st_dev
        room = 0 if linked else sum(path.stat().st_size for path in files)
        with fresh_folder(self.folder, room, force=True, why_not=why_no_export) as partial:
            for path in files:
                target = partial / path.relative_to(export)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(path, target)
            if kept := keep_own_card(partial, self.folder):
                say(f"note: {kept}")
            (partial / FACTS_FILE).write_text(json.dumps({"kept for": self.score, **record}, indent=1) + "\n")

    def _sign(self) -> int:
        task, _, metric = self.score.partition(" ")
        return 1 if BENCHMARKS[task].better[metric] == "higher" else -1
