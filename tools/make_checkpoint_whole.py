"""Copies a checkpoint with the frozen weights it refers to, so that the copy needs nothing beside its own folder.

    python tools/make_checkpoint_whole.py --load SAVE/iter_0000100 --save OUT

OUT is then given wherever an iter_* folder is: --load, --pretrained-checkpoint, the conversions. Without this, keep
`SAVE/frozen` beside an iter_* folder that is copied elsewhere.
"""

import argparse
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, type=Path, help="an iter_* folder, or a SAVE folder (its newest)")
    parser.add_argument("--save", required=True, type=Path, help="folder to write; must not exist")
    return parser.parse_args()


def main() -> None:
    from hacl_megatron.checkpoint.run.whole import make_whole

    args = parse()
    out = make_whole(args.load, args.save)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e9:.3f} GB, whole by itself")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            main()
        except (ValueError, OSError) as error:
            exit_with_error(error)
