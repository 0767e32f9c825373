"""The page of tools/inspect_data.py: thousands of samples in one file, of which the browser unpacks those looked at.

ShownSample ─inspect_data_sample.html.j2→ its HTML, every text escaped ─deflate, base64→ a chunk ┐
            └→ a row of the index: text to search, faults, kinds of edit, length, margins ───────┴→ the page
Its script, inspect_data.js, is the only one that the page's own policy lets run; nothing is fetched from anywhere.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:
    from hacl_megatron.data.show import ShownSample
    from hacl_megatron.evaluation.likelihood.beliefs import Belief, Beliefs

HERE = Path(__file__).parent
NO_KIND = "not recorded"
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 0x7F) if chr(code) != "\n"}
"""Control characters as escapes, which a page can show."""


def visible(value: object) -> object:
    """Text with its control characters made visible; anything else as it is."""
    return value.translate(CONTROL) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class _Twin:
    """What is known of a twin, ready to print."""

    kinds: tuple[str, ...]
    values: dict[str, str]
    margins: dict[str, str]
    believed: list[str]
    """Measures by which it is not behind its caption."""


@dataclass(kw_only=True)
class SamplePage:
    """Gathers samples one by one; only their packed chunks are held."""

    measures: tuple[str, ...] = ()
    """By which a model compares captions and twins (`likelihood.beliefs`); none: no model was asked."""
    _chunks: list[str] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _faults: dict[str, int] = field(default_factory=dict)
    _kinds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._jinja = jinja2.Environment(
            autoescape=True, finalize=visible, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        self._sample = self._template("inspect_data_sample.html.j2")

    def add(self, shown: "ShownSample", kinds: Mapping[str, tuple[str, ...]], beliefs: "Beliefs | None") -> None:
        """One more sample.

        Args:
            kinds: of edit, by the texts of its hallucinated captions, where they are known.
            beliefs: what a model makes of its texts.
        """
        if beliefs is not None and not shown.reasons:  # what keeps it from being scored is said already
            shown.notes += [f"{reason[:1].upper()}{reason[1:]}." for reason in beliefs.reasons]
        hallucinated = dict.fromkeys(text for pair in shown.sample.pairs for text in pair.hallucinated)
        hallucinated |= dict.fromkeys(shown.sample.hallucinated_captions)  # of a sample without a caption, too
        texts = [*hallucinated, *shown.sample.rejected_answers]
        twins = {
            text: _twin(text, kinds.get(text, (NO_KIND,) if kinds and text in hallucinated else ()), beliefs)
            for text in texts
        }
        html = self._sample.render(
            shown=shown,
            caption={} if beliefs is None else _values(beliefs.caption),
            twins=twins,
            text_of=lambda words: "".join(word.text for word in words if word.change != "removed"),
        )
        # A lone surrogate, which a broken sample may hold, is no character of UTF-8: shown as its escape.
        packed = zlib.compress(html.encode("utf-8", errors="backslashreplace"), 9)
        self._chunks.append(base64.b64encode(packed).decode())
        self._rows.append(
            {
                "text": "\n".join(_texts(shown, texts)),
                "rows": shown.segments[0].length if shown.segments else 0,
                "faults": _numbers(shown.faults, self._faults),
                "kinds": _numbers([kind for text in hallucinated for kind in kinds.get(text, (NO_KIND,))], self._kinds),
                "margins": {} if beliefs is None else beliefs.smallest_margins(),
            }
        )

    def expected_bytes(self, number: int) -> int:
        """Of a page of so many samples, by those that it has."""
        known = sum(map(len, self._chunks)) + sum(len(row["text"]) for row in self._rows)
        return number * known // max(1, len(self._chunks))

    def write(self, path: Path, title: str, facts: Mapping[str, object]) -> int:
        """Writes the page, which appears whole or not at all; returns its bytes."""
        script = (HERE / "inspect_data.js").read_text(encoding="utf-8")
        index = {"faults": [*self._faults], "kinds": [*self._kinds], "measures": self.measures, "samples": self._rows}
        page = self._template("inspect_data.html.j2").render(
            title=title,
            facts=facts,
            measures=self.measures,
            chunks=self._chunks,
            # Of a script's text a browser knows only the end.
            index=Markup(json.dumps(index).replace("<", "\\u003c")),
            script=Markup(script),
            script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        )
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            size = partial.write_bytes(page.encode("utf-8", errors="backslashreplace"))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return size

    def _template(self, name: str) -> jinja2.Template:
        return self._jinja.from_string((HERE / name).read_text(encoding="utf-8"))


def _texts(shown: "ShownSample", twins: list[str]) -> list[str]:
    """All that the sample may be looked for by."""
    sample = shown.sample
    said = [value for _, value in sample.conversations if isinstance(value, str)]
    captions = [pair.caption for pair in sample.pairs]
    return [*dict.fromkeys(visible(text) for text in (sample.name, *sample.images, *captions, *said, *twins))]


def _numbers(names: list[str], known: dict[str, int]) -> list[int]:
    """The places of the names in `known`, to which new ones are added; each once."""
    return [*dict.fromkeys(known.setdefault(name, len(known)) for name in names)]


def _values(belief: "Belief") -> dict[str, str]:
    names = {"sum": "log-likelihood", "per token": "a token", "cosine": "cosine"}
    return {names[measure]: f"{value:.3g}" if measure == "cosine" else f"{value:.2f}"
            for measure, value in belief.values.items()}  # fmt: skip


def _twin(text: str, kinds: tuple[str, ...], beliefs: "Beliefs | None") -> _Twin:
    if beliefs is None or text not in beliefs.twins:
        return _Twin(kinds=kinds, values={}, margins={}, believed=[])
    margins = beliefs.margins(text)
    return _Twin(
        kinds=kinds,
        values=_values(beliefs.twins[text]),
        margins={name: f"{value:+.3f}" if name == "cosine" else f"{value:+.2f}" for name, value in margins.items()},
        believed=[measure for measure, value in margins.items() if value <= 0],
    )
