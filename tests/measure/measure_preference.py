"""Time and memory of a step with `dpo`: beside the step without it, and the prompt shared or computed anew.

    python -m tests.measure.measure_preference [--stage finetune] [--repetitions 7]

Sides, of one random LLaVA over the same samples, in fp32 on the CPU, each in a process of its own, in turns:

    without    language-model loss alone
    dpo        chosen and rejected behind one computation of prompt and image
    separate   the same, each rejected answer with its own prompt and image
    passes     as trainers on transformers do it: chosen and rejected padded into one batch of whole dialogues, their
               log-probabilities from whole logits, and, in `passes, reference`, the reference's the same way

Scores of the reference are given to all but the last, whose forward pass over the reference is part of each step.
Ratios are medians over repetitions of CPU seconds of all threads, and of the clock. The bound is the ratio of rows that
run through the language model.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.measure.step_processes import Process, Variant, measure_memory
from tests.measure.step_sides import Work, write_model

SIDES = {
    "without": Variant(flags=("--contrastive-weight", "0")),
    "dpo": Variant(flags=("--contrastive-weight", "0", "--preference-loss", "dpo")),
    "separate": Variant(
        flags=("--contrastive-weight", "0", "--preference-loss", "dpo"), without=("shared prompt of twins",)
    ),
    "passes": Variant(flags=("passes",)),
    "passes, reference": Variant(flags=("passes", "reference")),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="finetune")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="without, dpo and more; those "
                        "of 8 pairs together need 24 GB")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=7, help="0: memory alone, one side at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--caption-tokens", type=int, nargs=2, default=(8, 40), metavar=("LEAST", "MOST"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image", type=int, default=336)
    parser.add_argument("--no-memory", action="store_true")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    sizes = argparse.Namespace(
        hidden=args.hidden, layers=args.layers, heads=8, ffn=args.hidden * 43 // 16, vocab=32000, vision_hidden=256,
        vision_layers=6, vision_heads=4, image=args.image, patch=14, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), sizes)
        work = Work(
            folder=folder, context="image", stage=args.stage, threads=args.threads, pairs=args.pairs, hallucinated=1,
            shortest=args.caption_tokens[0], longest=args.caption_tokens[1], seed=0,
        )  # fmt: skip
        if not args.repetitions:
            for name in args.sides:
                print(f"{name:<20} {measure_memory(work, name, SIDES[name]) / 2**20:7.0f} MiB", flush=True)
            return
        processes = {name: Process(work, name, SIDES[name]) for name in args.sides}
        first = {name: process.ask("step")[2] for name, process in processes.items()}
        for name, losses in first.items():
            shown = ", ".join(f"{tag} {value:.6f}" for tag, value in losses.items() if value == value)
            print(f"{name:<20} {shown}", flush=True)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.sides}
        for repetition in range(args.repetitions):
            for name in args.sides[:: 1 if repetition % 2 == 0 else -1]:
                times[name].append(processes[name].ask("step")[:2])
        for process in processes.values():
            process.close()
        print(f"\n{'':<20} {'s':>7} {'CPU s':>7} {'/ without':>10} {'CPU':>6} {'dpo =':>8} {'CPU':>6} {'MiB':>7}")
        for name, own in times.items():
            cells = [statistics.median(seconds) for seconds in zip(*own, strict=True)]
            for other in ("without", "dpo"):
                for kind in (0, 1):
                    pairs = zip(own, times[other], strict=True)
                    cells.append(statistics.median(one[kind] / two[kind] for one, two in pairs))
            peak = "" if args.no_memory else f"{measure_memory(work, name, SIDES[name]) / 2**20:7.0f}"
            print(
                f"{name:<20} {cells[0]:7.2f} {cells[1]:7.2f} {cells[2]:10.2f} {cells[3]:6.2f} {cells[4]:8.2f} "
                f"{cells[5]:6.2f} {peak}",
                flush=True,
            )


if __name__ == "__main__":
    measure(parse())
