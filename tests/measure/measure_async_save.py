"""How long a save keeps a run from training: in the background against at once, on a checkpoint of at least 1 GB.

Run on a machine with little else to do (it is no test: its result is a ratio of times):

    OMP_NUM_THREADS=1 python -m tests.measure.measure_async_save [--interval 4] [--rounds 3] [--folder DIR]

One process trains a LLaMA of 76 million parameters in fp32 with the distributed optimiser (16 bytes a parameter to
save), every save replacing the last, with `--async-save` off and on in turns. The figures are the run's own
`save-stall-seconds`; each round's ratio is printed, and the medians over all. The exit status is 1 if the median of the
one is more than a fifth of the other's.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.training.runs import make_inputs, metrics, train

LIMIT = 0.2


def measure(folder: Path, interval: int, rounds: int) -> float:
    make_inputs(folder, samples=16, hidden=768, heads=6, groups=2, ffn=2048, layers=4)
    stalls: dict[bool, list[float]] = {False: [], True: []}
    size = 0
    for turn in range(2 * rounds):
        in_background = turn % 2 == 1
        save = folder / f"run-{turn}"
        train(
            [[
                "--config", str(folder / "finetune.yaml"), "--save", str(save), "--save-interval", str(interval),
                "--train-iters", str(3 * interval + 1), "--micro-batch-size", "8", "--use-distributed-optimizer",
                "--make-vocab-size-divisible-by", "32768", "--save-retain", "1", "--async-save", str(in_background),
            ]],
            1,
        )  # fmt: skip
        rows = metrics(save)
        found = [row["save-stall-seconds"] for row in rows if "save-stall-seconds" in row]
        step = statistics.median(row["iteration-time"] for row in rows)
        stalls[in_background] += found
        checkpoint = max(save.glob("iter_*"))
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        how = "in the background" if in_background else "at once"
        print(f"{how}: {', '.join(f'{s:.2f}' for s in found)} s; a step takes {step:.2f} s", flush=True)
        if in_background:
            ratio = statistics.median(found) / statistics.median(stalls[False][-len(found) :])
            print(f"round {turn // 2 + 1}: {ratio:.1%}", flush=True)
        for path in sorted(save.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    medians = {how: statistics.median(found) for how, found in stalls.items()}
    ratio = medians[True] / medians[False]
    print(
        f"{size / 1e9:.2f} GB: median stall {medians[True]:.2f} s in the background, {medians[False]:.2f} s at once: "
        f"{ratio:.1%}"
    )
    assert size >= 1e9
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=int, default=4, help="steps between saves: long enough to write one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, three saves each")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        raise SystemExit(measure(Path(folder), args.interval, args.rounds) > LIMIT)


if __name__ == "__main__":
    main()
