"""What the quickstart's training achieved: a table, and report.png with curves and a few scored images.

    python examples/quickstart/report.py --output output/quickstart

Reads both stages' metrics.jsonl, and scores held-out images with the exported Hugging Face model, that is, with
transformers and score.py alone.
"""

import argparse
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from score import describe, read_export, represent, true_of

ROWS = (
    ("lm loss", "language-model loss, a token"),
    ("contrastive loss", "contrastive loss"),
    ("retrieval accuracy i2t", "finds its caption among 64"),
    ("hallucination accuracy", "prefers caption to its hallucinated twin"),
    ("hallucination margin", "cosine margin of caption over twin"),
)
CURVES = ("lm loss", "contrastive loss", "retrieval accuracy i2t", "hallucination accuracy")
GOAL = 0.8
NUM_IMAGES = 4
NUM_DESCRIBED = 64


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last(rows: list[dict[str, float]], tag: str) -> float:
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


def print_table(stages: list[tuple[str, list[dict[str, float]]]]) -> None:
    """Before (first training batch) and after each stage (held-out pairs)."""
    print(f"\n{'':44}{'before':>12}" + "".join(f"{'after ' + name:>18}" for name, _ in stages))
    first = stages[0][1][0]
    for tag, label in ROWS:
        after = "".join(f"{last(rows, tag + ' validation'):18.3f}" for _, rows in stages)
        print(f"{label:44}{first[tag]:12.3f}{after}")
    print(
        "before: the first training batch; after: 512 held-out image-caption pairs, each with one hallucinated twin\n"
    )


def draw(
    stages: list[tuple[str, list[dict[str, float]]]],
    samples: list[dict[str, Any]],
    scores: list[PairScore],
    image_folder: Path,
    target: Path,
) -> None:
    """Curves of both stages above, scored images below."""
    figure = plt.figure(figsize=(10.2, 5.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    for axis, tag in zip(above.subplots(1, len(CURVES)), CURVES, strict=True):
        start = 0
        for name, rows in stages:
            iterations = [start + row["iteration"] for row in rows if tag in row]
            axis.plot(iterations, [row[tag] for row in rows if tag in row], linewidth=1, label=name)
            held_out = [
                (start + row["iteration"], row[tag + " validation"]) for row in rows if tag + " validation" in row
            ]
            axis.plot(*zip(*held_out, strict=True), "o", color="black", markersize=4)
            start += int(rows[-1]["iteration"])
        axis.set_title(tag)
        axis.set_xlabel("step (dots: held out)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis, sample, score in zip(below.subplots(1, len(samples)), samples, scores, strict=True):
        axis.imshow(Image.open(image_folder / sample["image"]), interpolation="nearest")
        axis.axis("off")
        twin = sample["Hallucination caption"]
        for line, (words, cosine, colour) in enumerate(
            ((sample["text"], score.caption, "darkgreen"), (twin, score.hallucinated, "firebrick"))
        ):
            axis.annotate(
                textwrap.fill(f"{cosine:+.2f}  {words}", 38), (0.5, 0), (0, -6 - 28 * line), "axes fraction",
                "offset points", ha="center", va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    below.suptitle("cosine of the image with its caption (green) and with the hallucinated twin (red)", fontsize=10)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--data", type=Path, help="what draw.py wrote (default: data in --output)")
    args = parser.parse_args()
    output, data = args.output, args.data or args.output / "data"
    stages = [(name, read_metrics(output / name)) for name in ("pretrain", "finetune")]
    print_table(stages)

    pairs = json.loads((data / "valid.json").read_text(encoding="utf-8"))
    samples, image_folder = pairs[:: len(pairs) // NUM_IMAGES][:NUM_IMAGES], data / "images"
    scores = score_pairs(output / "export", samples, image_folder)
    described = pairs[:NUM_DESCRIBED]
    spoken = describe(output / "export", described, image_folder)
    true = true_of(spoken, described, data)
    draw(stages, samples, scores, image_folder, output / "report.png")

    before, after = stages[0][1][0]["contrastive loss"], last(stages[0][1], "contrastive loss validation")
    accuracy = last(stages[1][1], "hallucination accuracy validation")
    print(f"Contrastive loss {before:.2f} -> {after:.2f} after pretrain (goal: at most {before / 2:.2f}).")
    print(f"Hallucination accuracy {accuracy:.2f} on held-out pairs (goal: {GOAL}; guessing gives 0.50).")
    print(f"Asked to describe {len(true)} held-out images, the exported model says something true of {sum(true)}:")
    for sample, answer, is_true in list(zip(described, spoken, true, strict=True))[:NUM_IMAGES]:
        print(f"  {sample['image']}  {'true ' if is_true else 'wrong'}  {answer}   [caption: {sample['text']}]")
    print(f"\nCurves and scored images: {output / 'report.png'}")
    print(f"All curves:               tensorboard --logdir {output}")
    name = json.loads((output / "export" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    print(f"The trained model:        {output / 'export'} (transformers' {name})")
    if after > before / 2 or accuracy < GOAL:
        raise SystemExit("The quickstart did not reach its goal: please report this with report.png")


if __name__ == "__main__":
    main()
