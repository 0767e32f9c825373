"""Runs every arm at every seed, two runs at once: stage 1, stage 2, scores of both. A finished part is not repeated.

    python examples/proof/run_arms.py --output output/proof --seeds 1 2 3 4 5

An arm differs from the others in its stage-1 flags alone. One seed means the same fresh connector, the same order of
the data and the same stage 2 in all arms.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARMS: dict[str, list[str]] = {
    "none": ["--contrastive-weight", "0"],
    "contrastive": ["--hallucination-negatives", "none"],
    "HACL own": ["--hallucination-negatives", "own"],
    "HACL all": ["--hallucination-negatives", "all"],
    "HACL queue": ["--hallucination-negatives", "own", "--contrastive-negatives", "queue", "--queue-size", "1024"],
    "HACL own λ1": ["--hallucination-negatives", "own", "--contrastive-weight", "1"],
    "HACL own apart": ["--hallucination-negatives", "own", "--heads-init", "independent"],
    "sham": ["--hallucination-negatives", "own"],
    "HACL dosed": ["--hallucination-negatives", "own", "--hallucination-weight", "64"],
    "phrase": ["--contrastive-weight", "0", "--preference-loss", "phrase"],
    "dpo": ["--contrastive-weight", "0", "--preference-loss", "dpo"],
    "HACL + phrase": ["--hallucination-negatives", "own", "--preference-loss", "phrase"],
}
"""Stage 1's flags of each arm, beside pretrain.yaml. The contrast of `sham` reads other pictures' alt texts and twins;
a twin of `HACL dosed` weighs as much as the 64 captions of the batch."""


FIRST_ARMS = list(ARMS)[:7]
"""Those of README.md's results; the others have not been run."""


class Regime(NamedTuple):
    """What stage 1 is like in every arm."""

    captions: str
    """`clean`: alt texts alone; `web`: among what web captions say beside what is seen."""
    language: str
    """The language model, of `make_parts.py`."""
    flags: list[str]
    """Stage 1's, beside pretrain.yaml; an arm's come after them."""


REGIMES: dict[str, Regime] = {
    "web": Regime("web", "language", []),
    "clean": Regime("clean", "language", ["--lr", "6e-3"]),
    "telling": Regime("web", "telling", ["--contrastive-weight", "0.03"]),
}
"""See README.md here."""


def languages_in(parts: Path) -> list[str]:
    """The regimes' language models that are there; --small makes the first alone."""
    return [name for name in dict.fromkeys(regime.language for regime in REGIMES.values()) if (parts / name).is_dir()]


def captions_of(data: Path, split: str, captions: str, *, sham: bool = False) -> str:
    """The pairs of a split, as a regime's captions are."""
    return str(data / f"{split}{'-web' if captions == 'web' else ''}{'-sham' if sham else ''}.json")


def folder_of(output: Path, regime: str, arm: str, seed: int) -> Path:
    return output / "runs" / regime / f"{arm.replace(' ', '-').replace('λ', 'weight-')}-{seed}"


def call(command: list[str], log: Path) -> None:
    """One process, its output appended to `log`. Raises RuntimeError with the log's end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n" + log.read_text()[-2000:])


def stage_flags(output: Path, regime: str, arm: str, seed: int, stage: str, split: str) -> list[str]:
    """The trainer's flags of one stage of one run, `--save` and `--load` included."""
    data, parts, folder = output / "data", output / "parts", folder_of(output, regime, arm, seed)
    captions, language, more = REGIMES[regime]
    flags = ["--config", str(HERE / f"{stage}.yaml"), "--seed", str(seed), "--image-folder", str(data / "images")]
    if stage == "pretrain":
        flags += ["--data-path", captions_of(data, "pretrain", captions, sham=arm == "sham")]
        flags += ["--valid-data-path", captions_of(data, split, captions), "--vision-tower", str(parts / "tower")]
        flags += ["--pretrained-checkpoint", str(parts / language), *more, *ARMS[arm]]
    else:
        flags += ["--data-path", str(data / "finetune.json"), "--valid-data-path", captions_of(data, split, "clean")]
        flags += ["--pretrained-checkpoint", str(folder / "pretrain")]
    return [*flags, "--save", str(folder / stage), "--load", str(folder / stage)]


def run_arm(
    output: Path, regime: str, arm: str, seed: int, *, split: str, limit: int | None, more: dict[str, list[str]]
) -> None:
    """Both stages of one arm at one seed, each trained (resuming what is there) and scored, unless its scores exist.

    Args:
        more: further flags by stage, such as fewer iterations.
    """
    folder, start = folder_of(output, regime, arm, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for stage, flags in more.items():
        scores, log = folder / f"{stage}.json", folder / f"{stage}.log"
        if scores.exists():
            continue
        train = [*stage_flags(output, regime, arm, seed, stage, split), *flags]
        call([sys.executable, "-m", "hacl_megatron.train", *train], log)
        score = [sys.executable, str(HERE / "score_run.py"), "--load", str(folder / stage)]
        score += ["--data", str(output / "data"), "--split", split, *(["--limit", str(limit)] if limit else [])]
        call([*score, "--output", str(scores)], log)
    print(f"{regime}, {arm}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/proof"))
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--arms", nargs="+", default=FIRST_ARMS, choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, default=300, help="score on the first pictures of the split alone")
    parser.add_argument("--stage1", default="", help="more flags for stage 1 of every arm, as one word")
    parser.add_argument("--stage2", default="", help="more flags for stage 2 of every arm, as one word")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(
                run_arm, args.output, regime, arm, seed, split=args.split, limit=args.limit,
                more={"pretrain": args.stage1.split(), "finetune": args.stage2.split()},
            )
            for regime in args.regimes for seed in args.seeds for arm in args.arms
        ]  # fmt: skip
        for one in waiting:
            one.result()


if __name__ == "__main__":
    main()
