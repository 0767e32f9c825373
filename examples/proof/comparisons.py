"""Which differences between arms are told from chance: paired over seeds, for one seed has the same fresh connector,
the same order of the data and the same other stages in every arm.

A *cut* is the share of the base's mean error that an arm lacks. Its interval is Fieller's (1954): all c for which
a paired t-test does not reject that the arm's error is 1 - c of the base's. Equivalence is shown by two one-sided such
tests (TOST). The protocol's tests share 5 % by Holm's method (1979).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from run_arms import ARMS
from scipy import stats
from stored import Judged

METRICS = {
    "wrong facts": "things said but not there and things there but not said, of all that are there",
    "yes/no errors": "wrong answers to adversarial yes/no questions",
    "said falsely": "things said but not there, of all that are there",
    "cover": "things there that are said (wrong facts = said falsely + 1 − cover)",
    "wrong yes": "questions answered otherwise than No whose answer is No",
    "wrong no": "questions answered otherwise than Yes whose answer is Yes",
    "CHAIR_i": "things said but not there, of all said",
    "preference accuracy sum": "captions likelier than their twins",
    "retrieval hallucination accuracy": "captions nearer to their images than their twins, at </s>",
    "lm loss": "of held-out captions, by the trainer",
}
PRIMARY = ("wrong facts", "yes/no errors")
SHOWN = (*PRIMARY, "said falsely")
"""In the tables over all arms: what is left unsaid is most of the wrong facts, and no twin leaves anything out."""
USEFUL = 0.10
"""The smallest cut of an error that would be useful."""
EQUIVALENT = 0.15
GOAL = 0.30
"""Of the errors of `none`."""
LEVEL = 0.05
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""By arm, seed and metric."""


@dataclass(frozen=True)
class Comparison:
    """How does `arm` compare with `base` in a metric, after the last stage?"""

    question: str
    regime: str
    arm: str
    base: str
    metric: str = "wrong facts"
    equivalence: bool = False
    """Whether it asks if the two are equivalent, and otherwise if they differ."""


TESTS: tuple[Comparison, ...] = (
    Comparison("Does phrase make fewer errors than training without it?", "habit", "phrase", "none"),
    Comparison("Does HACL make fewer errors than a sham contrast?", "habit", "HACL own", "sham"),
    Comparison("Do twins add nothing to the contrast?", "habit", "HACL own", "contrastive", equivalence=True),
    Comparison(
        "After stage 2: does phrase add nothing to the true answers?", "after", "phrase", "none", equivalence=True
    ),
)
"""The protocol's, at most four."""
BESIDE: tuple[Comparison, ...] = (
    Comparison("HACL, against training without it", "habit", "HACL own", "none"),
    Comparison("the sham, against training without it", "habit", "sham", "none"),
    Comparison("dpo, against training without it", "habit", "dpo", "none"),
    Comparison("HACL, against none with half as many steps again", "habit", "HACL own", "none, longer"),
    Comparison("dpo, against none with half as many steps again", "habit", "dpo", "none, longer"),
    Comparison("HACL with heavy twins, against the contrast without twins", "habit", "HACL dosed", "contrastive"),
    Comparison("phrase beside HACL, against HACL", "habit", "HACL + phrase", "HACL own"),
    Comparison("after stage 2: dpo, against the true answers alone", "after", "dpo", "none"),
    Comparison(
        "after stage 2: phrase, against the true answers for half as many steps again",
        "after",
        "phrase",
        "none, longer",
    ),
    Comparison(
        "after stage 2: dpo, against the true answers for half as many steps again", "after", "dpo", "none, longer"
    ),
)
"""What a reader asks besides: shown with intervals, not tested."""


@dataclass(frozen=True)
class Interval:
    """A cut and its 95 % confidence interval, over so many seeds; of one seed the interval is without bounds."""

    mean: float
    low: float
    high: float
    number: int

    def percent(self) -> str:
        inside = f" [{self.low:+.0%}, {self.high:+.0%}]" if math.isfinite(self.high - self.low) else " [no bounds]"
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


