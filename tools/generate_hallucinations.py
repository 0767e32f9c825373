"""Adds "Hallucination caption" to a LLaVA JSON or JSONL file: captions with errors written in, HACL's hard negatives.

    python tools/generate_hallucinations.py --input F.json --output G.json [--per-caption 2] [--num-workers 8]

--method rules exchanges objects, attributes, counts, actions and relations by word lists: offline, and the same
for the same --seed. The caption is a record's "text", else its first answer. Records without a caption, and those that
hold hallucinated captions already (unless --replace), stay as they are. "Hallucination edits" says what was changed.
"""

import argparse
from pathlib import Path

from hacl_megatron.config.console import exit_with_error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("rules",), default="rules", help="how captions are falsified")
    parser.add_argument("--input", required=True, type=Path, help="LLaVA records: a JSON list, or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .json or .jsonl")
    parser.add_argument("--per-caption", type=int, default=1, help="hallucinated captions for each caption")
    parser.add_argument("--seed", type=int, default=1234, help="of the rules' choices")
    parser.add_argument("--num-workers", type=int, default=1, help="processes for the rules")
    parser.add_argument("--replace", action="store_true", help="also where a record has hallucinated captions already")
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    args = parser.parse_args()
    if args.per_caption < 1 or args.num_workers < 0:
        parser.error("--per-caption is at least 1, --num-workers at least 0")
    return args


def generate(args: argparse.Namespace) -> None:
    from hacl_megatron.data.hallucinate.generate import check_paths, generate_by_rules

    check_paths(args.input, args.output, force=args.force)
    totals = generate_by_rules(
        args.input,
        args.output,
        seed=args.seed,
        per_caption=args.per_caption,
        workers=args.num_workers,
        replace=args.replace,
    )
    print(totals.summary())


if __name__ == "__main__":
    try:
        generate(parse())
    except (ValueError, OSError) as error:
        exit_with_error(error)
