"""Runs every arm at every seed, two runs at once: its stages, and scores after each. A finished part is not repeated.

    python examples/proof/run_arms.py --output output/proof --seeds 1 2 3 4 5

An arm differs from the others in the flags of one stage alone: of stage 1, or in the regime `after` of the stage that
follows stage 2. One seed means the same fresh connector, the same order of the data and the same other stages in all
arms.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
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
    "dpo light": ["--contrastive-weight", "0", "--preference-loss", "dpo", "--preference-weight", "0.1"],
    "HACL + phrase": [
        "--hallucination-negatives", "own", "--preference-loss", "phrase", "--preference-weight", "0.1",
    ],
}  # fmt: skip
"""Stage 1's flags of each arm, beside pretrain.yaml. The contrast of `sham` reads other pictures' alt texts and twins;
a twin of `HACL dosed` weighs as much as the 64 captions of the batch; `none, longer` takes the time of the contrast for
half as many steps again."""
ARMS_AFTER: dict[str, list[str]] = {
    "none": [],
    "none, longer": ["--train-iters", "60", "--eval-interval", "60"],
    "phrase": ["--preference-loss", "phrase", "--preference-weight", "0.2"],
    "dpo": ["--preference-loss", "dpo", "--preference-weight", "0.2"],
}
"""The same for `after`, beside prefer.yaml: all learn from the true answers, `none, longer` from half of them twice;
the reference of `dpo` is stage 2's model."""


class Regime(NamedTuple):
    """What the stage is like in which the arms differ."""

    captions: str
    """`clean`: alt texts alone; `web`: among what web captions say beside what is seen."""
    pictures: str
    """Before the names of both stages' splits: `habit_`, or nothing."""
    language: str
    """The language model, of `make_parts.py`."""
    flags: tuple[str, ...] = ()
    """Stage 1's, beside pretrain.yaml; an arm's come after them."""
    arms: tuple[str, ...] = ("none", "sham", "contrastive", "HACL own", "phrase")
    base: tuple[str, str] | None = None
    """Regime and arm that a run goes on from at its seed, after stage 2; None: it has stages 1 and 2 of its own."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that a run trains, by the names of their files."""
        return ("pretrain", "finetune") if self.base is None else ("prefer",)

    def arm_flags(self, arm: str) -> list[str]:
        return (ARMS if self.base is None else ARMS_AFTER)[arm]


REGIMES: dict[str, Regime] = {
    "habit": Regime(
        "web", "habit_", "language",
        arms=(
            "none", "none, longer", "sham", "contrastive", "HACL own", "HACL dosed", "phrase", "dpo", "dpo light",
            "HACL + phrase",
        ),
    ),
    "after": Regime("clean", "habit_", "language", arms=tuple(ARMS_AFTER), base=("habit", "none")),
    "long": Regime(
        "web", "habit_", "language", ("--train-iters", "180", "--eval-interval", "180"), ("none", "HACL own", "dpo"),
    ),
    "web": Regime("web", "", "language", ("--lr", "6e-3")),
    "clean": Regime("clean", "", "language"),
    "telling": Regime("web", "", "telling"),
}  # fmt: skip
"""The first two are README.md's protocol; `long` and `web` were of it before (diagnostics.md); `clean`, `telling` and
the arms that none names are of the first experiment (earlier/README.md)."""
REGIMES_OF_THE_PROOF = ("habit", "after")
"""What is run unless --regimes says otherwise."""


def languages_in(parts: Path) -> list[str]:
    """The regimes' language models that are there; run.sh has the first alone."""
    return [name for name in dict.fromkeys(regime.language for regime in REGIMES.values()) if (parts / name).is_dir()]


def captions_of(data: Path, split: str, captions: str, *, sham: bool = False) -> str:
    """The pairs of a split, as a regime's captions are."""
    return str(data / f"{split}{'-web' if captions == 'web' else ''}{'-sham' if sham else ''}.json")


