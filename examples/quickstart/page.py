"""The quickstart's last page: one HTML file that asks for nothing from outside, each text escaped by its template."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from draw import Facts
from marking import hallucinated, marked, read_answer
from score import true_of

Rows = list[dict[str, float]]
"""A stage's metrics.jsonl."""
CURVES = ("lm loss", "contrastive loss", "retrieval accuracy i2t", "hallucination accuracy")


@dataclass(frozen=True)
class Said:
    """What a model answers to the same question about each picture, and how it scores."""

    when: str
    answers: list[str]
    likelier: float
    """Share of the pictures whose caption is a likelier answer than its twin."""

    def right(self, scenes: Sequence[Facts]) -> list[bool]:
        """Of each answer: it is true, and says all that captions always say."""
        return true_of(self.answers, list(scenes))

    def false_share(self, scenes: Sequence[Facts]) -> float | None:
        """Of the facts that its answers state, the share that is false; answers of unknown form are left out."""
        stated = wrong = 0
        for answer, scene in zip(self.answers, scenes, strict=True):
            stated += len(read_answer(answer) or ())
            wrong += len(hallucinated(answer, scene) or ())
        return wrong / stated if stated else None

    def scores(self, scenes: Sequence[Facts]) -> dict[str, str]:
        """For a column of a table."""
        right, false = self.right(scenes), self.false_share(scenes)
        return {
            "its description is true": percent(sum(right) / len(right)),
            "of the facts that it states are false": "–" if false is None else percent(false),
            "the caption is a likelier answer than its twin": percent(self.likelier),
        }

    def of(self, at: int, scene: Facts) -> dict[str, Any]:
        """For a card: the answer in pieces, and whether it is right."""
        answer = self.answers[at]
        (right,) = true_of([answer], [scene])
        return {
            "when": self.when, "pieces": marked(answer, scene), "true": right,
            "incomplete": not right and hallucinated(answer, scene) == [],
        }  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table_of(columns: Sequence[tuple[str, dict[str, str]]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(head, rows) of named columns; what a column lacks is a dash."""
    labels = list(dict.fromkeys(label for _, values in columns for label in values))
    return [name for name, _ in columns], [
        (label, [values.get(label, "–") for _, values in columns]) for label in labels
    ]


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def plot_curve(axis: plt.Axes, tag: str, stages: Sequence[tuple[str, Rows]]) -> None:
    """Both stages of a metric one behind the other; scores on held-out pairs as dots."""
    start = 0
    for name, rows in stages:
        seen = [(start + row["iteration"], row[tag]) for row in rows if tag in row]
        if seen:
            axis.plot(*zip(*seen, strict=True), linewidth=1, label=name)
        key = f"{tag} validation"
        held_out = [(start + row["iteration"], row[key]) for row in rows if key in row]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o", color="black", markersize=4)
        start += int(rows[-1]["iteration"])
    axis.set_title(tag)
    axis.set_xlabel("step (dots: held out)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def curve_images(stages: Sequence[tuple[str, Rows]]) -> list[dict[str, str]]:
    """Each of `CURVES` as an SVG in a data URI."""
    curves = []
    for tag in CURVES:
        figure, axis = plt.subplots(figsize=(3.4, 2.7), layout="constrained")
        plot_curve(axis, tag, stages)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
        curves.append({"title": tag, "source": data_uri("svg+xml", buffer.getvalue())})
    return curves


def card(sample: dict[str, Any], scene: Facts, image_folder: Path, said: Sequence[Said], at: int) -> dict[str, Any]:
    """A picture with what models say of it."""
    content = (image_folder / sample["image"]).read_bytes()
    answers = [one.of(at, scene) for one in said]
    return {"source": data_uri("jpeg", content), "caption": sample["text"], "answers": answers}


def with_twin(card: dict[str, Any], sample: dict[str, Any], scene: Facts, true: float, false: float) -> dict[str, Any]:
    """A card that also shows the twin, and the picture's cosines with the caption and with it."""
    return card | {
        "twin": marked(sample["Hallucination caption"], scene), "missed": false >= true,
        "cosine": f"{true:+.2f}", "twin_cosine": f"{false:+.2f}",
    }  # fmt: skip


def write_page(target: Path, **context: Any) -> None:
    """`report.html.j2` filled in; every text is escaped."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined)
    target.write_text(environment.get_template("report.html.j2").render(context), encoding="utf-8")
