"""Says what a checkpoint holds, and how two differ: of this trainer or of Hugging Face, in any combination.

    python tools/inspect_checkpoint.py DIR [DIR2]

With two folders the exit status is 1 if sizes, names, dtypes or values differ.
"""

import argparse

from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail
from hacl_megatron.config.towers import tower_origins


def inspect(args: argparse.Namespace) -> int:
    from hacl_megatron.checkpoint.convert.describe import Holdings, describe, differences

    holdings = [Holdings(folder, args.vision_tower) for folder in args.folders]
    for one in holdings:
        print(one.folder)
        for key, value in describe(one).items():
            say(f"  {key:<12}{value}")
    if len(holdings) < 2:
        return 0
    found = 0
    for found, line in enumerate(differences(*holdings), 1):
        if found <= args.max_lines:
            say(f"differs: {line}")
    if found > args.max_lines:
        print(f"... and {found - args.max_lines} more")
    print(f"{found} differences" if found else f"all {len(holdings[0].names())} tensors and all sizes are equal")
    return int(found > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="one folder, or two to compare")
    parser.add_argument(
        "--vision-tower", help=f"{tower_origins()} folder, for a Hugging Face folder that holds no tower"
    )
    parser.add_argument("--max-lines", type=int, default=40, help="differences to print")
    args = parser.parse_args()
    if len(args.folders) > 2:
        parser.error("give one folder, or two to compare")
    return args


if __name__ == "__main__":
    with streams_that_may_fail(output_is_all=True):
        try:
            raise SystemExit(inspect(parse()))
        except (ValueError, OSError) as error:
            exit_with_error(error)
