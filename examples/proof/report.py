"""Every number and the figure of the proof, from the stored answers.

    python examples/proof/report.py                          results.md and forest.png from answers.jsonl.xz
    python examples/proof/report.py --collect output/proof   put finished runs among the stored answers first

Differences are paired: one seed has the same fresh connector, the same order of the data and the same stage 2 in every
arm. Intervals are Student's over seeds, of the paired difference in shares of the base's mean. Equivalence is shown by
two one-sided tests (TOST). The protocol's tests share 5 % by Holm's method.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from run_arms import ARMS, REGIMES
from scipy import stats
from stored import STAGES, STORED, Judged, finished_runs, read, write

HERE = Path(__file__).parent
METRICS = {
    "wrong facts": "things said but not there and things there but not said, of all that are there",
    "yes/no errors": "wrong answers to adversarial yes/no questions",
    "CHAIR_i": "things said but not there, of all said",
    "cover": "things there that are said",
    "preference accuracy sum": "captions likelier than their twins",
    "retrieval hallucination accuracy": "captions nearer to their images than their twins, at </s>",
    "lm loss": "of held-out captions, by the trainer",
}
PRIMARY = ("wrong facts", "yes/no errors")
USEFUL = 0.10
"""The smallest cut of an error that would be useful."""
EQUIVALENT = 0.15
GOAL = 0.30
LEVEL = 0.05
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""By arm, seed and metric."""


@dataclass(frozen=True)
class Test:
    """One question of the protocol: does `arm` differ from `base`, or is it equivalent to it, in a metric?"""

    question: str
    regime: str
    arm: str
    base: str
    metric: str = "wrong facts"
    equivalence: bool = False


TESTS: tuple[Test, ...] = (
    Test("Does phrase make fewer errors than training without it?", "habit", "phrase", "none"),
    Test("Does HACL make fewer errors than a sham contrast?", "habit", "HACL own", "sham"),
    Test("Do twins add nothing to the contrast?", "habit", "HACL own", "contrastive", equivalence=True),
    Test("After three passes: is HACL no more than training without it?", "long", "HACL own", "none", equivalence=True),
)
"""At most four, after stage 2."""


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
        half = float(stats.t.ppf(0.975, number - 1)) * statistics.stdev(values) / number**0.5
        return cls(mean, mean - half, mean + half, number)

    def percent(self) -> str:
        inside = "" if self.number < 2 else f" [{self.low:+.0%}, {self.high:+.0%}]"
        return f"{self.mean:+.0%}{inside}".replace("%", " %").replace("-", "−")


def scores_of(runs: Sequence[Judged], regime: str, stage: str) -> Scores:
    """By arm (in the order of ARMS), seed and metric."""
    chosen = [run for run in runs if (run.regime, run.stage) == (regime, stage)]
    return {
        arm: {run.seed: run.metrics() for run in chosen if run.arm == arm}
        for arm in ARMS
        if any(run.arm == arm for run in chosen)
    }


def paired(scores: Scores, arm: str, base: str, metric: str) -> tuple[list[float], list[float]]:
    """The metric of both arms at the seeds that both have, in order of the seeds."""
    seeds = sorted(scores.get(arm, {}).keys() & scores.get(base, {}).keys())
    seeds = [seed for seed in seeds if metric in scores[arm][seed] and metric in scores[base][seed]]
    return [scores[arm][seed][metric] for seed in seeds], [scores[base][seed][metric] for seed in seeds]


def cut(scores: Scores, arm: str, base: str, metric: str) -> Interval | None:
    """How much less the arm has than the base, in shares of the base's mean; None where no seed has both."""
    ours, theirs = paired(scores, arm, base, metric)
    if not ours or not (scale := statistics.fmean(theirs)):
        return None
    return Interval.of([(b - a) / scale for a, b in zip(ours, theirs, strict=True)])