def folder_of(output: Path, regime: str, arm: str, seed: int) -> Path:
    return output / "runs" / regime / f"{arm.replace(',', '').replace(' ', '-').replace('λ', 'weight-')}-{seed}"


def stage_flags(output: Path, regime: str, arm: str, seed: int, stage: str, split: str) -> list[str]:
    """The trainer's flags of one stage of one run, `--save` and `--load` included."""
    data, parts, folder = output / "data", output / "parts", folder_of(output, regime, arm, seed)
    captions, pictures, language, more, _, base = REGIMES[regime]
    flags = ["--config", str(HERE / f"{stage}.yaml"), "--seed", str(seed), "--image-folder", str(data / "images")]
    if stage == "pretrain":
        flags += ["--data-path", captions_of(data, f"{pictures}pretrain", captions, sham=arm == "sham")]
        flags += ["--valid-data-path", captions_of(data, split, captions), "--vision-tower", str(parts / "tower")]
        flags += ["--pretrained-checkpoint", str(parts / language), *more, *REGIMES[regime].arm_flags(arm)]
    elif base is not None:
        flags += ["--data-path", str(data / f"{pictures}prefer.json")]
        flags += ["--valid-data-path", captions_of(data, split, captions)]
        flags += ["--pretrained-checkpoint", str(folder_of(output, *base, seed) / "finetune")]
        flags += [*more, *REGIMES[regime].arm_flags(arm)]
    else:
        pairs = captions_of(data, split, "clean")
        flags += ["--data-path", str(data / f"{pictures}finetune.json"), "--valid-data-path", pairs]
        flags += ["--pretrained-checkpoint", str(folder / "pretrain")]
    return [*flags, "--save", str(folder / stage), "--load", str(folder / stage)]


class Sizes(NamedTuple):
    """Scenes of the split that each stage's model is scored on."""

    pretrain: int
    finetune: int
    prefer: int


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
    output: Path,
    regime: str,
    arm: str,
    seed: int,
    *,
    split: str,
    sizes: Sizes,
    more: Mapping[str, list[str]],
    keep: bool,
) -> None:
    """One arm's stages at one seed, each trained (resuming what is there) and scored, unless its scores exist.

    Args:
        more: further flags by stage, such as fewer iterations.
        keep: the checkpoints, which are otherwise removed once all stages are scored, but those that another regime
            goes on from.
    """
    folder, start, stages = folder_of(output, regime, arm, seed), time.monotonic(), REGIMES[regime].stages
    needed = folder / "finetune" if any(one.base == (regime, arm) for one in REGIMES.values()) else None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        for stage in stages:
            flags, scores, log = more.get(stage, []), folder / f"{stage}.json", folder / f"{stage}.log"
            if scores.exists():
                continue
            if REGIMES[regime].base is not None:
                train_base(output, regime, seed, split, more)
            train_to_end(folder / stage, [*stage_flags(output, regime, arm, seed, stage, split), *flags], log)
            call(partial(score_stage, folder / stage, output / "data", split, getattr(sizes, stage), scores), log)
        for stage in () if keep else stages:
            for checkpoint in (folder / stage).glob("iter_*") if folder / stage != needed else ():
                shutil.rmtree(checkpoint)
    print(f"{regime}, {arm}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def train_base(output: Path, regime: str, seed: int, split: str, more: Mapping[str, list[str]]) -> None:
    """The run that a regime goes on from at a seed, where its checkpoint is not there; one process trains it.

    Raises RuntimeError where that run was scored before and its losses are not met again, or it was stopped.
    """
    base = REGIMES[regime].base
    folder = folder_of(output, *base, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if is_finished(folder / "finetune"):
            return
        for stage in REGIMES[base[0]].stages:
            flags = [*stage_flags(output, *base, seed, stage, split), *more.get(stage, [])]
            train_to_end(folder / stage, flags, folder / f"{stage}.log")
            check_as_scored(folder, stage)


def train_to_end(save: Path, flags: list[str], log: Path) -> None:
    """A stage in a child, from the checkpoint that is there; RuntimeError where it fails, or was told to stop."""
    if not has_checkpoint(save):
        shutil.rmtree(save, ignore_errors=True)  # what a removed checkpoint leaves behind
    call(partial(train_stage, flags), log)
    if not is_finished(save):
        raise RuntimeError(f"{save}: training was stopped; the same command goes on, see {log}")


def check_as_scored(folder: Path, stage: str) -> None:
    """Raises RuntimeError where a stage that was scored is trained anew and comes to another validation loss."""
    if not (scores := folder / f"{stage}.json").exists():
        return
    before = json.loads(scores.read_text())["scores"]["lm loss"]
    now = json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])["lm loss validation"]
    if abs(now - before) > 1e-4:
        raise RuntimeError(f"{folder / stage}: trained anew its validation loss is {now}, {scores} has {before}")


