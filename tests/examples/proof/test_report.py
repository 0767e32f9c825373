"""The report of examples/proof, the answers it is made from, and the children that run the arms."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from tests.examples.proof import PROOF
from tests.warm import run_warm


@pytest.fixture(scope="module")
def comparisons(scripts_on_path: None) -> ModuleType:
    return importlib.import_module("comparisons")


BASE, ARM = [0.30, 0.28, 0.33, 0.25, 0.31], [0.20, 0.21, 0.19, 0.18, 0.22]


def by_seed(values: list[float]) -> dict[int, dict[str, float]]:
    return {seed: {"wrong facts": value} for seed, value in enumerate(values)}


@pytest.mark.parametrize("arm", [ARM, [0.28, 0.30, 0.33, 0.22, 0.35], [0.5, 0.28, 0.6, 0.2, 0.9]])
def test_a_cuts_bounds_are_where_a_paired_t_test_begins_to_reject(comparisons: ModuleType, arm: list[float]) -> None:
    """Catches a wrong root, sign or degree of freedom of Fieller's interval."""
    found = comparisons.cut({"none": by_seed(BASE), "phrase": by_seed(arm)}, "phrase", "none", "wrong facts")

    assert found.mean == pytest.approx(1 - sum(arm) / sum(BASE))
    assert found.low < found.mean < found.high
    for bound in (found.low, found.high):
        assert stats.ttest_rel(arm, [(1 - bound) * value for value in BASE]).pvalue == pytest.approx(0.05)
    reversed_seeds = comparisons.cut(
        {"none": by_seed(BASE), "phrase": dict(reversed(by_seed(arm).items()))}, "phrase", "none", "wrong facts"
    )
    assert reversed_seeds == found  # paired by seed, whatever the order


def test_what_too_few_or_too_wild_seeds_cannot_bound_has_no_bounds(comparisons: ModuleType) -> None:
    cut, inf = comparisons.cut, float("inf")
    lonely = {"none": by_seed(BASE), "phrase": {7: {"wrong facts": 0.1}}}
    assert cut(lonely, "phrase", "none", "wrong facts") is None  # no seed that both have
    single = cut({"none": by_seed(BASE), "phrase": by_seed([0.15])}, "phrase", "none", "wrong facts")
    assert (single.mean, single.low, single.high, single.number) == (0.5, -inf, inf, 1)
    assert comparisons.fieller([0.1, 0.1, 0.1], [0.01, 0.9, 0.02]) == (-inf, inf)  # a base that may be 0


def test_a_difference_is_a_paired_t_test(comparisons: ModuleType) -> None:
    expected = stats.ttest_rel(BASE, ARM).pvalue
    scores = {"none": by_seed(BASE), "phrase": by_seed(ARM)}
    assert comparisons.p_value(comparisons.TESTS[0], scores) == pytest.approx(expected)
    assert comparisons.p_value(comparisons.TESTS[0], {"none": by_seed(BASE)}) is None


@pytest.mark.parametrize("shift", [-0.06, -0.02, 0.0, 0.01, 0.05])
def test_equivalence_is_shown_where_the_interval_lies_within_its_bounds(comparisons: ModuleType, shift: float) -> None:
    """The textbook's other form, the interval of 90 %, of two tests at 5 %: catches a swapped side or bound."""
    arm = [value + shift + wobble for value, wobble in zip(BASE, (0.01, -0.01, 0.02, -0.02, 0.0), strict=True)]
    test = comparisons.Comparison("", "habit", "HACL own", "contrastive", equivalence=True)
    p = comparisons.p_value(test, {"contrastive": by_seed(BASE), "HACL own": by_seed(arm)})
    low, high = comparisons.fieller(arm, BASE, 0.10)
    assert (p < comparisons.LEVEL) == (max(-low, high) < comparisons.EQUIVALENT)
    assert (p < comparisons.LEVEL) == (abs(shift) <= 0.02)