def p_value(test: Test, scores: Scores) -> float | None:
    """Of superiority: the two-sided paired t-test against 0. Of equivalence: TOST, both one-sided tests' larger p."""
    ours, theirs = paired(scores, test.arm, test.base, test.metric)
    if len(ours) < 2:
        return None
    scale = statistics.fmean(theirs)
    shares = [(b - a) / scale for a, b in zip(ours, theirs, strict=True)]
    if not test.equivalence:
        return float(stats.ttest_1samp(shares, 0.0).pvalue)
    above = stats.ttest_1samp(shares, -EQUIVALENT, alternative="greater").pvalue
    below = stats.ttest_1samp(shares, EQUIVALENT, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def verdicts(regimes: Mapping[str, Scores]) -> list[str]:
    """A line a test: the cut with its interval, Holm's p, and what it says. Args: scores after stage 2 by regime."""
    asked = [(test, p) for test in TESTS if (p := p_value(test, regimes.get(test.regime, {}))) is not None]
    lines = ["| question | cut [95 %] | seeds | p (Holm) | answer |", "| --- | --- | --- | --- | --- |"]
    for (test, _), p in zip(asked, holm([p for _, p in asked]), strict=True):
        found = cut(regimes[test.regime], test.arm, test.base, test.metric)
        if test.equivalence:
            answer = f"equivalent within ±{EQUIVALENT:.0%}" if p < LEVEL else "not shown"
        elif p >= LEVEL:
            answer = "not told from 0"
        elif found.mean < 0:
            answer = "**more errors**"
        else:
            size = f"at least {GOAL:.0%}" if found.mean >= GOAL else f"less than {GOAL:.0%}"
            answer = f"yes; {size}" + ("" if found.low >= USEFUL else f", and perhaps less than a useful {USEFUL:.0%}")
        lines.append(
            f"| {test.question} | {found.percent()} | {found.number} | {p:.2g} | {answer.replace('%', ' %')} |"
        )
    return lines


def table(scores: Scores, metrics: Sequence[str] = tuple(METRICS)) -> list[str]:
    """A row an arm: means and standard deviations over seeds; beside each primary, its median and the cut of `none`'s.

    The median, for a few bad seeds may carry a mean.
    """
    metrics = [one for one in metrics if any(one in run for seeds in scores.values() for run in seeds.values())]
    heads = [
        f"{one}, cut of none's" if extra else one for one in metrics for extra in ([0, 1] if one in PRIMARY else [0])
    ]
    lines = ["| arm (seeds) | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for arm, seeds in scores.items():
        cells = []
        for metric in metrics:
            values = [run[metric] for run in seeds.values() if metric in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            if metric in PRIMARY and len(values) > 2:
                spread += f" ({statistics.median(values):.3f})"
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
            if metric in PRIMARY:
                change = None if arm == "none" else cut(scores, arm, "none", metric)
                cells.append("" if change is None else change.percent())
        lines.append(f"| {arm} ({len(seeds)}) | " + " | ".join(cells) + " |")
    return lines


def spreads(runs: Sequence[Judged], regime: str) -> list[str]:
    """How far the seeds lie apart, and how much of that is the sample of scenes."""
    lines = [
        "| `none`, after | metric | standard deviation over seeds | standard error of a run's scenes |",
        "|" + " --- |" * 4,
    ]
    for stage in STAGES:
        mine = [run for run in runs if (run.regime, run.arm, run.stage) == (regime, "none", stage)]
        if len(mine) < 2:
            continue
        for metric in PRIMARY:
            seeds = statistics.stdev(run.metrics()[metric] for run in mine)
            scenes = statistics.fmean(run.spread_of_scenes(metric) for run in mine)
            lines.append(f"| stage {1 + STAGES.index(stage)} | {metric} | {seeds:.4f} | {scenes:.4f} |")
    return lines if len(lines) > 2 else []


def draw(runs: Sequence[Judged], target: Path) -> None:
    """A forest plot: every arm's cut of `none`'s errors with its interval, after both stages; a row a regime."""
    regimes = [regime for regime in REGIMES if any(run.regime == regime for run in runs)]
    figure, axes = plt.subplots(
        len(regimes), len(PRIMARY), figsize=(11, 0.9 + 3.4 * len(regimes)), layout="constrained", squeeze=False
    )
    for row, regime in zip(axes, regimes, strict=True):
        for axis, metric in zip(row, PRIMARY, strict=True):
            arms = [arm for arm in scores_of(runs, regime, "finetune") if arm != "none"]
            for offset, stage, face in ((0.16, "pretrain", "white"), (-0.16, "finetune", "C0")):
                scores = scores_of(runs, regime, stage)
                for at, arm in enumerate(reversed(arms)):
                    if (found := cut(scores, arm, "none", metric)) is None:
                        continue
                    half = 0 if found.number < 2 else 100 * (found.high - found.mean)
                    axis.errorbar(
                        100 * found.mean, at + offset, xerr=half, fmt="o", color="C0", markerfacecolor=face, capsize=3
                    )
            axis.set_yticks(range(len(arms)), list(reversed(arms)))
            axis.axvline(0, color="black", linewidth=0.8)
            axis.axvline(100 * GOAL, color="C2", linewidth=0.8, linestyle="--")
            axis.set_xlabel("% of none's that are cut (right is better; dashed: the goal)")
            axis.set_title(f"`{regime}`: {metric}; hollow: after stage 1, full: after stage 2", fontsize=10)
            axis.grid(alpha=0.3, axis="x")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def report(runs: Sequence[Judged]) -> str:
    """results.md."""
    text = ["Made by `python examples/proof/report.py` from `answers.jsonl.xz`.", ""]
    text += [f"- **{name}**: {meaning}" for name, meaning in METRICS.items()]
    found = [regime for regime in REGIMES if any(run.regime == regime for run in runs)]
    tests = verdicts({regime: scores_of(runs, regime, "finetune") for regime in found})
    text += ["", "The protocol's tests, after stage 2:", "", *tests]
    for regime in found:
        after = {stage: scores_of(runs, regime, stage) for stage in STAGES}
        scenes = sorted({len(run.present) for run in runs if run.regime == regime and run.stage == "finetune"})
        text += ["", f"## `{regime}`, {' or '.join(map(str, scenes))} scenes", ""]
        for number, stage in enumerate(STAGES, 1):
            said = f"After stage {number}, mean ± standard deviation (median) over seeds:"
            text += [said, "", *table(after[stage]), ""]
        text += spreads(runs, regime)
    return "\n".join(text).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, default=STORED, help="the stored answers")
    parser.add_argument("--collect", type=Path, help="run_arms.py's --output, whose finished runs are stored first")
    parser.add_argument("--output", type=Path, default=HERE, help="where results.md and forest.png go")
    args = parser.parse_args()
    runs = read(args.answers)
    if args.collect:
        known = {(run.regime, run.arm, run.seed, run.stage) for run in runs}
        found = list(finished_runs(args.collect, known))
        runs += found
        write(runs, args.answers)
        left = len([*(args.collect / "runs").glob("*/*/*.json")]) - len(found)
        stay = f"; {left} were stored already and stay as they are" if left else ""
        print(f"{len(found)} stages of runs added to {args.answers}, which has {len(runs)} now{stay}")
    if not runs:
        raise SystemExit(f"{args.answers} holds no run: run examples/proof/run_arms.py, then this with --collect")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(report(runs))
    draw(runs, args.output / "forest.png")
    print((args.output / "results.md").read_text())
    print(f"{args.output / 'results.md'}, {args.output / 'forest.png'}")


if __name__ == "__main__":
    main()
