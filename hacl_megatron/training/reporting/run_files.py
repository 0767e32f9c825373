"""What a SAVE folder says of its run, for whoever looks on: nothing is written, no torch is imported.

    run_status.json, run.lock ─→ state         metrics.jsonl ─→ curves, rate, validation
    iter_*/files.json, run_config.yaml ─→ checkpoints, changes between starts       bad_samples.jsonl ─→ counts
    evaluation/scores.jsonl ─→ scores of the exports

A run may be writing meanwhile: half a last line is none, a checkpoint that goes away while it is looked at is left out.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hacl_megatron.checkpoint.run.integrity import FILES_FILE, FROZEN_FOLDER, is_finite, read_files
from hacl_megatron.checkpoint.run.retain import saved_iterations
from hacl_megatron.config.files.regular import only_regular
from hacl_megatron.config.yaml_files.text import load_yaml, read_yaml_text
from hacl_megatron.training.reporting.status import STATUS_FILE, RunState, run_state

METRICS_FILE, BAD_SAMPLES, CONFIG_FILE, SCORES_FILE = (
    "metrics.jsonl", "bad_samples.jsonl", "run_config.yaml", "evaluation/scores.jsonl",
)  # fmt: skip
VALIDATION = " validation"
"""What tags of a validation end with."""
_RECENT = 20
"""Logged steps of which the median is the present speed."""
_PATHS = ("save", "load")
"""Keys of a configuration that say nothing of the run."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number over the iterations that have it."""

    tag: str
    iterations: list[int]
    values: list[float]

    def points(self, most: int) -> list[tuple[float, float]]:
        """(iteration, value), at most that many: means of neighbours, for no screen is wider."""
        pairs = list(zip(self.iterations, self.values, strict=True))
        if len(pairs) <= most:
            return [(float(iteration), value) for iteration, value in pairs]
        edges = [round(index * len(pairs) / most) for index in range(most + 1)]
        parts = [pairs[start:end] for start, end in pairwise(edges)]
        return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The means of one validation, each with that of the one before, if there was one."""

    iteration: int
    means: dict[str, tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class BadSamples:
    """Lines of bad_samples.jsonl that tell the same."""

    kind: str
    reason: str
    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A whole checkpoint."""

    iteration: int
    num_bytes: int
    """Of its own folder."""
    written: float
    """Seconds since 1970."""
    is_finite: bool
    changes: list[str] = field(default_factory=list)
    """Flags that are not as in the checkpoint before it."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """All that is known of a run."""

    save: Path
    state: RunState
    curves: dict[str, Curve]
    """By tag, those of validations among them."""
    last_logged: float | None
    """Seconds since 1970."""
    step_seconds: float | None
    """Median of the last logged steps; so are the following ones."""
    samples_a_second: float | None
    validation: Validation | None
    bad: list[BadSamples]
    checkpoints: list[SavedCheckpoint]
    frozen_bytes: int
    """Of the weights that all checkpoints share."""
    unfinished: list[str]
    """Folders of saves that are being written, or were cut off."""
    scores: list[tuple[int, dict[str, float]]]
    """Of exports, by iteration."""
    notes: list[str]
    """What could not be read."""

    @property
    def iteration(self) -> int | None:
        """How far the run came, by its status and its metrics."""
        last = [curve.iterations[-1] for curve in self.curves.values()]
        told = _number(self.state.facts.get("iteration"))
        return max([*last, *([] if told is None else [int(told)])], default=None)

    @property
    def train_iters(self) -> int | None:
        told = _number(self.state.facts.get("train_iters"))
        return None if told is None else int(told)

    @property
    def seconds_left(self) -> float | None:
        """At the present speed, without validations and saves."""
        if self.step_seconds is None or self.iteration is None or self.train_iters is None:
            return None
        return max(0, self.train_iters - self.iteration) * self.step_seconds


def read_run(save: Path) -> RunFiles:
    """Raises ValueError, in one line, where there is no run."""
    refuse_what_is_no_run(save)
    notes: list[str] = []
    curves = _curves(save / METRICS_FILE, notes)
    speeds = [curves.get(tag) for tag in ("iteration-time", "samples-per-second")]
    seconds, rate = (None if curve is None else median(curve.values[-_RECENT:]) for curve in speeds)
    return RunFiles(
        save=save,
        state=run_state(save),
        curves=curves,
        last_logged=_changed(save / METRICS_FILE),
        step_seconds=seconds,
        samples_a_second=rate,
        validation=_last_validation(curves),
        bad=_bad_samples(save / BAD_SAMPLES, notes),
        checkpoints=_checkpoints(save, notes),
        frozen_bytes=_bytes_below(save / FROZEN_FOLDER),
        unfinished=sorted(path.name for path in save.glob("iter_*.partial")),
        scores=_scores(save / SCORES_FILE, notes),
        notes=notes,
    )


def refuse_what_is_no_run(save: Path) -> None:
    """Raises ValueError unless `save` has anything that a run leaves."""
    if not save.is_dir():
        raise ValueError(f"{save}: no such folder; expected the SAVE folder of a run, what --save of the trainer named")
    if _is_run(save):
        return
    if (save / CONFIG_FILE).is_file():
        raise ValueError(f"{save} is one checkpoint; give the folder it is in, {save.absolute().parent}")
    below = sorted(path.name for path in save.iterdir() if path.is_dir() and _is_run(path))
    advice = f"; there are runs in it: {', '.join(below[:5])}" if below else ""
    raise ValueError(
        f"{save} holds no run: found neither {STATUS_FILE} nor {METRICS_FILE} nor iter_* folders; expected what --save "
        f"of the trainer named{advice}"
    )


def _is_run(folder: Path) -> bool:
    has_files = any((folder / name).is_file() for name in (STATUS_FILE, METRICS_FILE, "run.lock"))
    return has_files or bool(saved_iterations(folder))


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; lines that are none are counted in a note, half a last line is not."""
    broken = 0
    try:
        with open(path, "rb", opener=only_regular) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    broken += bool(line.strip())
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
    if broken:
        notes.append(f"{broken} lines of {path.name} are no records, and are left out")


