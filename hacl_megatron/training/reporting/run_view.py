"""A run in words and small curves: for a terminal, `lines_of`, and for the page of tools/show_run.py, `RunView`."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from hacl_megatron.config.console import printable
from hacl_megatron.training.reporting.run_files import VALIDATION, Curve, RunFiles

# What is drawn, where the run has it.
_DRAWN = (
    "lm loss", "contrastive loss", "preference loss", "hallucination accuracy", "retrieval accuracy i2t",
    "preference accuracy", "temperature", "grad-norm", "learning-rate", "samples-per-second",
)  # fmt: skip
_POINTS = 240
_MOST_ROWS = 8
"""Of bad samples and of checkpoints; the others are counted."""
_GOOD, _GOING, _BAD = "good", "going", "bad"
_STATES = {
    "running": ("running", _GOING),
    "starting": ("starting: it has not begun to train yet", _GOING),
    "finished": ("finished", _GOOD),
    "stopped": ("stopped on request; the same command goes on", _GOING),
    "failed": ("failed; the same start would fail again", _BAD),
    "crashed": ("crashed", _BAD),
    "hung": ("hung, and was ended", _BAD),
    "killed": ("killed without a save", _BAD),
    "cut off": ("cut off without a word: killed, or its node was lost", _BAD),
    None: ("says nothing of its state", _GOING),
}


@dataclass(frozen=True, kw_only=True)
class CurveView:
    """A curve and its numbers as text."""

    tag: str
    last: str
    first: str
    between: str
    """Lowest and highest."""
    points: list[tuple[float, float]]
    held_out: list[tuple[float, float]]
    """The same of validations."""

    def svg(self, width: float, height: float) -> tuple[str, str]:
        """`points` of two SVG polylines over one frame: the curve's and the validations'."""
        every = [*self.points, *self.held_out]
        left, right = _range([x for x, _ in every])
        low, high = _range([y for _, y in every])

        def drawn(points: list[tuple[float, float]]) -> str:
            places = [((x - left) / (right - left) * width, (high - y) / (high - low) * height) for x, y in points]
            if len(places) == 1:
                places *= 2  # a dot
            return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

        return drawn(self.points), drawn(self.held_out)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What is shown, in its order; tables as rows of texts."""

    title: str
    state: str
    mood: str
    """good, going or bad."""
    facts: list[tuple[str, str]]
    curves: list[CurveView]
    tables: list[tuple[str, list[tuple[str, ...]]]]
    """Title and rows; none is empty."""
    notes: list[str]

    @classmethod
    def of(cls, run: RunFiles, *, now: float | None = None) -> "RunView":
        """`now`: seconds since 1970."""
        now = time.time() if now is None else now
        state = run.state
        words, mood = _STATES.get(state.state, (f"{state.state}", _GOING))
        if reason := state.facts.get("reason"):
            words += f": {reason}"
        return cls(
            title=f"{run.save}",
            state=words,
            mood=mood,
            facts=_facts(run, now),
            curves=[_curve(run, run.curves[tag]) for tag in _DRAWN if tag in run.curves],
            tables=[(title, rows) for title, rows in _tables(run, now) if rows],
            notes=_notes(run),
        )


def _facts(run: RunFiles, now: float) -> list[tuple[str, str]]:
    state, facts = run.state, []
    if state.holder is not None:
        facts.append(("process", f"{state.holder.removeprefix('process ')}, alive {_ago(state.heard)}"))
    elif updated := state.facts.get("updated"):
        facts.append(("last heard of", f"{updated} on {state.facts.get('host')}"))
    if run.iteration is not None:
        share = f" ({run.iteration / run.train_iters:.0%})" if run.train_iters else ""
        logged = "" if run.last_logged is None else f", logged {_ago(now - run.last_logged)}"
        of = "" if run.train_iters is None else f" of {run.train_iters:,}"
        facts.append(("iteration", f"{run.iteration:,}{of}{share}{logged}"))
    if run.step_seconds is not None:
        rate = "" if run.samples_a_second is None else f"{run.samples_a_second:.3g} samples/s, "
        facts.append(("speed", f"{rate}{run.step_seconds:.3g} s a step (median of the last ones logged)"))
    if run.seconds_left and state.is_alive:
        facts.append(("time left", f"{duration(run.seconds_left)}, without saves and validations"))
    of_last = {tag: curve.values[-1] for tag, curve in run.curves.items()}
    machine = [
        form.format(of_last[tag])
        for tag, form in (
            ("mfu", "MFU {:.1%}"),
            ("data-wait-share", "waits for data {:.1%}"),
            ("rank-time-spread", "slowest rank {:.2f} × the median"),
        )
        if tag in of_last
    ]
    machine += [
        f"{num_bytes(of_last[tag])} of memory"
        for tag in ("mem-max-allocated-bytes", "mem-resident-bytes")
        if tag in of_last
    ]
    if machine:
        facts.append(("ranks", ", ".join(machine)))
    drawn = [
        f"{state.facts[key]:,} {words}"
        for key, words in (
            ("drawn_samples", "drawn"),
            ("bad_samples", "unusable"),
            ("untrained_samples", "trained nothing"),
        )
        if isinstance(state.facts.get(key), int)
    ]
    if drawn:
        facts.append(("samples", ", ".join(drawn)))
    return facts


def _curve(run: RunFiles, curve: Curve) -> CurveView:
    held_out = run.curves.get(curve.tag + VALIDATION)
    return CurveView(
        tag=curve.tag,
        last=_short(curve.values[-1]),
        first=_short(curve.values[0]),
        between=f"{_short(min(curve.values))} to {_short(max(curve.values))}",
        points=curve.points(_POINTS),
        held_out=[] if held_out is None else held_out.points(_POINTS),
    )


