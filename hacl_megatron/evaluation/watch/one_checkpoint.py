"""One checkpoint from its folder to its scores: exported, asked by every task, and what it answered kept.

SAVE/iter_0000100/ ─export_checkpoint→ SCRATCH/iter_0000100-0123…/ ─evaluate_benchmark, by task→ OUT/iter_…/TASK.json
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hacl_megatron.assemble.start_from import chat_template
from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, iteration_folder, read_run_config
from hacl_megatron.checkpoint.run.integrity import FILES_FILE, damage, is_finite
from hacl_megatron.config.files.checksum import checksum
from hacl_megatron.evaluation.answers.answerer import NotFinite
from hacl_megatron.evaluation.answers.run import BenchmarkRequest, evaluate_benchmark
from hacl_megatron.evaluation.model_files import fingerprint

FOLDER = re.compile(r"iter_\d{7,}-[0-9a-f]{16}")
"""Name of a checkpoint's results, and of its export."""


class Skipped(Exception):
    """This checkpoint cannot be scored, and the next one may be; the message says why, in one line."""


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """A whole checkpoint of a run, told from another one of the same iteration."""

    iteration: int
    folder: Path
    digest: str
    """Of its list of files, which holds checksums: 16 hexadecimal digits."""

    @classmethod
    def of(cls, save: Path, iteration: int) -> "FoundCheckpoint | None":
        """None where it is gone. One that an older version wrote, without a list, is told by its index."""
        folder = iteration_folder(save, iteration)
        for name in (FILES_FILE, ".metadata"):
            try:
                return cls(iteration=iteration, folder=folder, digest=f"{checksum((folder / name).read_bytes()):016x}")
            except OSError:
                continue
        return None

    @property
    def name(self) -> str:
        return f"{self.folder.name}-{self.digest}"

    def written(self) -> float:
        """When its save ended, in seconds since 1970. Raises Skipped where it is gone."""
        with gone_is_skipped(self):
            return self.folder.stat().st_mtime

    def is_there(self) -> bool:
        """Whether the folder still holds it."""
        return FoundCheckpoint.of(self.folder.parent, self.iteration) == self


def export(found: FoundCheckpoint, scratch: Path) -> Path:
    """The checkpoint's Hugging Face folder in `scratch`; one that is there is whole, and taken.

    Raises:
        Skipped: the checkpoint is damaged, not finite, or went away while it was read.
        ValueError: the export could not be written.
    """
    out = scratch / found.name
    if out.is_dir():
        return out
    if not is_finite(found.folder) and found.is_there():
        raise Skipped("its weights are not finite (NaN or infinity)")
    with gone_is_skipped(found):
        if wrong := damage(found.folder):
            raise ValueError(wrong)
        run = read_run_config(found.folder)
        template = chat_template(run, found.folder / ASSETS_FOLDER, trained=True)
        export_checkpoint(found.folder, out, chat_template=template)
    return out


@contextmanager
def gone_is_skipped(found: FoundCheckpoint) -> Iterator[None]:
    """Around whatever reads the checkpoint: any error becomes `Skipped` where it went away meanwhile, or is damaged."""
    try:
        yield
    except Exception as error:
        if not found.is_there():
            raise Skipped("the run has deleted it while it was read") from error
        if wrong := damage(found.folder):
            raise Skipped(f"it is damaged: {wrong}") from error
        raise


def scores_of(export: Path, tasks: Mapping[str, BenchmarkRequest], results: Path) -> dict[str, float]:
    """Metrics by `TASK METRIC`, those that are defined. Answers that are in `results` already are not given again.

    Args:
        tasks: what to ask, without model and output.
        results: folder that gets a results and an answers file a task.

    Raises:
        Skipped: the model answers nothing but NaN or infinity.
    """
    _drop_answers_of_others(results, export)
    scores: dict[str, float] = {}
    for task, request in tasks.items():
        try:
            found = evaluate_benchmark(replace(request, hf=export, output=results / f"{task}.json"))
        except NotFinite as error:
            raise Skipped(str(error)) from None
        assert found is not None, "one process answers all"
        scores |= {f"{task} {metric}": value for metric, value in found.metrics.items() if value is not None}
    return scores


def _drop_answers_of_others(results: Path, export: Path) -> None:
    """Forget a kill's answers where the export had to be made again and came out otherwise, by another version."""
    for settings in results.glob("*.settings.json"):
        try:
            model = json.loads(settings.read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, AttributeError, RecursionError):
            model = None
        if model != fingerprint(export):
            shutil.rmtree(results)
            return
