"""The table, the verdict and the plots of the controlled world's runs.

    python examples/proof/report_arms.py --output output/proof

Reads runs/*/*/{pretrain,finetune}.json, which score_run.py wrote. Intervals are Student's t over seeds; differences are
paired: one seed has the same fresh connector, the same data order and the same stage 2 in every arm. Writes results.md,
results.json and results-REGIME.png; with --first-seed N, of the seeds from N on alone, results-from-N.md and so on.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from run_arms import ARMS, REGIMES, folder_of
from scipy.stats import t as student

METRICS = {
    "CHAIR_i": ("objects said but not there, of all said", "down"),
    "CHAIR_s": ("descriptions with such an object", "down"),
    "yes/no errors": ("wrong answers to adversarial yes/no questions", "down"),
    "cover": ("objects there that are said", "up"),
    "wholly right": ("descriptions right in every word", "up"),
    "preference accuracy sum": ("caption likelier than its twin", "up"),
}
"""By name in the scores: what it is, and where better lies."""
CLAIMED = ("CHAIR_i", "yes/no errors")
GOAL = 0.30
PAPER = """| the paper (arXiv 2312.06968) | baseline | + HACL |
| --- | --- | --- |
| LLaVA, MMHal-Bench score | 1.55 | 2.08 |
| LLaVA-1.5, MMHal-Bench score | 2.08 | 2.13 |
| MiniGPT-4, MMHal-Bench score | 1.39 | 1.80 |
| LLaVA, POPE random F1 | 66.7 | 83.8 |
| LLaVA-1.5, POPE random F1 | 87.3 | 88.7 |
"""
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval; without one where there is a single seed."""

    mean: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        mean, number = statistics.fmean(values), len(values)
        if number < 2:
            return cls(mean, float("-inf"), float("inf"), number)
        half = float(student.ppf(0.975, number - 1)) * statistics.stdev(values) / number**0.5
        return cls(mean, mean - half, mean + half, number)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, signed: bool = False) -> str:
        sign = "+" if signed else ""
        if self.number < 2:
            return f"{self.mean:{sign}.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def read_runs(output: Path, regime: str, stage: str, first_seed: int = 0) -> dict[str, dict[int, dict[str, float]]]:
    """Scores by arm and seed, of the runs that are finished, of the seeds from `first_seed` on."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for arm in ARMS:
        for path in sorted(folder_of(output, regime, arm, 0).parent.glob(f"*/{stage}.json")):
            seed = int(path.parent.name.rsplit("-", 1)[1])
            if seed >= first_seed and path.parent == folder_of(output, regime, arm, seed):
                runs.setdefault(arm, {})[seed] = json.loads(path.read_text())["scores"]
    return runs


def differences(
    runs: Mapping[str, Mapping[int, Scores]], arm: str, base: str, metric: str, *, relative: bool
) -> Interval | None:
    """arm − base by seed, in shares of the base's mean where `relative`; None where no seed has both."""
    seeds = sorted(runs.get(arm, {}).keys() & runs.get(base, {}).keys())
    seeds = [seed for seed in seeds if metric in runs[arm][seed] and metric in runs[base][seed]]
    if not seeds:
        return None
    scale = statistics.fmean(runs[base][seed][metric] for seed in seeds) if relative else 1.0
    if scale == 0:
        return None
    return Interval.of([(runs[arm][seed][metric] - runs[base][seed][metric]) / scale for seed in seeds])


