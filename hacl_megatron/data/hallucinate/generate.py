"""From a LLaVA file to the same file with hallucinated captions: what the command line runs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hacl_megatron.data.hallucinate.by_rules import hallucinate_all
from hacl_megatron.data.hallucinate.records import (
    CAPTION_KEY,
    EDITS_KEY,
    RecordWriter,
    caption_of,
    name_of,
    read_records,
    writing,
)
from hacl_megatron.data.hallucinate.rules import Hallucination


@dataclass
class Totals:
    """What became of a file's records."""

    records: int = 0
    no_caption: int = 0
    kept: int = 0
    """Had hallucinated captions already."""
    covered: int = 0
    """Got at least one."""
    written: int = 0
    """Hallucinated captions in all."""

    def summary(self) -> str:
        """Two lines for the terminal."""
        asked = self.records - self.no_caption - self.kept
        share = 100 * self.covered / asked if asked else 100.0
        return (
            f"{self.records:,} records: {self.no_caption:,} without a caption, {self.kept:,} kept as they were\n"
            f"{self.covered:,} of {asked:,} captions ({share:.1f} %) got {self.written:,} hallucinated captions"
        )


def check_paths(source: Path, target: Path, *, force: bool) -> None:
    """Raises ValueError before any work: a missing input, an output that exists or is the input, a wrong ending."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file; expected a LLaVA JSON or JSONL file, check --input")
    if target.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--output {target}: expected a name that ends in .json or .jsonl")
    if target.exists():
        if os.path.samefile(source, target):
            raise ValueError(f"--output {target} is --input; write to another file")
        if not force:
            raise ValueError(f"--output {target} exists; give --force to replace it, or another name")


def generate_by_rules(
    source: Path, target: Path, *, seed: int, per_caption: int, workers: int, replace: bool
) -> Totals:
    """Writes `target`; see `hacl_megatron.data.hallucinate.rules`. Memory does not grow with the file."""
    totals = Totals()
    with (
        writing(target) as file,
        tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc="rules", delay=0.5) as bar,
    ):
        writer = RecordWriter(file, lines=target.suffix == ".jsonl")
        items = _items(source, totals, bar, replace)
        for record, found in hallucinate_all(items, seed=seed, count=per_caption, workers=workers):
            if found:
                totals.covered += 1
                totals.written += len(found)
                add_to(record, found)
            writer.write(record)
        if not totals.records:
            raise ValueError(f"{source}: holds no records; expected at least one")
        writer.close()
    return totals


def add_to(record: dict[str, Any], found: list[Hallucination]) -> None:
    """Put hallucinated captions into a record: a string if it is one, else a list; the edits always as lists."""
    record[CAPTION_KEY] = found[0].text if len(found) == 1 else [one.text for one in found]
    record[EDITS_KEY] = [
        [{"kind": edit.kind, "before": edit.before, "after": edit.after} for edit in one.edits] for one in found
    ]


def _items(source: Path, totals: Totals, bar: tqdm, replace: bool) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """(record, name, caption to falsify or None) of each record, counted."""
    for at, record in read_records(source):
        index, totals.records = totals.records, totals.records + 1
        if at != bar.n:
            bar.update(at - bar.n)
        caption = caption_of(record)
        if caption is None:
            totals.no_caption += 1
        elif record.get(CAPTION_KEY) and not replace:
            totals.kept += 1
            caption = None
        yield record, name_of(record, index), caption
