"""From a LLaVA file to the same file with hallucinated captions: what the command line runs."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from hacl_megatron.data.prepare.json_text import is_text
from hacl_megatron.data.prepare.share import Share
from hacl_megatron.hallucinate.answers import AnswerLog
from hacl_megatron.hallucinate.ask import Endpoint, Verdict, ask_all, import_openai, judge, request_key
from hacl_megatron.hallucinate.by_rules import hallucinate_all
from hacl_megatron.hallucinate.files import RecordWriter, answers_of, read_records, writing
from hacl_megatron.hallucinate.items import Item, items_of
from hacl_megatron.hallucinate.report import Report
from hacl_megatron.hallucinate.rules import Hallucination, hallucinate

_NAMED = 3
"""So many records that hold no text are named."""


@dataclass
class Totals:
    """What became of a file's records."""

    records: int = 0
    no_caption: int = 0
    kept: int = 0
    """Had hallucinated captions already."""
    requests: int = 0
    """Sent to the endpoint, its client's retries included."""
    rejected: int = 0
    """Captions with less than was asked for, for want of usable answers."""
    filled: int = 0
    """Hallucinated captions that the rules wrote in place of refused answers."""
    asked: int = 0
    """Captions that answers were looked for to, now or in an earlier run."""
    unanswered: int = 0
    """Of these, captions without one usable answer."""
    last_refusal: str = ""
    """Why the last unusable answer was none."""
    not_listed: list[str] = field(default_factory=list)
    """Names of the first records with several images that do not list their captions."""
    num_not_listed: int = 0
    not_text: list[str] = field(default_factory=list)
    """Names of the first records that hold what is no Unicode text."""
    num_not_text: int = 0
    report: Report = field(default_factory=Report)

    def take(self, writer: RecordWriter, item: Item, found: list[Hallucination]) -> None:
        """Puts an item's hallucinated captions into its record, and hands that to the file where it is done; remembers
        it where it is no text."""
        if item.caption is not None or item.image is not None:
            item.add(found)
        if item.caption is not None:
            self.report.add(item.caption, [(one.text, [edit.kind for edit in one.edits]) for one in found])
        if item.is_last and not writer.write(item.record):
            self.num_not_text += 1
            if len(self.not_text) < _NAMED:
                self.not_text.append(item.name)

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.records:,} records: {self.no_caption:,} without a caption, {self.kept:,} kept as they were"]
        if self.requests or self.rejected:
            lines.append(
                f"{self.requests:,} requests; {self.rejected:,} captions lack usable answers, "
                f"{self.filled:,} texts filled by rules"
            )
        if self.num_not_listed:
            more = ", ..." if self.num_not_listed > len(self.not_listed) else ""
            lines.append(
                f"{self.num_not_listed:,} records ({', '.join(self.not_listed)}{more}) have several images and no list "
                "of their captions under 'text': kept as they were"
            )
        if self.num_not_text:
            more = ", ..." if self.num_not_text > len(self.not_text) else ""
            lines.append(
                f"{self.num_not_text:,} records ({', '.join(self.not_text)}{more}) hold half of a surrogate pair, "
                "which is no text: written as they are, by escapes; training lists them as bad samples"
            )
        return "\n".join(lines)


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
    source: Path,
    target: Path,
    *,
    seed: int,
    per_caption: int,
    workers: int,
    replace: bool,
    share: Share | None = None,
) -> Totals:
    """Writes `target`; see `hacl_megatron.hallucinate.rules`. Memory does not grow with the file.

    `share`: of the records, those alone.
    """
    totals = Totals()
    with writing(target) as file, _bar(source, "rules") as bar:
        writer = RecordWriter(file, lines=target.suffix == ".jsonl")
        items = (
            (item, item.name, item.caption if item.caption and is_text(item.caption) else None)
            for item in _items(source, totals, bar, replace, share)
        )
        for item, found in hallucinate_all(items, seed=seed, count=per_caption, workers=workers):
            totals.take(writer, item, found)
        _end(writer, source, totals, share)
    return totals