def fieller(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The interval of 1 - mean(ours) / mean(theirs), for paired values.

    Its bounds are the two shares at which a paired t-test of `ours` against (1 - share) `theirs` has p = level; the
    interval has none where the mean of `theirs` cannot itself be told from 0.
    """
    number = len(ours)
    if number < 2:
        return -math.inf, math.inf
    a, b = statistics.fmean(ours), statistics.fmean(theirs)
    wide = float(stats.t.ppf(1 - level / 2, number - 1)) ** 2 / number
    square = b * b - wide * statistics.variance(theirs)
    middle = a * b - wide * statistics.covariance(ours, theirs)
    root = middle**2 - square * (a * a - wide * statistics.variance(ours))
    if square <= 0 or root < 0:
        return -math.inf, math.inf
    return 1 - (middle + root**0.5) / square, 1 - (middle - root**0.5) / square


def cut(scores: Scores, arm: str, base: str, metric: str) -> Interval | None:
    """How much less the arm has than the base, in shares of the base's mean; None where no seed has both."""
    ours, theirs = paired(scores, arm, base, metric)
    if not ours or not statistics.fmean(theirs):
        return None
    return Interval(1 - statistics.fmean(ours) / statistics.fmean(theirs), *fieller(ours, theirs), len(ours))


def p_value(asked: Comparison, scores: Scores) -> float | None:
    """Of a difference: the two-sided paired t-test. Of equivalence: TOST, the larger p of two one-sided ones.

    The latter's are of the arm's error less 1 ± EQUIVALENT times the base's at the same seed, so that what varies in
    the base is counted.
    """
    ours, theirs = paired(scores, asked.arm, asked.base, asked.metric)
    if len(ours) < 2:
        return None
    if not asked.equivalence:
        return float(stats.ttest_rel(ours, theirs).pvalue)
    least, most = ([share * value for value in theirs] for share in (1 - EQUIVALENT, 1 + EQUIVALENT))
    above = stats.ttest_rel(ours, least, alternative="greater").pvalue
    below = stats.ttest_rel(ours, most, alternative="less").pvalue
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
    """A line a test: the cut with its interval, Holm's p, and what it says.

    A test whose runs are missing, or whose arms are the same at every seed, counts among Holm's as one with p = 1.

    Args:
        regimes: scores after the last stage.
    """
    p_values = [p_value(test, regimes.get(test.regime, {})) for test in TESTS]
    adjusted = holm([1.0 if p is None or math.isnan(p) else p for p in p_values])  # NaN: not a seed differs
    lines = ["| question | cut [95 %] | seeds | p (Holm) | answer |", "| --- | --- | --- | --- | --- |"]
    for test, known, p in zip(TESTS, p_values, adjusted, strict=True):
        if known is None:
            lines.append(f"| {test.question} | | 0 | | not run |")
            continue
        found = cut(regimes[test.regime], test.arm, test.base, test.metric)
        answer = _answer(test, found, p).replace("%", " %")
        lines.append(f"| {test.question} | {found.percent()} | {found.number} | {p:.2g} | {answer} |")
    return lines


def _answer(test: Comparison, found: Interval, p: float) -> str:
    if test.equivalence:
        return f"equivalent within ±{EQUIVALENT:.0%}" if p < LEVEL else "not shown"
    if p >= LEVEL:
        return "not told from 0" + (f", and less than a useful {USEFUL:.0%}" if found.high < USEFUL else "")
    if found.mean < 0:
        return "**more errors**"
    small = f", and {'perhaps ' * (found.high >= USEFUL)}less than a useful {USEFUL:.0%}" * (found.low < USEFUL)
    if test.base != "none":
        return f"yes{small}"
    goal = "reaches" if found.mean >= GOAL else "is below"
    return f"yes; the estimate {goal} the goal of {GOAL:.0%}{small}"


def beside(regimes: Mapping[str, Scores]) -> list[str]:
    """BESIDE as a table, a row a comparison and a column each of SHOWN, from scores after the last stage.

    With each, the seeds at which the arm has fewer errors, for a mean may be a few seeds'.
    """
    lines = [
        "| arm, base | " + " | ".join(f"{one}, seeds better" for one in SHOWN) + " |",
        "| --- |" + " --- |" * len(SHOWN),
    ]
    for asked in BESIDE:
        cells = []
        for metric in SHOWN:
            scores = regimes.get(asked.regime, {})
            ours, theirs = paired(scores, asked.arm, asked.base, metric)
            found = cut(scores, asked.arm, asked.base, metric)
            better = sum(a < b for a, b in zip(ours, theirs, strict=True))
            cells.append("" if found is None else f"{found.percent()}, {better} of {len(ours)}")
        if any(cells):
            lines.append(f"| {asked.question} | " + " | ".join(cells) + " |")
    return lines