def has_checkpoint(save: Path) -> bool:
    """Whether the newest checkpoint that a --save folder names is there, and not removed."""
    from hacl_megatron.checkpoint.run.folder import locate_checkpoint

    try:
        return locate_checkpoint(save).is_dir()
    except ValueError:  # none was saved, or it is named and gone
        return False


def is_finished(save: Path) -> bool:
    """Whether the newest checkpoint is there and is of the run's last iteration."""
    from hacl_megatron.checkpoint.run.folder import locate_checkpoint, read_run_config

    if not has_checkpoint(save):
        return False
    checkpoint = locate_checkpoint(save)
    return int(checkpoint.name.removeprefix("iter_")) == read_run_config(checkpoint).training.train_iters


def arms_of(regime: str, chosen: list[str] | None) -> list[str]:
    """A regime's own arms, or those that are chosen; what follows stage 2 is there for some arms alone."""
    if REGIMES[regime].base is not None:
        return [arm for arm in ARMS_AFTER if chosen is None or arm in chosen]
    return list(REGIMES[regime].arms if chosen is None else chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/proof"))
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES_OF_THE_PROOF), choices=list(REGIMES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: the regime's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, default=1000, help="score on the first scenes of the split")
    parser.add_argument("--limit-stage1", type=int, help="the same after stage 1 (default: --limit)")
    parser.add_argument("--stage1", default="", help="more flags for stage 1 of every arm, as one word")
    parser.add_argument("--stage2", default="", help="more flags for stage 2 of every arm, as one word")
    parser.add_argument("--stage3", default="", help="more flags for what follows stage 2 in `after`, as one word")
    parser.add_argument(
        "--keep", type=int, nargs="*", default=[1], help="seeds whose checkpoints all stay, for gradients.py"
    )
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    without = [regime for regime in args.regimes if not arms_of(regime, args.arms)]
    if without == args.regimes:
        parser.error(f"--arms: `{without[0]}` has none of {', '.join(args.arms)}, but {'; '.join(ARMS_AFTER)}")
    for regime in without:
        print(f"`{regime}` is left out: it has none of the arms {'; '.join(args.arms)}")
    import_all()
    sizes = Sizes(args.limit if args.limit_stage1 is None else args.limit_stage1, args.limit, args.limit)
    more = {"pretrain": args.stage1.split(), "finetune": args.stage2.split(), "prefer": args.stage3.split()}
    works = (
        partial(
            run_arm, args.output, regime, arm, seed,
            split=args.split, sizes=sizes, more=more, keep=seed in args.keep,
        )
        for seed in args.seeds for regime in args.regimes for arm in arms_of(regime, args.arms)
    )  # fmt: skip
    if failed := call_all(works, args.jobs):
        raise SystemExit(f"{failed} runs failed, see above; repeat the command to run what is missing")


if __name__ == "__main__":
    main()
