"""What a run made of its captions: shares by kind of edit, edit distance, coverage, and examples side by side."""

import difflib
import html
import re
from collections import Counter
from pathlib import Path
from random import Random

_TOKENS = re.compile(r"\s+|[^\W_]+|[^\w\s]|_")
_SAMPLE = 1000


class Report:
    """Gathers captions one by one; keeps a sample of 1,000 for what is slow to count."""

    def __init__(self, seed: int = 0):
        self.captions = self.covered = self.hallucinated = 0
        self.kinds: Counter[str] = Counter()
        """How many hallucinated captions have an edit of each kind; the captions of a language model have none."""
        self.edits_per_caption: Counter[int] = Counter()
        self._sample: list[tuple[str, str, str]] = []
        self._random = Random(seed)

    def add(self, caption: str, found: list[tuple[str, list[str]]]) -> None:
        """One caption with its hallucinated captions, each with its kinds of edit."""
        self.captions += 1
        self.covered += bool(found)
        for text, kinds in found:
            self.hallucinated += 1
            self.kinds.update(set(kinds))
            self.edits_per_caption[len(kinds)] += 1
            entry = (caption, text, ", ".join(kinds))
            if len(self._sample) < _SAMPLE:
                self._sample.append(entry)
            elif (place := self._random.randrange(self.hallucinated)) < _SAMPLE:
                self._sample[place] = entry

    def lines(self) -> list[str]:
        """The numbers, a line each."""
        share = 100 * self.covered / max(1, self.captions)
        lines = [
            f"coverage: {self.covered:,} of {self.captions:,} captions ({share:.1f} %), {self.hallucinated:,} texts"
        ]
        for kind, number in self.kinds.most_common():
            lines.append(f"{kind}: in {100 * number / max(1, self.hallucinated):.1f} %")
        for edits, number in sorted(self.edits_per_caption.items()):
            lines.append(f"{edits} edits: {100 * number / max(1, self.hallucinated):.1f} %")
        if self._sample:
            distances = [word_distance(before, after) for before, after, _ in self._sample]
            words = [max(1, len(before.split())) for before, _, _ in self._sample]
            ratios = sorted(
                len(after.split()) / count for (_, after, _), count in zip(self._sample, words, strict=True)
            )
            lines.append(
                f"word edit distance: {sum(distances) / len(distances):.1f} of {sum(words) / len(words):.1f} words; "
                f"length ratio {ratios[0]:.2f} to {ratios[-1]:.2f} (sample of {len(distances):,})"
            )
        return lines

    def examples(self, count: int) -> list[tuple[str, str, str]]:
        """(caption, hallucinated caption, kinds) of some, the same ones every time."""
        return Random(0).sample(self._sample, min(count, len(self._sample)))

    def for_terminal(self, count: int = 5) -> str:
        """Numbers and examples: [-what went-] {+what came+}."""
        shown = [_marked(before, after, "[-", "-]", "{+", "+}") for before, after, _ in self.examples(count)]
        return "\n".join([*self.lines(), *(f"  {text}" for text in shown)])

    def write(self, path: Path, count: int = 100) -> None:
        """A page with the numbers and `count` examples side by side: HTML, or Markdown where the name ends in .md."""
        examples = self.examples(count)
        if path.suffix == ".md":
            rows = [
                f"| {_marked(before, after, '~~', '~~', '**', '**', _markdown)} | {kinds} |"
                for before, after, kinds in examples
            ]
            text = "\n".join(
                [
                    "# Hallucinated captions",
                    "",
                    *(f"- {line}" for line in self.lines()),
                    "",
                    "| caption with ~~what went~~ and **what came** | kinds |",
                    "| --- | --- |",
                    *rows,
                    "",
                ]
            )
        else:
            rows = [
                f"<tr><td>{html.escape(before)}</td><td>"
                f"{_marked(before, after, '<del>', '</del>', '<ins>', '</ins>', html.escape)}</td>"
                f"<td>{html.escape(kinds)}</td></tr>"
                for before, after, kinds in examples
            ]
            text = "\n".join(
                [
                    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Hallucinated captions</title>',
                    "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto}",
                    "td{vertical-align:top;padding:.4em;border-top:1px solid #ccc}",
                    "del{background:#fdd}ins{background:#dfd;text-decoration:none}</style>",
                    "<h1>Hallucinated captions</h1><ul>",
                    *(f"<li>{html.escape(line)}</li>" for line in self.lines()),
                    "</ul><table><tr><th>caption</th><th>hallucinated</th><th>kinds</th></tr>",
                    *rows,
                    "</table></html>",
                    "",
                ]
            )
        path.write_text(text, encoding="utf-8", errors="replace")


def word_distance(one: str, other: str) -> int:
    """Levenshtein distance in words."""
    first, second = one.split(), other.split()
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, candidate in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != candidate))
    return row[-1]


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_~<>`\[\]])", r"\\\1", " ".join(text.split(" "))).replace("\n", " ")


def _marked(before: str, after: str, del_on: str, del_off: str, ins_on: str, ins_off: str, escape=str) -> str:
    """`after` with its differences from `before` marked, word by word."""
    old, new = _TOKENS.findall(before), _TOKENS.findall(after)
    pieces = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(escape("".join(old[i:j])))
            continue
        gone, came = "".join(old[i:j]), "".join(new[k:m])
        pieces += [
            f"{del_on}{escape(gone)}{del_off}" if gone else "",
            f"{ins_on}{escape(came)}{ins_off}" if came else "",
        ]
    return "".join(pieces)
