"""Scores the runs of losses.sh on the held-out pictures, all in the same way.

python examples/quickstart/losses.py --data output/quickstart/data --runs output/quickstart/losses

prefers its caption   share of held-out pictures whose caption is likelier than its twin, as the trainer found it
hallucinated          of the objects (a colour and a shape) that the exported model names when it is asked to
                      describe a picture, the share that the picture does not show; CHAIR_i on drawings
named                 such objects a description
lm loss               of the language model on the held-out pictures
gradient              median over a run's steps of its norm
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from draw import COLOURS, SHAPES
from report import read_metrics
from score import describe, read_export

LOSSES = ("none", "hacl", "phrase")
_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:s|es)?\b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/quickstart/data"))
    parser.add_argument("--runs", type=Path, default=Path("output/quickstart/losses"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    samples = json.loads((args.data / "valid.json").read_text(encoding="utf-8"))
    lines = (args.data / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    shown = {
        scene["image"]: {(thing["colour"], thing["shape"]) for thing in scene["things"]}
        for scene in map(json.loads, lines)
    }

    print(f"\n{'loss':8}{'prefers its caption':>34}{'hallucinated':>34}{'named':>10}{'lm loss':>10}{'gradient':>10}")
    for loss in LOSSES:
        prefers, wrong, named, losses, gradients = [], [], [], [], []
        for seed in args.seeds:
            run = args.runs / f"{loss}-{seed}"
            rows = read_metrics(run)
            prefers.append(rows[-1]["preference accuracy sum validation"])
            losses.append(rows[-1]["lm loss validation"])
            gradients.append(statistics.median(row["grad-norm"] for row in rows))
            answers = describe(read_export(run / "export"), samples, args.data / "images")
            found = [set(_OBJECT.findall(answer)) for answer in answers]
            total = sum(map(len, found))
            hallucinated = sum(
                len(objects - shown[sample["image"]]) for sample, objects in zip(samples, found, strict=True)
            )
            wrong.append(hallucinated / max(total, 1))
            named.append(total / len(samples))
        means = f"{statistics.mean(named):10.2f}{statistics.mean(losses):10.3f}{statistics.mean(gradients):10.2f}"
        print(f"{loss:8}{_shown(prefers):>34}{_shown(wrong):>34}{means}", flush=True)
    print(f"{len(samples)} held-out pictures; each seed's, and their mean.")


def _shown(values: list[float]) -> str:
    return f"{', '.join(f'{value:.1%}' for value in values)} ({statistics.mean(values):.1%})"


if __name__ == "__main__":
    main()
