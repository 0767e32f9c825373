"""What the quickstart's training achieved: tables, report.png, and report.html, a page that shows all of it.

    python examples/quickstart/report.py --output output/quickstart

Reads both stages' metrics.jsonl, and puts one question about held-out pictures to the model before, after stage 1 and
after stage 2, and to what stage 1 makes without its losses on twins, where that was trained too: always exported
Hugging Face folders, read with transformers and score.py alone. The table that it prints is README.md's.
"""

import argparse
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from draw import Facts
from page import CURVES, Rows, Said, card, curve_images, percent, plot_curve, table_of, with_twin, write_page
from PIL import Image
from score import REQUEST, describe, facts_by_image, likelier, read_export, represent
from transformers.utils import logging as transformers_logging

GOAL, TRUE_GOAL = 0.9, {"LlavaForConditionalGeneration": 0.8, "Blip2ForConditionalGeneration": 0.7}
"""Of hallucination accuracy, and of the share of true descriptions."""
NUM_IMAGES, NUM_CARDS = 4, 8
NUM_DESCRIBED = 256
VARIANTS = {
    "without": ("compare/none", "compare/none/export"),
    "with the contrast": ("pretrain", "export-stage1"),
    "with the phrase loss": ("compare/phrase", "compare/phrase/export"),
}
"""What stage 1 had, and where its run and its export are."""


