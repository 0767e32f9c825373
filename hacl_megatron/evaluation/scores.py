"""What a scorer returns, how it is written, and how it is shown.

answers + ground truth ─score_*→ Scores ─write_scores→ results.json {task, metrics, counts, settings, versions, files}
                                       └format_table→ the table in the terminal
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hacl_megatron.config.files.partial import hold, remove_leftovers
from hacl_megatron.data.prepare.json_text import json_text

VERSIONED = ("torch", "transformers", "tokenizers", "pillow", "textblob", "nltk", "spacy", "hacl_megatron")
"""Packages whose version can change an answer or a score."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A benchmark's metrics on one set of answers."""

    task: str
    metrics: dict[str, float | None]
    """Named as the benchmark names them and as its own script computes them; None where it divides by zero."""
    counts: dict[str, int]
    """How many of what the metrics are made of."""
    decimals: int | None = None
    """Digits that the benchmark's own script prints; None for all of them."""
    percent: bool = False
    """Whether that script prints the metrics times 100."""
    notes: tuple[str, ...] = ()
    """What a reader must know to compare: approximations, answers that count oddly."""
    details: dict[str, Any] = field(default_factory=dict)
    """More for the results file than the terminal has room for."""


def ratio(numerator: float, denominator: float) -> float | None:
    """The quotient; None where nothing was counted, which the published scripts do not survive."""
    return numerator / denominator if denominator else None


def file_digest(path: Path) -> str:
    """`sha256:` and the hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those of `VERSIONED` that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_scores(path: Path, scores: Scores, *, settings: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Write the results file; `settings` are JSON values, `files` what was read or written, by its role.

    The file appears whole or not at all.
    """
    content = {
        "task": scores.task,
        "metrics": scores.metrics,
        "counts": scores.counts,
        "notes": list(scores.notes),
        "settings": dict(settings),
        "versions": installed_versions(),
        "files": {
            role: {"path": str(path), **({"digest": file_digest(path)} if path.is_file() else {})}
            for role, path in files.items()
        },
        **({"details": scores.details} if scores.details else {}),
    }
    write_whole(path, json_text(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file such that a reader, or a kill, never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    remove_leftovers(path)
    with open(partial, "w", encoding="utf-8") as file:
        hold(file)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        partial.replace(path)  # while it is held


def format_table(scores: Scores) -> str:
    """Metrics and counts in two columns, numbers with the digits of the benchmark's own script."""

    def shown(value: float | None) -> str:
        if value is None:
            return "undefined"
        value = value * 100 if scores.percent else value
        return str(value) if scores.decimals is None else f"{value:.{scores.decimals}f}"

    rows = [(name, shown(value)) for name, value in scores.metrics.items()]
    rows += [(name, str(value)) for name, value in scores.counts.items()]
    width = max(len(name) for name, _ in rows)
    digits = max(len(value) for _, value in rows)
    rule = "-" * (width + 2 + digits)
    split = len(scores.metrics)
    lines = [f"{name:<{width}}  {value:>{digits}}" for name, value in rows]
    return "\n".join([scores.task, rule, *lines[:split], rule, *lines[split:], *(f"note: {n}" for n in scores.notes)])