def test_several_tests_share_one_level_as_holm_has_it(comparisons: ModuleType) -> None:
    holm = comparisons.holm

    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R's p.adjust
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_say_what_is_shown_and_what_is_not(comparisons: ModuleType) -> None:
    def lines(arm: list[float]) -> list[str]:
        scores = {"none": by_seed(BASE), "phrase": by_seed(arm), "HACL own": by_seed(arm), "sham": by_seed(BASE)}
        return comparisons.verdicts({"habit": scores})[2:]

    def answer(arm: list[float], number: int = 0) -> str:
        return lines(arm)[number].split(" | ")[-1]

    assert answer(ARM) == "yes; the estimate reaches the goal of 30 % |"
    assert answer(ARM, 1) == "yes |"  # the goal is of none's errors, not of the sham's
    fewer = [value * 0.9 - wobble for value, wobble in zip(BASE, (0.01, -0.01, 0.0, 0.005, 0.0), strict=True)]
    assert answer(fewer) == ("yes; the estimate is below the goal of 30 %, and perhaps less than a useful 10 % |")
    assert answer([value * 1.2 + 0.001 * at for at, value in enumerate(BASE)]) == "**more errors** |"
    assert answer([0.1, 0.4, 0.3, 0.2, 0.35]) == "not told from 0 |"
    little = [value * 0.98 - wobble for value, wobble in zip(BASE, (0.001, -0.001, 0.0, 0.0, 0.0), strict=True)]
    assert answer(little) == "yes; the estimate is below the goal of 30 %, and less than a useful 10 % |"
    none_at_all = [value + wobble for value, wobble in zip(BASE, (0.01, -0.01, 0.005, -0.005, 0.0), strict=True)]
    assert answer(none_at_all) == "not told from 0, and less than a useful 10 % |"
    # Two of the four tests have not been run: they count in Holm's correction none the less.
    p = stats.ttest_rel(BASE, ARM).pvalue
    assert lines(ARM)[0].split(" | ")[3] == f"{4 * p:.2g}"
    assert lines(ARM)[2].endswith("| 0 | | not run |") and lines(ARM)[3].endswith("| 0 | | not run |")


def test_what_is_shown_beside_the_tests_counts_the_seeds(comparisons: ModuleType) -> None:
    scores = {"none": by_seed(BASE), "HACL own": by_seed([*ARM[:4], 0.4])}
    (line,) = comparisons.beside({"habit": scores})[2:]
    assert line.startswith("| HACL, against training without it | +20 % [") and "4 of 5 |" in line


FORKING = """
import os, sys
from pathlib import Path
from forks import call, call_all

def fail():
    print("what went wrong")
    raise ValueError("so it is")

def leave(path):
    (Path(path) / str(os.getpid())).touch()

log = Path(sys.argv[1]) / "log"
call(lambda: print("said"), log)
try:
    call(fail, log)
except RuntimeError as error:
    assert "ValueError: so it is" in str(error) and "status 1" in str(error), error
assert log.read_text().split()[:4] == ["said", "what", "went", "wrong"], log.read_text()
folder = Path(sys.argv[1]) / "left"
folder.mkdir()
assert call_all([lambda: leave(folder), lambda: sys.exit(3), lambda: leave(folder)], 2) == 1
assert len(list(folder.iterdir())) == 2 and str(os.getpid()) not in [path.name for path in folder.iterdir()]
print("the parent goes on")
"""


def test_work_in_children_is_logged_and_its_failure_told(tmp_path: Path) -> None:
    """In a process without threads: catches a child that goes on as its parent, a failure unheard, work left out."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(PROOF)},
    )  # fmt: skip
    assert done.stdout == "the parent goes on\n", done.stdout + done.stderr


def answered(data: Path, limit: int, wrong: int) -> dict:
    """score_run.py's answers: all true, but for the first `wrong` scenes, which are said to show a thing too many."""
    from draw_world import read_scene, read_scenes
    from world import absent_kinds, description

    spoken, lines = {}, []
    questions = json.loads((data / "test.questions.json").read_text())
    for number, (name, record) in enumerate(list(read_scenes(data, "test").items())[:limit]):
        scene = read_scene(record)
        spoken[name] = description(scene)
        if number < wrong:
            colour, shape = absent_kinds(scene, True)[0]
            spoken[name] = f"The picture shows a {colour} {shape}."
        for line in questions:
            if line["image"] == name:
                true, false = ("Yes.", "No.") if line["label"] == "yes" else ("No.", "Yes.")
                lines.append(line | {"answer": false if number < wrong else true})
    return {"descriptions": spoken, "yes/no": lines}