def _tables(run: RunFiles, now: float) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    if run.validation is not None:
        rows = [
            (tag, _short(value), "" if before is None else f"{value - before:+.2g} since the one before")
            for tag, (value, before) in run.validation.means.items()
        ]
        yield f"validation at iteration {run.validation.iteration:,}", rows
    if run.scores:
        iteration, last = run.scores[-1]
        before = run.scores[-2][1] if len(run.scores) > 1 else {}
        rows = [
            (tag, _short(value), f"{value - before[tag]:+.2g} since the one before" if tag in before else "")
            for tag, value in last.items()
        ]
        yield f"scores of the export of iteration {iteration:,}", rows
    rows = [(f"{bad.count:,}", bad.kind, bad.reason, f"such as {bad.example}") for bad in run.bad[:_MOST_ROWS]]
    if len(run.bad) > _MOST_ROWS:
        rest = sum(bad.count for bad in run.bad[_MOST_ROWS:])
        rows.append((f"{rest:,}", "others", f"for {len(run.bad) - _MOST_ROWS} more reasons", "see bad_samples.jsonl"))
    yield "bad samples", rows
    yield "checkpoints", _checkpoint_rows(run, now)
    changes = run.state.facts.get("changes")
    lines = [(f"{line}",) for line in changes] if isinstance(changes, list) else []
    for saved in run.checkpoints:
        if saved.changes:
            lines.append((f"checkpoint {saved.iteration:,}, unlike the one before: {', '.join(saved.changes)}",))
    yield "changes between starts", lines


def _checkpoint_rows(run: RunFiles, now: float) -> list[tuple[str, ...]]:
    shown = run.checkpoints[-_MOST_ROWS:]
    rows = [
        (
            f"{saved.iteration:,}",
            num_bytes(saved.num_bytes),
            _ago(now - saved.written),
            "" if saved.is_finite else "holds values that are not finite",
        )
        for saved in reversed(shown)
    ]
    older = run.checkpoints[: -len(shown) or None] if shown else []
    if older:
        rows.append((f"{len(older)} older", num_bytes(sum(saved.num_bytes for saved in older)), "", ""))
    if run.frozen_bytes:
        rows.append(("frozen", num_bytes(run.frozen_bytes), "", "weights that do not train, once for all"))
    rows += [(name, "", "", "being written, or cut off") for name in run.unfinished]
    return rows


def _notes(run: RunFiles) -> list[str]:
    notes = list(run.notes)
    for key, what in (("lost_lines", "lines of output"), ("lost_metrics", "iterations of metrics")):
        if lost := run.state.facts.get(key):
            notes.append(f"{lost} {what} could not be written")
    return notes


# ------------------------------------------------------------------------------------------------------- in a terminal

_COLOURS = {_GOOD: "32", _GOING: "36", _BAD: "31"}


def lines_of(view: RunView, *, width: int, colour: bool, curves: bool = True) -> Iterator[str]:
    """The lines of a terminal that is `width` characters wide; whatever comes from a file is `printable`.

    Args:
        colour: with the escape sequences of colours.
        curves: with braille dots, for a terminal of UTF-8.
    """

    def painted(text: str, code: str) -> str:
        return f"\x1b[{code}m{printable(text)}\x1b[0m" if colour else printable(text)

    yield f"{painted(view.title, '1')}  {painted(view.state, _COLOURS[view.mood])}"
    names = max((len(name) for name, _ in view.facts), default=0)
    for name, value in view.facts:
        yield f"  {painted(f'{name:<{names}}', '2')}  {printable(value)}"
    if view.curves:
        yield ""
    tags = max((len(curve.tag) for curve in view.curves), default=0)
    for curve in view.curves:
        drawn = _drawn(curve, max(20, min(60, width - tags - 28))) if curves and len(curve.points) > 1 else ["", ""]
        yield f"{painted(f'{curve.tag:<{tags}}', '1')}  {drawn[0]}  {curve.last}"
        if drawn[1]:
            yield f"{'':<{tags}}  {drawn[1]}  {painted(curve.between, '2')}"
    for title, rows in view.tables:
        yield ""
        yield painted(title, "1")
        widths = [max(len(printable(cell)) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [f"{printable(cell):<{min(size, 40)}}" for cell, size in zip(row, widths, strict=True)]
            yield f"  {'  '.join(cells)}".rstrip()
    if view.notes:
        yield ""
    yield from (painted(f"note: {note}", "33") for note in view.notes)


def _drawn(curve: CurveView, width: int) -> list[str]:
    """Two rows of braille dots."""
    from plotille import Canvas

    left, right = _range([x for x, _ in curve.points])
    low, high = _range([y for _, y in curve.points])
    canvas = Canvas(width, 2, xmin=left, ymin=low, xmax=right, ymax=high)
    for (x, y), (x_next, y_next) in pairwise(curve.points):
        canvas.line(x, y, x_next, y_next)
    return canvas.plot().splitlines()


# -------------------------------------------------------------------------------------------------------------- numbers


def _range(values: list[float]) -> tuple[float, float]:
    """Lowest and highest, apart from one another."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.0 if high > low else max(abs(low) * 0.1, 1e-9)
    return low - room, high + room


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{duration(max(0.0, seconds))} ago"


def duration(seconds: float) -> str:
    """`3 d 4 h`, `12 min`, `8 s`: the two largest units."""
    seconds = math.ceil(seconds)
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = parts[first : first + (2 if first < 2 else 1)]
    return " ".join(f"{count} {unit}" for count, unit in shown)


def num_bytes(count: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"
