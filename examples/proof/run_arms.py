"""Runs every arm at every seed, two runs at once: stage 1, stage 2, scores of both. A finished part is not repeated.

    python examples/proof/run_arms.py --output output/proof --seeds 1 2 3 4 5

An arm differs from the others in its stage-1 flags alone. One seed means the same fresh connector, the same order of
the data and the same stage 2 in all arms.
"""

import argparse
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from forks import call, call_all

HERE = Path(__file__).parent
ARMS: dict[str, list[str]] = {
    "none": ["--contrastive-weight", "0"],
    "none, longer": ["--contrastive-weight", "0", "--train-iters", "90", "--eval-interval", "90"],
    "contrastive": ["--hallucination-negatives", "none"],
    "HACL own": ["--hallucination-negatives", "own"],
    "HACL all": ["--hallucination-negatives", "all"],
    "HACL queue": ["--hallucination-negatives", "own", "--contrastive-negatives", "queue", "--queue-size", "1024"],
    "HACL own λ1": ["--hallucination-negatives", "own", "--contrastive-weight", "1"],
    "HACL own apart": ["--hallucination-negatives", "own", "--heads-init", "independent"],
    "sham": ["--hallucination-negatives", "own"],
    "HACL dosed": ["--hallucination-negatives", "own", "--hallucination-weight", "64"],
    "phrase": ["--contrastive-weight", "0", "--preference-loss", "phrase", "--preference-weight", "0.1"],
    "dpo": ["--contrastive-weight", "0", "--preference-loss", "dpo", "--preference-weight", "1"],
    "HACL + phrase": [
        "--hallucination-negatives", "own", "--preference-loss", "phrase", "--preference-weight", "0.1",
    ],
}  # fmt: skip
"""Stage 1's flags of each arm, beside pretrain.yaml. The contrast of `sham` reads other pictures' alt texts and twins;
a twin of `HACL dosed` weighs as much as the 64 captions of the batch; `none, longer` takes the time of the contrast for
half as many steps again."""


class Regime(NamedTuple):
    """What stage 1 is like in every arm."""

    captions: str
    """`clean`: alt texts alone; `web`: among what web captions say beside what is seen."""
    pictures: str
    """Before the names of both stages' splits: `habit_`, or nothing."""
    language: str
    """The language model, of `make_parts.py`."""
    flags: tuple[str, ...] = ()
    """Stage 1's, beside pretrain.yaml; an arm's come after them."""
    arms: tuple[str, ...] = ("none", "sham", "contrastive", "HACL own", "phrase")


REGIMES: dict[str, Regime] = {
    "habit": Regime(
        "web", "habit_", "language",
        arms=(
            "none", "none, longer", "sham", "contrastive", "HACL own", "HACL dosed", "phrase", "dpo", "HACL + phrase",
        ),
    ),
    "long": Regime(
        "web", "habit_", "language", ("--train-iters", "180", "--eval-interval", "180"), ("none", "HACL own", "dpo"),
    ),
    "web": Regime("web", "", "language", ("--lr", "6e-3")),
    "clean": Regime("clean", "", "language"),
    "telling": Regime("web", "", "telling"),
}  # fmt: skip
"""The first three are README.md's protocol; the others and the arms that none names are of the first experiment
(earlier/README.md)."""
REGIMES_OF_THE_PROOF = ("habit",)
"""What is run unless --regimes says more: the rates of `long` and `web` are not chosen yet, see README.md."""


def languages_in(parts: Path) -> list[str]:
    """The regimes' language models that are there; --small makes the first alone."""
    return [name for name in dict.fromkeys(regime.language for regime in REGIMES.values()) if (parts / name).is_dir()]


def captions_of(data: Path, split: str, captions: str, *, sham: bool = False) -> str:
    """The pairs of a split, as a regime's captions are."""
    return str(data / f"{split}{'-web' if captions == 'web' else ''}{'-sham' if sham else ''}.json")


def folder_of(output: Path, regime: str, arm: str, seed: int) -> Path:
    return output / "runs" / regime / f"{arm.replace(',', '').replace(' ', '-').replace('λ', 'weight-')}-{seed}"


