"""Scores the three runs of pools.sh on the held-out pairs, all in the same way.

    python examples/quickstart/pools.py --data output/quickstart/data --runs output/quickstart/pools

What a run logs as `retrieval accuracy i2t` is among its own pool, so that runs with different pools cannot be compared
by it: an image finds its caption among 16 more easily than among 64. Here it is among 64 for each, by transformers on
the exported models.
"""

import argparse
import json
from pathlib import Path

from report import read_metrics
from score import represent, retrieval_accuracy

POOLS = ("micro-batch", "global-batch", "queue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/quickstart/data"))
    parser.add_argument("--runs", type=Path, default=Path("output/quickstart/pools"))
    args = parser.parse_args()
    samples = json.loads((args.data / "valid.json").read_text(encoding="utf-8"))
    captions = [sample["text"] for sample in samples]

    print(f"\n{'--contrastive-negatives':26}{'finds its caption':>20}{'prefers it to its twin':>25}{'s a step':>11}")
    for pool in POOLS:
        pairs = represent(args.runs / pool / "export", samples, args.data / "images", prompt="")
        prefers = ((pairs.images * (pairs.captions - pairs.hallucinated)).sum(-1) > 0).float().mean()
        seconds = sorted(row["iteration-time"] for row in read_metrics(args.runs / pool))
        print(
            f"{pool:26}{retrieval_accuracy(pairs, captions):20.1%}{float(prefers):25.1%}"
            f"{seconds[len(seconds) // 2]:11.2f}"
        )
    print(f"{len(samples)} held-out pairs; a caption is found among 64; seconds: the median step.")


if __name__ == "__main__":
    main()
