"""Every number and the figure of the proof, from the stored answers.

    python examples/proof/report.py                          results.md and forest.png from answers.jsonl.xz
    python examples/proof/report.py --collect output/proof   put finished runs among the stored answers first

Differences are paired over seeds (`comparisons.py`).
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from comparisons import GOAL, METRICS, PRIMARY, SHOWN, USEFUL, Interval, Scores, beside, cut, scores_of, verdicts
from run_arms import REGIMES, REGIMES_OF_THE_PROOF
from stored import STAGES, STORED, Judged, finished_runs, read, write

HERE = Path(__file__).parent
CONTROLS = ("none, longer", "sham")
"""Arms that are no objective, drawn in grey."""


def missing(runs: Sequence[Judged]) -> list[str]:
    """Which blocks (a seed, all arms) are not whole, a line a regime; nothing where all are.

    A seed that one regime of the protocol has is asked of the other too.
    """
    lines = []
    have = {(run.regime, run.seed, run.arm, run.stage) for run in runs}
    of_proof = {run.seed for run in runs if run.regime in REGIMES_OF_THE_PROOF}
    for name, regime in REGIMES.items():
        seeds = of_proof if name in REGIMES_OF_THE_PROOF else {run.seed for run in runs if run.regime == name}
        gaps = []
        for seed in sorted(seeds):
            without = [a for a in regime.arms if not {(name, seed, a, stage) for stage in regime.stages} <= have]
            if without:
                gaps.append(
                    f"{seed} ({', '.join(f'`{arm}`' for arm in without) if without != [*regime.arms] else 'all'})"
                )
        if gaps:
            lines.append(
                f"`{name}` lacks runs of these arms at seed " + "; ".join(gaps) + ": cuts leave those seeds out."
            )
    return lines


def summary(scores: Scores, regime: str) -> list[str]:
    """README's table of a regime, after its last stage: `none`'s errors, and what every arm cuts of them."""
    lines = [f"| `{regime}` (seeds) | " + " | ".join(SHOWN) + " |", "| --- |" + " --- |" * len(SHOWN)]
    for arm, seeds in scores.items():
        cells = []
        for metric in SHOWN:
            change = None if arm == "none" else cut(scores, arm, "none", metric)
            values = _mean([run[metric] for run in seeds.values()]) if arm == "none" else ""
            cells.append(values if change is None else change.percent())
        lines.append(f"| {arm} ({len(seeds)}) | " + " | ".join(cells) + " |")
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
            median = f" ({statistics.median(values):.3f})" if metric in PRIMARY and len(values) > 2 else ""
            cells.append(f"{_mean(values)}{median}" if values else "")
            if metric in PRIMARY:
                change = None if arm == "none" else cut(scores, arm, "none", metric)
                cells.append("" if change is None else change.percent())
        lines.append(f"| {arm} ({len(seeds)}) | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def spreads(runs: Sequence[Judged], regime: str) -> list[str]:
    """How far the seeds lie apart, and how much of that is the sample of scenes."""
    lines = [
        "| `none`, after | metric | standard deviation over seeds | standard error of a run's scenes |",
        "|" + " --- |" * 4,
    ]
    for stage in REGIMES[regime].stages:
        mine = [run for run in runs if (run.regime, run.arm, run.stage) == (regime, "none", stage)]
        if len(mine) < 2:
            continue
        for metric in PRIMARY:
            seeds = statistics.stdev(run.metrics()[metric] for run in mine)
            scenes = statistics.fmean(run.spread_of_scenes(metric) for run in mine)
            lines.append(f"| {STAGES[stage]} | {metric} | {seeds:.4f} | {scenes:.4f} |")
    return lines if len(lines) > 2 else []


def draw(runs: Sequence[Judged], target: Path) -> None:
    """A forest plot: every arm's cut of `none`'s errors with its interval, after each of its stages; a row a regime."""
    regimes = [regime for regime in REGIMES if any(run.regime == regime for run in runs)]
    heights = [1 + 0.42 * len(scores_of(runs, regime, REGIMES[regime].stages[-1])) for regime in regimes]
    figure, axes = plt.subplots(
        len(regimes),
        len(PRIMARY),
        figsize=(11, 0.6 + sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for row, regime in zip(axes, regimes, strict=True):
        for axis, metric in zip(row, PRIMARY, strict=True):
            stages = REGIMES[regime].stages
            after = {stage: scores_of(runs, regime, stage) for stage in stages}
            last = after[stages[-1]]
            arms = [arm for arm in reversed(last) if arm != "none"]
            for at, arm in enumerate(arms):
                for offset, stage in zip((0.16, -0.16) if len(stages) > 1 else (0,), stages, strict=True):
                    if (found := cut(after[stage], arm, "none", metric)) is not None:
                        colour = "0.5" if arm in CONTROLS else "C0"
                        _draw_interval(axis, found, at + offset, colour, stage == stages[-1])
            axis.set_yticks(range(len(arms)), [f"{arm} ({len(last[arm])})" for arm in arms])
            axis.axvline(0, color="black", linewidth=0.8)
            for share, style in ((USEFUL, ":"), (GOAL, "--")):
                axis.axvline(100 * share, color="C2", linewidth=0.8, linestyle=style)
            axis.set_title(f"`{regime}`: {metric}", fontsize=10)
            axis.grid(alpha=0.3, axis="x")
    for axis in axes[-1]:
        axis.set_xlabel("% of none's that are cut (right is better)")
    figure.suptitle(
        "Hollow: after stage 1, full: at the end; bars: 95 % intervals; (seeds); grey: controls.\n"
        f"Green lines: the smallest useful cut, {USEFUL:.0%}, and the goal, {GOAL:.0%}",
        fontsize=10,
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _draw_interval(axis: plt.Axes, found: Interval, at: float, colour: str, filled: bool) -> None:
    """A cross without a bar where the interval has no bounds."""
    bounded = math.isfinite(found.high - found.low)
    if bounded:
        axis.plot([100 * found.low, 100 * found.high], [at, at], color=colour, marker="|")
    axis.plot(100 * found.mean, at, "o" if bounded else "x", color=colour, mfc=colour if filled else "white")


def report(runs: Sequence[Judged], answers: str = STORED.name) -> str:
    """results.md. Raises ValueError for runs that were scored on several splits."""
    if len(splits := {run.split for run in runs}) > 1:
        raise ValueError(f"runs were scored on the splits {', '.join(sorted(splits))}: expected a single one")
    text = [f"Made by `python examples/proof/report.py` from `{answers}`.", ""]
    text += [f"- **{name}**: {meaning}" for name, meaning in METRICS.items()]
    found = [regime for regime in REGIMES if any(run.regime == regime for run in runs)]
    last = {regime: scores_of(runs, regime, REGIMES[regime].stages[-1]) for regime in found}
    if gaps := missing(runs):
        text += ["", *gaps]
    text += ["", "The protocol's tests, after the last stage:", "", *verdicts(last)]
    text += [
        "",
        "Beside them, not tested: cuts of the base's errors after the last stage, with 95 % intervals:",
        "",
        *beside(last),
    ]
    text += [
        "",
        "After the last stage: the errors of `none`, mean ± standard deviation over seeds, and what an arm cuts",
    ]
    text += ["of them, with its 95 % interval:"]
    for regime, scores in last.items():
        text += ["", *summary(scores, regime)]
    for regime in found:
        text += ["", f"## `{regime}`", ""]
        for stage in REGIMES[regime].stages:
            mine = [run for run in runs if (run.regime, run.stage) == (regime, stage)]
            scenes = " or ".join(map(str, sorted({len(run.present) for run in mine})))
            said = f"After {STAGES[stage]}, on {scenes} scenes, mean ± standard deviation (median) over seeds:"
            text += [said, "", *table(scores_of(runs, regime, stage)), ""] if mine else []
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
    (args.output / "results.md").write_text(report(runs, args.answers.name))
    draw(runs, args.output / "forest.png")
    print((args.output / "results.md").read_text())
    print(f"{args.output / 'results.md'}, {args.output / 'forest.png'}")


if __name__ == "__main__":
    main()
