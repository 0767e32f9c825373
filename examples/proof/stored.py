"""What the runs answered, judged scene by scene, in one file that a repository can hold.

answers.jsonl.xz    a line a run and stage: regime, arm, seed, split; for each scene, a character each, how many things
                    are named that are not there, named in all, missed, and there; for each question 1 where its
                    answer was wrong; and the validation's numbers
"""

import json
import lzma
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from draw_world import read_scene, read_scenes
from run_arms import ARMS, REGIMES, folder_of
from world import read_description

from hacl_megatron.evaluation.answers.pope import score_pope

STORED = Path(__file__).parent / "answers.jsonl.xz"
STAGES = {"pretrain": "stage 1", "finetune": "stage 2", "prefer": "the stage that follows"}
KEPT = ("lm loss", "preference accuracy sum", "retrieval i2t recall@1", "retrieval hallucination accuracy")
"""Of the trainer's validation."""


@dataclass(frozen=True)
class Judged:
    """One run after one stage."""

    regime: str
    arm: str
    seed: int
    stage: str
    split: str
    hallucinated: str
    mentioned: str
    missed: str
    present: str
    """A character a scene, one of `DIGITS`."""
    wrong: str
    """0 or 1 a question, two for each scene: first the one whose answer is yes, then the one whose answer is no."""
    validation: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """The scores, by the names of `comparisons.METRICS`."""
        hallucinated, mentioned, missed, present = (
            digits(text).sum() for text in (self.hallucinated, self.mentioned, self.missed, self.present)
        )
        wrong_no, wrong_yes = digits(self.wrong).reshape(-1, 2).mean(0)
        return {
            "wrong facts": float((hallucinated + missed) / present),
            "yes/no errors": float(digits(self.wrong).mean()),
            "said falsely": float(hallucinated / present),
            "cover": float(1 - missed / present),
            "wrong yes": float(wrong_yes),
            "wrong no": float(wrong_no),
            "CHAIR_i": float(hallucinated / max(mentioned, 1)),
        } | dict(self.validation)

    def spread_of_scenes(self, metric: str) -> float:
        """The standard error that `metric` has because its scenes are a sample (of a ratio: linearised)."""
        if metric == "yes/no errors":
            by_scene = digits(self.wrong).reshape(-1, 2).mean(1)
            return float(by_scene.std(ddof=1) / len(by_scene) ** 0.5)
        false, named, missed, there = map(digits, (self.hallucinated, self.mentioned, self.missed, self.present))
        above, below = (false, named) if metric == "CHAIR_i" else (missed + false * (metric == "wrong facts"), there)
        rest = above - above.sum() / max(below.sum(), 1) * below
        return float(rest.std(ddof=1) / len(rest) ** 0.5 / max(below.mean(), 1e-9))


DIGITS = string.digits + string.ascii_lowercase
"""0 to 35: a description of 48 tokens has room for twenty things at most."""
_VALUE = np.full(128, np.nan)
_VALUE[list(DIGITS.encode())] = range(len(DIGITS))


def digits(text: str) -> np.ndarray:
    """float64 [N] of N characters, of `DIGITS`."""
    return _VALUE[np.frombuffer(text.encode(), dtype=np.uint8)]


def judge(answers: Mapping[str, Any], data: Path, split: str) -> dict[str, str]:
    """The digits of `Judged` from what score_run.py wrote."""
    scenes = read_scenes(data, split)
    described = [read_description(text, read_scene(scenes[name])) for name, text in answers["descriptions"].items()]
    lines = answers["yes/no"]
    assert [line["image"] for line in lines] == [name for name in answers["descriptions"] for _ in range(2)]
    assert [line["label"] for line in lines] == ["yes", "no"] * len(described)
    wrong = [
        score_pope([line], [{"question": line["text"], "answer": line["answer"]}]).metrics["accuracy"] != 1
        for line in lines
    ]

    def said(numbers: Iterable[int]) -> str:
        return "".join(DIGITS[number] for number in numbers)

    return {
        "hallucinated": said(one.hallucinated for one in described),
        "mentioned": said(one.mentioned for one in described),
        "missed": said(one.present - one.covered for one in described),
        "present": said(one.present for one in described),
        "wrong": said(map(int, wrong)),
    }


def finished_runs(output: Path, known: set[tuple[str, str, int, str]]) -> Iterator[Judged]:
    """Those of run_arms.py's output folder that are not among `known` (regime, arm, seed, stage)."""
    for regime in REGIMES:
        for path in sorted((output / "runs" / regime).glob("*/*.json")):
            seed = int(path.parent.name.rsplit("-", 1)[1])
            arm = next(arm for arm in ARMS if folder_of(output, regime, arm, seed) == path.parent)
            if (regime, arm, seed, path.stem) in known:
                continue
            result = json.loads(path.read_text())
            validation = {name: round(result["scores"][name], 5) for name in KEPT if name in result["scores"]}
            judged = judge(result["answers"], output / "data", result["split"])
            yield Judged(regime, arm, seed, path.stem, result["split"], validation=validation, **judged)


def read(path: Path = STORED) -> list[Judged]:
    """All that is stored; nothing where there is no file."""
    if not path.exists():
        return []
    with lzma.open(path, "rt") as file:
        return [Judged(**json.loads(line)) for line in file]


def write(runs: Sequence[Judged], path: Path = STORED) -> None:
    """In the order of regimes, seeds, arms and stages, whatever the order in which they were run."""
    arms, stages = list(ARMS), list(STAGES)
    ordered = sorted(
        runs, key=lambda run: (list(REGIMES).index(run.regime), run.seed, arms.index(run.arm), stages.index(run.stage))
    )
    partial = path.with_suffix(".part")
    with lzma.open(partial, "wt", preset=9) as file:
        for run in ordered:
            file.write(json.dumps(asdict(run)) + "\n")
    partial.rename(path)