def stage_flags(output: Path, regime: str, arm: str, seed: int, stage: str, split: str) -> list[str]:
    """The trainer's flags of one stage of one run, `--save` and `--load` included."""
    data, parts, folder = output / "data", output / "parts", folder_of(output, regime, arm, seed)
    captions, pictures, language, more, _ = REGIMES[regime]
    flags = ["--config", str(HERE / f"{stage}.yaml"), "--seed", str(seed), "--image-folder", str(data / "images")]
    if stage == "pretrain":
        flags += ["--data-path", captions_of(data, f"{pictures}pretrain", captions, sham=arm == "sham")]
        flags += ["--valid-data-path", captions_of(data, split, captions), "--vision-tower", str(parts / "tower")]
        flags += ["--pretrained-checkpoint", str(parts / language), *more, *ARMS[arm]]
    else:
        pairs = captions_of(data, split, "clean")
        flags += ["--data-path", str(data / f"{pictures}finetune.json"), "--valid-data-path", pairs]
        flags += ["--pretrained-checkpoint", str(folder / "pretrain")]
    return [*flags, "--save", str(folder / stage), "--load", str(folder / stage)]


class Sizes(NamedTuple):
    """Scenes of the split that each stage's model is scored on."""

    pretrain: int
    finetune: int


def import_all() -> None:
    """What the children need, imported once here (seconds each time otherwise)."""
    import torch
    from transformers.utils import logging as transformers_logging

    from hacl_megatron.platform.processes import prepare_device

    torch.set_num_threads(1)
    prepare_device(torch.device("cpu"))
    transformers_logging.disable_progress_bar()
    import score_run  # noqa: F401

    import hacl_megatron.training.build
    import hacl_megatron.training.loop  # noqa: F401
    from hacl_megatron.data.dali import dali_is_installed

    dali_is_installed()  # imports it, where it is there


def train_stage(flags: list[str]) -> None:
    from hacl_megatron import train

    train.main(flags)


def score_stage(load: Path, data: Path, split: str, limit: int, target: Path) -> None:
    from score_run import score_run

    result = score_run(load, data, split, limit)
    partial_file = target.with_suffix(".part")
    partial_file.write_text(json.dumps(result, indent=1) + "\n")
    partial_file.rename(target)


def run_arm(
    output: Path, regime: str, arm: str, seed: int, *, split: str, sizes: Sizes, more: dict[str, list[str]], keep: bool
) -> None:
    """Both stages of one arm at one seed, each trained (resuming what is there) and scored, unless its scores exist.

    Args:
        more: further flags by stage, such as fewer iterations.
        keep: the checkpoints, which are otherwise removed once both stages are scored.
    """
    folder, start = folder_of(output, regime, arm, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for stage, flags in more.items():
        scores, log = folder / f"{stage}.json", folder / f"{stage}.log"
        if scores.exists():
            continue
        call(partial(train_stage, [*stage_flags(output, regime, arm, seed, stage, split), *flags]), log)
        call(partial(score_stage, folder / stage, output / "data", split, getattr(sizes, stage), scores), log)
    if not keep:
        for stage in more:
            for checkpoint in (folder / stage).glob("iter_*"):
                shutil.rmtree(checkpoint)
    print(f"{regime}, {arm}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/proof"))
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES_OF_THE_PROOF), choices=list(REGIMES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: the regime's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, default=1000, help="after stage 2, score on the first scenes of the split")
    parser.add_argument("--limit-stage1", type=int, help="the same after stage 1 (default: --limit)")
    parser.add_argument("--stage1", default="", help="more flags for stage 1 of every arm, as one word")
    parser.add_argument("--stage2", default="", help="more flags for stage 2 of every arm, as one word")
    parser.add_argument(
        "--keep", type=int, nargs="*", default=[1], help="seeds whose checkpoints stay, for gradients.py"
    )
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import_all()
    sizes = Sizes(args.limit if args.limit_stage1 is None else args.limit_stage1, args.limit)
    works = (
        partial(
            run_arm, args.output, regime, arm, seed, split=args.split, sizes=sizes, keep=seed in args.keep,
            more={"pretrain": args.stage1.split(), "finetune": args.stage2.split()},
        )
        for regime in args.regimes for seed in args.seeds for arm in args.arms or REGIMES[regime].arms
    )  # fmt: skip
    if failed := call_all(works, args.jobs):
        raise SystemExit(f"{failed} runs failed, see above; repeat the command to run what is missing")


if __name__ == "__main__":
    main()