def read_metrics(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last(rows: Rows, tag: str) -> float:
    """The newest value of a scalar that is not logged every iteration."""
    return next(row[tag] for row in reversed(rows) if tag in row)


@dataclass(frozen=True)
class PairScore:
    """Cosine of an image with its caption and with the caption's hallucinated twin."""

    caption: float
    hallucinated: float


def score_pairs(hf_dir: Path, samples: list[dict[str, Any]], image_folder: Path) -> list[PairScore]:
    """v·t and v·u of each sample: see `represent`."""
    pairs = represent(hf_dir, samples, image_folder, read_export(hf_dir).prefix)
    right, wrong = ((pairs.images * texts).sum(-1).tolist() for texts in (pairs.captions, pairs.hallucinated))
    return [PairScore(caption=t, hallucinated=u) for t, u in zip(right, wrong, strict=True)]


def draw(
    stages: Sequence[tuple[str, Rows]],
    samples: list[dict[str, Any]],
    scores: list[PairScore],
    said: list[str],
    image_folder: Path,
    target: Path,
) -> None:
    """Curves of both stages above, scored images and what the model says of them below."""
    figure = plt.figure(figsize=(10.2, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    for axis, tag in zip(above.subplots(1, len(CURVES)), CURVES, strict=True):
        plot_curve(axis, tag, stages)
    for axis, sample, score, answer in zip(below.subplots(1, len(samples)), samples, scores, said, strict=True):
        axis.imshow(Image.open(image_folder / sample["image"]), interpolation="nearest")
        axis.axis("off")
        twin = sample["Hallucination caption"]
        for line, (words, colour) in enumerate(
            (
                (f"{score.caption:+.2f}  {sample['text']}", "darkgreen"),
                (f"{score.hallucinated:+.2f}  {twin}", "firebrick"),
                (f"It says: {answer}", "black"),
            )
        ):
            axis.annotate(
                textwrap.fill(words, 38), (0.5, 0), (0, -6 - 28 * line), "axes fraction", "offset points",
                ha="center", va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    below.suptitle("cosine of the image with its caption (green) and with the hallucinated twin (red)", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    with Image.open(buffer) as drawn:  # 256 colours are enough, and a third of the file
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def ask(when: str, hf_dir: Path, samples: list[dict[str, Any]], image_folder: Path) -> Said:
    """What the model in a Hugging Face folder says of the samples' pictures."""
    exported = read_export(hf_dir)
    return Said(when, describe(exported, samples, image_folder), likelier(exported, samples, image_folder))


def trained_scores(rows: Rows, suffix: str) -> dict[str, str]:
    """For a column of the table: what the trainer logged last (first, where `suffix` is empty)."""
    found = {}
    for tag, label in (
        ("retrieval accuracy i2t", "an image finds its caption among 64 (retrieval accuracy)"),
        ("hallucination accuracy", "a caption is preferred to its twin (hallucination accuracy)"),
        ("contrastive loss", "contrastive loss"),
        ("lm loss", "language-model loss per token"),
    ):
        values = [row[tag + suffix] for row in (reversed(rows) if suffix else rows) if tag + suffix in row]
        if values:
            found[label] = percent(values[0]) if "accuracy" in tag else f"{values[0]:.2f}"
    return found


def print_markdown(head: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """The table, as README.md has it."""
    print("\n| on held-out pictures | " + " | ".join(head) + " |")
    print("| --- |" + " --- |" * len(head))
    for label, values in rows:
        print(f"| {label} | " + " | ".join(values) + " |")
    print()


@dataclass(frozen=True)
class Shown:
    """The held-out pictures that models are asked about."""

    samples: list[dict[str, Any]]
    scenes: list[Facts]
    images: Path

    def asked(self, folders: dict[str, Path]) -> list[Said]:
        """Of the folders that exist."""
        return [ask(when, path, self.samples, self.images) for when, path in folders.items() if path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--data", type=Path, help="what draw.py wrote (default: data in --output)")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    output, data = args.output, args.data or args.output / "data"
    stages = [(name, read_metrics(output / name)) for name in ("pretrain", "finetune")]
    pairs = json.loads((data / "valid.json").read_text(encoding="utf-8"))
    facts = facts_by_image(data)
    asked_about = pairs[:NUM_DESCRIBED]
    shown = Shown(asked_about, [facts[sample["image"]] for sample in asked_about], data / "images")

    said = shown.asked(
        {"before": output / "model", "after stage 1": output / "export-stage1", "after stage 2": output / "export"}
    )
    logged = {"before": (stages[0][1], ""), "after stage 1": (stages[0][1], " validation")}
    logged["after stage 2"] = (stages[1][1], " validation")
    table = table_of([(one.when, one.scores(shown.scenes) | trained_scores(*logged[one.when])) for one in said])
    print_markdown(*table)
    compared = shown.asked({what: output / export for what, (_, export) in VARIANTS.items()})
    compared = compared if len(compared) == len(VARIANTS) else []

    cards = list(zip(shown.samples, shown.scenes, strict=True))[:NUM_CARDS]
    scores = score_pairs(output / "export", [sample for sample, _ in cards], shown.images)
    draw(
        stages, shown.samples[:NUM_IMAGES], scores[:NUM_IMAGES], said[-1].answers[:NUM_IMAGES], shown.images,
        output / "report.png",
    )  # fmt: skip

    before, after = stages[0][1][0]["contrastive loss"], last(stages[0][1], "contrastive loss validation")
    accuracy = last(stages[1][1], "hallucination accuracy validation")
    right = said[-1].right(shown.scenes)
    name = json.loads((output / "export" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    places = [
        (str(output / "export"), f"the trained model, transformers' {name}"),
        (str(output / "report.png"), "curves and scored images, as a picture"),
        (f"tensorboard --logdir {output}", "all curves"),
    ]
    write_page(
        output / "report.html",
        title="HACL on drawn pictures: what the quickstart's model learnt",
        about=ABOUT.format(name=name),
        tiles=[
            (f"{sum(right)} of {len(right)}", "held-out pictures that it describes truly"),
            (percent(accuracy), "of the captions are preferred to their hallucinated twin; guessing gives half"),
            (percent(last(stages[1][1], "retrieval accuracy i2t validation")), "of the pictures find their caption "
             "among 64"),
        ],
        learnt=f"{LEARNT} {len(right)} held-out pictures are described; the other scores are of {len(pairs)}.",
        scores=table,
        curves=curve_images(stages),
        shown=SHOWN.format(question=REQUEST, number=len(cards)),
        cards=[
            with_twin(card(sample, scene, shown.images, said, at), sample, scene, score.caption, score.hallucinated)
            for at, ((sample, scene), score) in enumerate(zip(cards, scores, strict=True))
        ],
        compared=COMPARED if compared else NOT_COMPARED,
        comparison=compared and table_of(
            [
                (
                    one.when,
                    one.scores(shown.scenes)
                    | trained_scores(read_metrics(output / VARIANTS[one.when][0]), " validation"),
                )
                for one in compared
            ]
        ),
        comparison_cards=[card(*cards[at], shown.images, compared, at) for at in range(NUM_IMAGES) if compared],
        places=places,
    )  # fmt: skip

    print(f"Contrastive loss {before:.2f} -> {after:.2f} after pretrain (goal: at most {before / 2:.2f}).")
    print(f"Hallucination accuracy {accuracy:.2f} on held-out pairs (goal: {GOAL}; guessing gives 0.50).")
    print(f"Asked to describe {len(right)} held-out images, the exported model says something true of {sum(right)}:")
    for (sample, _), answer, is_true in list(zip(cards, said[-1].answers, right, strict=False))[:NUM_IMAGES]:
        print(f"  {sample['image']}  {'true ' if is_true else 'wrong'}  {answer}   [caption: {sample['text']}]")
    print(f"\nOpen this page:   {output / 'report.html'}")
    for place, what in places:
        print(f"  {what}: {place}")
    if after > before / 2 or accuracy < GOAL or sum(right) < TRUE_GOAL[name] * len(right):
        raise SystemExit("The quickstart did not reach its goal: please report this with report.html")


ABOUT = (
    "A tiny {name} was trained on drawings of coloured shapes, whose captions have twins into which an error was "
    "written. What a drawing shows is known exactly, so that every false word can be found."
)
LEARNT = (
    "Before: the connector between vision tower and language model is random, and losses are those of the first "
    "training batch. Stage 1 trains the connector and the contrastive heads, stage 2 the language model too."
)
SHOWN = (
    "The first {number} held-out pictures, not chosen. Behind a caption and its twin stands the cosine of the picture "
    "with them. The question is “{question}”, put to the model before training, after stage 1 and after stage 2; it "
    "answers greedily. Words that are false are marked; an answer in green is true."
)
COMPARED = (
    "Stage 1 once without any loss on twins, once with HACL's contrast and once with the phrase loss, which makes the "
    "twin's differing words less likely as an answer. The rest is equal: the same start, pictures, order and steps; no "
    "stage 2. One seed each, so that differences of a few per cent say nothing. Below are the first pictures again."
)
NOT_COMPARED = (
    "Stage 1 was not trained without them: bash examples/quickstart/run.sh does it, and then writes this page again."
)


if __name__ == "__main__":
    main()
