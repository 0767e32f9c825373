"""Prepares LLaVA JSON for training: one memory-mapped manifest, with checked images and tar shards if you like.

    python tools/prepare_data.py --input A.json [B.jsonl ...] --output OUT [--image-folder DIR]
        [--tokenizer DIR --version v1] [--verify-images] [--write-shards]

OUT is then a `--data-path`. Records whose id and content were met before are dropped; the same id with other content
becomes `id#2`, `id#3`, ... Killed half-way, the same command goes on where it stood.

Many processes share the work with --num-shards N and each its --shard-index, from 0; then one with --num-shards N
--merge makes of it what a single process would have made. With --write-shards both are run twice: the second time the
processes write the images' shards. JSON lines are divided among them, a JSON list is not.
"""

import argparse
import os

from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail
from hacl_megatron.config.flags import MAX_IMAGE_PIXELS
from hacl_megatron.data.templates import template_names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="LLaVA JSON or JSONL files")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the manifest and the shards")
    parser.add_argument("--image-folder", metavar="DIR", help="folder that image names are relative to")
    parser.add_argument("--tokenizer", metavar="DIR", help="also count the token lengths under this tokenizer")
    parser.add_argument("--version", choices=template_names(), default="v1", help="template of the token lengths")
    parser.add_argument(
        "--model-max-length", type=int, metavar="N", help="also name what will train nothing in a run with this flag"
    )
    parser.add_argument("--visual-tokens", type=int, default=576, help="rows of an image in that run")
    parser.add_argument(
        "--verify-images", action="store_true", help="decode every image; list unusable, name blank ones"
    )
    parser.add_argument("--write-shards", action="store_true", help="pack the images into WebDataset tar shards")
    parser.add_argument("--images-per-shard", type=int, default=4096, help="images of one shard")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep every record and its id as it is")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work, on any nodes")
    parser.add_argument("--shard-index", type=int, help="which of them this one is, from 0")
    parser.add_argument("--merge", action="store_true", help="join what the processes of --num-shards have done")
    parser.add_argument("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, help="larger images are unusable")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # The tool's own threads share the work out; the tokenizer's threads inside each would only get in their way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare

    values = vars(args)
    report = run_prepare(PrepareSettings(inputs=values.pop("input"), **values))
    to_do = report.pop("to do", None)
    for line in report.pop("to look at", []):
        say(f"note: {line}")
    for label, value in report.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        say(f"{label}: {text}")
    if to_do is not None:
        print(f"left to do: {to_do}")
        return
    print(f"written to {args.output}; train with --data-path {args.output}")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            main(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
