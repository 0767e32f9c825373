"""What the three runs of run.sh reached: a table, and ten descriptions beside the true words.

python examples/small_real/report.py --run output/small_real/minutes-10

prefers its caption   share of held-out pictures whose caption is likelier than its twin
... with another's    the same with the pictures exchanged: what words alone tell, seen or not
finds its caption     share of pictures whose caption is the nearest of 64, by HACL's heads (by chance 1.6 %)
"""

import argparse
import json
from pathlib import Path
from typing import Any

LOSSES = ("none", "hacl", "phrase")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output/small_real/minutes-N of run.sh")
    args = parser.parse_args()

    def read(name: str) -> Any:
        return json.loads((args.run / name).read_text(encoding="utf-8"))

    rows, descriptions = [], []
    for loss in LOSSES:
        own, other = (read(f"{loss}/{name}.json")["tasks"] for name in ("valid", "valid_other"))
        shares = [
            own["preference"]["metrics"]["accuracy sum"],
            other["preference"]["metrics"]["accuracy sum"],
            own["retrieval"]["metrics"]["i2t recall@1"],
        ]
        rows.append([loss, *(f"{share:.1%}" for share in shares)])
        descriptions.append([answer["model_answer"] for answer in read(f"{loss}/ten.json")])
    pairs = own["preference"]["counts"]["samples"]
    first, *others = (steps_of(args.run / name) for name in ("pretrain", *LOSSES))
    print(
        f"\nStage 1: {first} steps of 16 pictures; stage 2: {', '.join(map(str, others))}. {pairs} held-out pictures.\n"
    )
    if int(others[0]) < 100:
        print("So few steps of stage 2 cannot tell the losses apart.\n")
    print(table(["loss in stage 2", "prefers its caption", "... with another's", "finds its caption"], rows))
    truth = [answer["gt_answer"] for answer in read("none/ten.json")]
    print(table(["what is true", *LOSSES], [list(row) for row in zip(truth, *descriptions, strict=True)]))


def steps_of(save: Path) -> str:
    return (save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown; what a model says may hold anything."""
    lines = [head, ["---"] * len(head), *([" ".join(cell.split()).replace("|", "/") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