def table(runs: Mapping[str, Mapping[int, Scores]]) -> str:
    """Means with intervals; below each the paired difference from `none`."""
    heads = [f"{arm} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for arm, seeds in runs.items()]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(runs)]
    for metric, (meaning, better) in METRICS.items():
        cells, changes = [], []
        for arm, seeds in runs.items():
            values = [scores[metric] for scores in seeds.values() if metric in scores]
            cells.append(Interval.of(values).text() if values else "")
            change = None if arm == "none" else differences(runs, arm, "none", metric, relative=False)
            changes.append("" if change is None else change.text(signed=True) + (" *" if change.excludes_zero else ""))
        lines.append(f"| **{metric}** ({better}): {meaning} | " + " | ".join(cells) + " |")
        lines.append("| difference from none | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def verdict(runs: Mapping[str, Mapping[int, Scores]]) -> list[str]:
    """One sentence a claim and arm: how much is cut, against `none` and plain contrast, and whether the claim holds."""
    lines = []
    for metric in CLAIMED:
        for arm in runs:
            if arm == "none":
                continue
            change = differences(runs, arm, "none", metric, relative=True)
            if change is None:
                continue
            if change.number < 2:
                lines.append(f"{metric}: {arm} cuts {-change.mean:+.0%} of none's at one seed, which tells nothing.")
                continue
            cut = Interval(-change.mean, -change.high, -change.low, change.number)
            text = f"{metric}: {arm} cuts {cut.mean:+.0%} [{cut.low:+.0%}, {cut.high:+.0%}] of none's"
            text += f" over {cut.number} paired seeds: "
            if cut.low > 0:
                reached = "at least" if cut.mean >= GOAL else "less than"
                text += f"{reached} {GOAL:.0%}, interval above 0"
            else:
                text += "worse than none" if cut.high < 0 else "not told from 0"
            beside = differences(runs, arm, "contrastive", metric, relative=True)
            if arm.startswith("HACL") and beside is not None and beside.number > 1:
                relation = "better" if beside.high < 0 else "worse" if beside.low > 0 else "not told apart"
                text += (
                    f"; against contrastive {-beside.mean:+.0%} [{-beside.high:+.0%}, {-beside.low:+.0%}]: {relation}"
                )
            lines.append(text + ".")
    return lines


def draw(output: Path, regime: str, stages: Mapping[str, Mapping[str, Mapping[int, Scores]]], target: Path) -> None:
    """Above: stage 1's curves, means over seeds. Below: both claims after each stage, every seed a dot."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    runs = stages["finetune"] or stages["pretrain"]
    for axis, tag in zip(axes[0], ("lm loss", "contrastive loss"), strict=True):
        for number, (arm, seeds) in enumerate(runs.items()):
            rows = [
                [
                    json.loads(line)
                    for line in (folder_of(output, regime, arm, seed) / "pretrain" / "metrics.jsonl").open()
                ]
                for seed in seeds
            ]
            means = [
                statistics.fmean(row[tag] for row in step)
                for step in zip(*rows, strict=True)
                if all(tag in row for row in step)
            ]
            if means:
                axis.plot(range(1, len(means) + 1), means, linewidth=1, color=f"C{number}", label=arm)
        axis.set_title(f"stage 1: {tag}, mean over seeds")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:  # `none` alone has no contrastive loss
            axis.legend(fontsize=8)
    for axis, metric in zip(axes[1], CLAIMED, strict=True):
        for offset, (stage, scored) in zip((-0.15, 0.15), stages.items(), strict=True):
            for number, seeds in enumerate(scored.values()):
                values = [scores[metric] for scores in seeds.values()]
                interval = Interval.of(values)
                filled = f"C{number}" if stage == "finetune" else "white"
                axis.plot([number + offset] * len(values), values, ".", color=f"C{number}", alpha=0.5)
                error = (interval.high - interval.low) / 2 if interval.number > 1 else 0
                axis.errorbar(
                    number + offset,
                    interval.mean,
                    error,
                    fmt="o",
                    color=f"C{number}",
                    markerfacecolor=filled,
                    capsize=4,
                )
        axis.set_xticks(range(len(runs)), list(runs), fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{metric}: after stage 1 (hollow) and 2 (full); lower is better")
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def section(output: Path, regime: str, first_seed: int, name: str) -> tuple[list[str], dict[str, Any]]:
    """(lines, numbers) of one regime, its plot as NAME-REGIME.png; nothing where no run of it is finished."""
    stages = {stage: read_runs(output, regime, stage, first_seed) for stage in ("pretrain", "finetune")}
    runs = stages["finetune"]
    if not runs:
        return [], {}
    text = [f"## Regime `{regime}`", ""]
    text += [
        "After stage 2, held-out scenes; mean over seeds [95 % interval]; *: the difference excludes 0.",
        "",
        table(runs),
    ]
    text += ["", "After stage 1, before the language model has trained:", "", table(stages["pretrain"]), ""]
    conclusions = {stage: verdict(scored) for stage, scored in stages.items()}
    text += ["The claim, after stage 2:", "", *(f"- {line}" for line in conclusions["finetune"]), ""]
    text += ["The same after stage 1:", "", *(f"- {line}" for line in conclusions["pretrain"]), ""]
    draw(output, regime, stages, output / f"{name}-{regime}.png")
    changes = {
        arm: {
            metric: asdict(change)
            for metric in METRICS
            if (change := differences(runs, arm, "none", metric, relative=False)) is not None
        }
        for arm in runs
        if arm != "none"
    }
    return text, {"runs": stages, "verdict": conclusions, "changes from none": changes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/proof"))
    parser.add_argument("--first-seed", type=int, default=0, help="leave out the seeds before")
    args = parser.parse_args()
    output, name = args.output, f"results-from-{args.first_seed}" if args.first_seed else "results"
    sections = {regime: section(output, regime, args.first_seed, name) for regime in REGIMES}
    text = [line for lines, _ in sections.values() for line in lines]
    if not text:
        raise SystemExit(f"no finished run in {output / 'runs'}: run examples/proof/run_arms.py first")
    text.append(PAPER)
    (output / f"{name}.md").write_text("\n".join(text))
    numbers = {regime: values for regime, (_, values) in sections.items() if values}
    (output / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n".join(text))
    print(f"{output / name}.md, {output / name}.json, {output / name}-*.png")


if __name__ == "__main__":
    main()