def test_the_report_is_made_from_stored_answers_alone(data: Path, tmp_path: Path) -> None:
    """Scores from the digits equal the scorer's own; runs that are stored need not be there any more."""
    from run_arms import folder_of
    from score_run import score_answers
    from stored import read

    output, stored = tmp_path / "proof", tmp_path / "answers.jsonl.xz"
    output.mkdir()
    (output / "data").symlink_to(data)
    scored, wrong_of = {}, {}
    for regime, arm, wrong in (("habit", "none", 6), ("habit", "phrase", 3), ("after", "none", 5), ("after", "dpo", 4)):
        for seed in (1, 2):
            for stage in ("pretrain", "finetune") if regime == "habit" else ("prefer",):
                answers = answered(data, 12, wrong + seed)
                first = next(iter(answers["descriptions"]))
                answers["descriptions"][first] += " A red circle." * 11  # more things than one figure tells
                answers["yes/no"][1]["answer"] = "No."  # which is right: one wrong yes less than there are wrong noes
                wrong_of[regime, arm, seed] = wrong + seed
                scores = score_answers(answers, data) | {"preference accuracy sum": 0.9}
                scored[regime, arm, seed] = scores
                path = folder_of(output, regime, arm, seed) / f"{stage}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"split": "test", "scores": scores, "answers": answers}))
    command = [str(PROOF / "report.py"), "--answers", str(stored), "--output", str(tmp_path / "report")]
    done = run_warm([*command, "--collect", str(output)])
    assert done.returncode == 0, done.stderr
    runs = read(stored)
    assert len(runs) == 12
    for run in runs:
        expected = scored[run.regime, run.arm, run.seed]
        for metric in ("yes/no errors", "CHAIR_i", "cover", "preference accuracy sum"):
            assert run.metrics()[metric] == pytest.approx(expected[metric]), (run.arm, metric)
        found, number = run.metrics(), wrong_of[run.regime, run.arm, run.seed]
        assert found["wrong facts"] == pytest.approx(found["said falsely"] + 1 - found["cover"])
        assert (found["wrong yes"], found["wrong no"]) == pytest.approx(((number - 1) / 12, number / 12))
        hallucinated = sum(int(one, 36) for one in run.hallucinated)
        missed = (1 - expected["cover"]) * sum(map(int, run.present))
        assert run.metrics()["wrong facts"] == pytest.approx((hallucinated + missed) / sum(map(int, run.present)))
        resampled = np.random.default_rng(0).integers(12, size=(4000, 12))
        by_scene = np.array(list(map(int, run.wrong))).reshape(12, 2).mean(1)
        assert run.spread_of_scenes("yes/no errors") == pytest.approx(by_scene[resampled].mean(1).std(), rel=0.15)
    first = (tmp_path / "report" / "results.md").read_text()
    assert "`habit` lacks runs of these arms at seed 1 (`none, longer`, `sham`, " in first
    assert "`after` lacks runs of these arms at seed 1 (`none, longer`, `phrase`); 2 " in first
    assert "After stage 2, on 12 scenes" in first and "After the stage that follows, on 12 scenes" in first
    (after,) = [
        line for line in first.splitlines() if line.startswith("| after stage 2: dpo, against the true answers a")
    ]
    assert "2 of 2" in after
    assert "| phrase (2) |" in first and (tmp_path / "report" / "forest.png").stat().st_size > 20_000
    shutil.rmtree(output)
    done = run_warm(command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "results.md").read_text() == first