def generate_by_llm(
    source: Path,
    target: Path,
    endpoint: Endpoint,
    *,
    per_caption: int,
    attempts: int,
    replace: bool,
    fill_seed: int | None = None,
    share: Share | None = None,
) -> Totals:
    """Asks for what `TARGET.answers.jsonl` lacks, then `target` and, where answers failed, `TARGET.rejected.jsonl`.

    `fill_seed`: of the rules that write what the model did not; None: nothing does. `share`: of the records, those
    alone. Raises ValueError as `ask_all`.
    """
    import_openai()
    with AnswerLog(answers_of(target)) as log:
        totals = Totals()
        with _bar(source, "ask") as bar:
            asked = (
                (item.name, item.caption)
                for item in _items(source, totals, bar, replace, share)
                if item.caption is not None
            )
            requests, failed = ask_all(asked, endpoint, log, count=per_caption, attempts=attempts, progress=bar.refresh)
        totals = Totals(requests=requests)
        rejects = target.with_name(target.name + ".rejected.jsonl")
        with writing(target) as file, writing(rejects) as rejected, _bar(source, "write") as bar:
            writer = RecordWriter(file, lines=target.suffix == ".jsonl")
            for item in _items(source, totals, bar, replace, share):
                name, caption, found = item.name, item.caption, []
                if caption is not None:
                    verdict = judge(log, endpoint, name, caption, count=per_caption, attempts=attempts)
                    found = [Hallucination(text=text, edits=()) for text in verdict.accepted]
                    totals.asked += 1
                    totals.unanswered += not found
                    if len(found) < per_caption:
                        totals.rejected += 1
                        reason = verdict.missing and failed.get(request_key(endpoint, name, caption, *verdict.missing))
                        totals.last_refusal = reason or verdict.refused[-1][1]
                        rejected.write(_reject(name, caption, verdict, reason))
                        if fill_seed is not None and is_text(caption):
                            found = _filled(found, name, caption, per_caption, fill_seed, totals)
                totals.take(writer, item, found)
            _end(writer, source, totals, share)
        if not totals.rejected:
            rejects.unlink()
    return totals


def _reject(name: str, caption: str, verdict: Verdict, failure: str | None) -> str:
    answers = [{"answer": answer, "reason": reason} for answer, reason in verdict.refused]
    if failure:
        answers.append({"answer": None, "reason": failure})
    return json.dumps({"id": name, "caption": caption, "accepted": len(verdict.accepted), "rejected": answers}) + "\n"


def _filled(
    found: list[Hallucination], name: str, caption: str, count: int, seed: int, totals: Totals
) -> list[Hallucination]:
    """`found` and, up to `count`, texts of the rules that differ from them."""
    have = {" ".join(one.text.casefold().split()) for one in found}
    more = [
        one
        for one in hallucinate(caption, seed=seed, name=name, count=count)
        if " ".join(one.text.casefold().split()) not in have
    ][: count - len(found)]
    totals.filled += len(more)
    return found + more


def _bar(source: Path, name: str) -> tqdm:
    return tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc=name, delay=0.5, dynamic_ncols=True)


def _items(source: Path, totals: Totals, bar: tqdm, replace: bool, share: Share | None) -> Iterator[Item]:
    """The items of each record, counted."""
    (span,) = [None] if share is None else share.spans([str(source)])
    if share is not None and span is None:
        return
    for at, index, record in read_records(source, span):
        totals.records += 1
        if at != bar.n:
            bar.update(at - bar.n)
        items, becomes = items_of(record, index, replace=replace)
        totals.no_caption += becomes == "no caption"
        totals.kept += becomes == "kept"
        if becomes == "not listed":
            totals.num_not_listed += 1
            if len(totals.not_listed) < _NAMED:
                totals.not_listed.append(items[0].name)
        yield from items


def _end(writer: RecordWriter, source: Path, totals: Totals, share: Share | None) -> None:
    if not totals.records and share is None:
        raise ValueError(f"{source}: holds no records; expected at least one")
    writer.close()