def _curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    by_tag: dict[str, dict[int, float]] = {}
    for record in _records(path, notes):
        iteration = _number(record.pop("iteration", None))
        for tag, value in record.items():
            if iteration is not None and (number := _number(value)) is not None:
                by_tag.setdefault(tag, {})[int(iteration)] = number
    return {
        tag: Curve(tag=tag, iterations=sorted(points), values=[points[i] for i in sorted(points)])
        for tag, points in by_tag.items()
    }


def _last_validation(curves: dict[str, Curve]) -> Validation | None:
    held_out = {tag.removesuffix(VALIDATION): curve for tag, curve in curves.items() if tag.endswith(VALIDATION)}
    if not held_out:
        return None
    last = max(curve.iterations[-1] for curve in held_out.values())
    return Validation(
        iteration=last,
        means={
            tag: (curve.values[-1], curve.values[-2] if len(curve.values) > 1 else None)
            for tag, curve in held_out.items()
            if curve.iterations[-1] == last
        },
    )


def _bad_samples(path: Path, notes: list[str]) -> list[BadSamples]:
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for record in _records(path, notes):
        key = (f"{record.get('class', 'unusable')}", f"{record.get('reason', 'no reason given')}")
        counts[key] += 1
        examples.setdefault(key, f"{record.get('name')}: {record.get('source')}")
    return [
        BadSamples(kind=kind, reason=reason, count=count, example=examples[kind, reason])
        for (kind, reason), count in counts.most_common()
    ]


def _checkpoints(save: Path, notes: list[str]) -> list[SavedCheckpoint]:
    found: list[SavedCheckpoint] = []
    before: str | None = None
    for iteration in saved_iterations(save):
        folder = save / f"iter_{iteration:07d}"
        try:
            text = read_yaml_text(folder / CONFIG_FILE, CONFIG_FILE)
            changes = [] if before is None or text == before else differing_flags(before, text)
            checkpoint = SavedCheckpoint(
                iteration=iteration,
                num_bytes=_size(folder),
                written=(folder / CONFIG_FILE).stat().st_mtime,
                is_finite=is_finite(folder),
                changes=changes,
            )
        except (ValueError, OSError) as error:
            if folder.is_dir():  # or the run has deleted it just now
                notes.append(f"{folder.name}: {error}")
            continue
        found.append(checkpoint)
        before = text
    return found


def differing_flags(before: str, now: str) -> list[str]:
    """`--lr 0.001 (was 0.002)`: how two run_config.yaml differ. Raises ValueError for what is no YAML."""
    old, new = (_flat(load_yaml(text, CONFIG_FILE).values) for text in (before, now))
    return [
        f"{_flag(key)} {_shown(new.get(key))} (was {_shown(old.get(key))})"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in _PATHS
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _flag(key: str) -> str:
    return key if "." in key else f"--{key.replace('_', '-')}"


def _shown(value: Any) -> str:
    return "not given" if value is None or value == [] else f"{value}"


def _size(folder: Path) -> int:
    """Bytes of a checkpoint's own files, as its list says; of one without a list as the disk says."""
    if not (folder / FILES_FILE).is_file():
        return _bytes_below(folder)
    return sum(size for name, size in read_files(folder)["files"].items() if not name.startswith("../"))


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _scores(path: Path, notes: list[str]) -> list[tuple[int, dict[str, float]]]:
    found: dict[int, dict[str, float]] = {}
    for record in _records(path, notes):
        iteration, scores = _number(record.get("iteration")), record.get("scores")
        if iteration is not None and isinstance(scores, dict):
            found[int(iteration)] = {tag: n for tag, value in scores.items() if (n := _number(value)) is not None}
    return sorted(found.items())


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None
