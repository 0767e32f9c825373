"""Time and memory of one optimiser step: this package against HACL written plainly on transformers, and variants.

    python -m tests.measure.measure_step                                 # the README's table: some ten minutes, 2 cores
    python -m tests.measure.measure_step --stage finetune --profile
    python -m tests.measure.measure_step --variant "no recompute=--some-flag value"

The other side is `tests/reference_hacl.py` (four padded passes, as the released code has them), so this runs from a
clone. Both start from one random LLaVA of the given sizes, see the same samples, and take whole optimiser steps in
fp32 on the CPU with as many threads. Each variant has a process of its own; they take turns step by step, so that
whatever else the machine does meets all of them alike. Losses of the first step must agree.

Ratios are medians over paired repetitions of time(plain) / time(variant), by the clock and in CPU seconds of all
threads: on a busy machine the second is the steadier. The bound is the ratio of the FLOPs that the two need
(`step_flops.py`). Peak memory is the high-water of RssAnon during the second step of a fresh process, above
its level before, when all that the first step freed has been handed back to the system.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.config.console import exit_with_error
from tests.measure.step_flops import FEATURES, package_flops, plain_flops
from tests.measure.step_processes import PLAIN, Variant, measure_memory, measure_times
from tests.measure.step_sides import ROOT, Work, draw_samples, lengths_of, write_model

VARIANTS: dict[str, Variant] = {"ours": Variant()}
"""Variants that always run; `--ablate` adds one for each feature that the step then does without, `--variant` more."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=int, default=512)
    model.add_argument("--layers", type=int, default=8)
    model.add_argument("--heads", type=int, default=8)
    model.add_argument("--ffn", type=int, default=1376)
    model.add_argument("--vocab", type=int, default=32000)
    model.add_argument("--vision-hidden", type=int, default=256)
    model.add_argument("--vision-layers", type=int, default=6)
    model.add_argument("--vision-heads", type=int, default=4)
    model.add_argument("--image", type=int, default=336)
    model.add_argument("--patch", type=int, default=14)
    data = parser.add_argument_group("data")
    data.add_argument("--pairs", type=int, default=8, help="samples of the micro-batch, which is the global batch")
    data.add_argument("--hallucinated", type=int, default=1, help="hallucinated captions a pair")
    data.add_argument("--caption-tokens", type=int, nargs=2, default=(8, 40), metavar=("LEAST", "MOST"))
    parser.add_argument("--contexts", nargs="+", choices=("image", "prompt"), default=["image", "prompt"])
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--ablate", action="store_true", help="also run ours without each of its features")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS", help="trainer flags to compare")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--profile", action="store_true", help="also show where each variant's time goes")
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- report


def benchmark(args: argparse.Namespace) -> None:
    if not (ROOT / "tests" / "reference_hacl.py").exists():
        raise ValueError(f"{ROOT} holds no tests/reference_hacl.py, the plain implementation: run this from a clone")
    variants = {**VARIANTS, **dict(map(_variant, args.variant))}
    if args.ablate:
        variants |= {f"without {feature}": Variant(without=(feature,)) for feature in FEATURES}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args)
        architecture = read_model_config(folder)
        for context in args.contexts:
            work = Work(
                folder=folder, context=context, stage=args.stage, threads=args.threads, pairs=args.pairs,
                hallucinated=args.hallucinated, shortest=args.caption_tokens[0], longest=args.caption_tokens[1],
                seed=args.seed,
            )  # fmt: skip
            texts, _ = draw_samples(work, args.vocab, 1)
            lengths = lengths_of(work, texts, architecture.visual_tokens)
            settings = {"prompt": context == "prompt", "trained": not work.frozen}
            flops = {PLAIN: plain_flops(architecture, lengths, **settings)}
            for name, variant in variants.items():
                flops[name] = package_flops(architecture, lengths, **settings, without=variant.without)
            times, profiles = measure_times(work, variants, args.repetitions, args.profile)
            peaks = {}
            if not args.no_memory:
                peaks = {name: measure_memory(work, name, variants.get(name, Variant())) for name in times}
            tokens = sum(lengths.dialogues) + sum(lengths.captions) + sum(lengths.hallucinated)
            print(
                f"\n{context} context, {args.stage}: {tokens:,} tokens and {len(texts)} images a step, without padding"
            )
            _print_flops(flops)
            for name, found in profiles.items():
                _print_profile(name, *found, sum(flops[name].values()))
            rows = [_row(context, name, times, peaks, flops) for name in times]
            print("\n".join(rows), file=sys.stderr)  # whoever waits for the next context, or gives up, has these
            table += rows
    header = ("image context", "step", "s", "plain / this", "in CPU s", "bound", "of the bound", "GFLOP")
    header += ("peak MiB", "of plain's")
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    print("\n".join(table))


def _variant(text: str) -> tuple[str, Variant]:
    name, found, flags = text.partition("=")
    if not found or not name:
        raise ValueError(f"--variant {text!r} is not of the form NAME=FLAGS")
    return name, Variant(flags=tuple(shlex.split(flags)))


def _row(context: str, name: str, times: dict, peaks: dict, flops: dict) -> str:
    pairs = list(zip(times[PLAIN], times[name], strict=True))
    ratio, cpu_ratio = (statistics.median(plain[kind] / own[kind] for plain, own in pairs) for kind in (0, 1))
    total = {key: sum(parts.values()) for key, parts in flops.items()}
    bound = total[PLAIN] / total[name]
    cells = [context, name, f"{statistics.median(wall for wall, _ in times[name]):.2f}"]
    if name == PLAIN:
        cells += ["1", "1", "1", ""]
    else:
        cells += [f"{ratio:.2f}", f"{cpu_ratio:.2f}", f"{bound:.2f}", f"{ratio / bound:.0%}"]
    cells.append(f"{total[name] / 1e9:.0f}")
    cells += [f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[PLAIN]:.0%}"] if peaks else ["", ""]
    return f"| {' | '.join(cells)} |"


def _print_flops(flops: dict[str, dict[str, float]]) -> None:
    parts = list(flops[PLAIN])
    width = max(map(len, flops))
    print("GFLOP".ljust(width), *(f"{part:>17}" for part in (*parts, "sum")))
    for name, counted in flops.items():
        print(
            name.ljust(width),
            *(f"{counted[part] / 1e9:17.1f}" for part in parts),
            f"{sum(counted.values()) / 1e9:17.1f}",
        )


def _print_profile(name: str, groups: dict[str, float], operators: list[tuple[str, float, int]], flops: float) -> None:
    total = sum(groups.values())
    print(f"\n{name}: {total:.2f} s under the profiler, {flops / total / 1e9:.1f} GFLOP/s")
    for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"  {group:28} {seconds:7.3f} s {seconds / total:6.1%}")
    for operator, seconds, calls in operators:
        print(f"    {operator:60} {seconds:7.3f} s {calls:6} calls")


if __name__ == "__main__":
    try:
        benchmark(parse())
    except (ValueError, OSError) as error:
        exit_with_error(error)
