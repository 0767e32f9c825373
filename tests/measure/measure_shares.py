"""Preparing many image-caption pairs in shares: time, memory and size of each step, and what opening the result costs.

    OMP_NUM_THREADS=1 python -m tests.measure.measure_shares [--records 2000000] [--shares 4] [--rows 20000000]

Records are pairs as of CC12M (some 300 bytes of JSON), one in 50 a duplicate. The shares run one after another, each as
a task of an array would. `--rows` then opens a manifest of so many rows, repeated from the one that was made.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa

from hacl_megatron.data.prepare.arrow_manifest import SCHEMA, ArrowManifest, with_metadata
from hacl_megatron.data.prepare.sealed_arrow import open_sealed, write_sealed
from tests.data.tiny_tokenizer import WORDS
from tests.measure.measure_prepare import MORE_WORDS, OPEN, ROOT, run


def write_pairs(path: Path, count: int) -> None:
    words = [*WORDS.split(), *MORE_WORDS.split()]
    with open(path, "w") as file:
        for index in range(count):
            number = index - 1 if index % 50 == 49 else index
            caption = " ".join(random.Random(number).choices(words, k=12))
            turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
            name = f"{number:09d}"
            file.write(json.dumps({"id": name, "image": f"{name[:5]}/{name}.jpg", "conversations": turns}) + "\n")


def repeat(source: Path, target: Path, rows: int) -> None:
    """A manifest of the same record batches again and again, with contents of their own."""
    reader = open_sealed(str(source))
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    content = SCHEMA.get_field_index("content")

    def endless():
        done = number = 0
        while done < rows:
            batch = batches[number % len(batches)]
            batch = batch.slice(0, min(batch.num_rows, rows - done))
            numbers = pa.array(range(done, done + batch.num_rows), pa.uint64())
            yield batch.set_column(content, SCHEMA.field(content), numbers)
            done, number = done + batch.num_rows, number + 1

    about = {key: value for key, value in ArrowManifest(str(source)).metadata.items() if key != "format"}
    write_sealed(str(target), with_metadata(about), endless())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--shares", type=int, default=4)
    parser.add_argument("--rows", type=int, default=20_000_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="measure_shares-"))
    try:
        source, one, shared = folder / "pairs.jsonl", folder / "one", folder / "shared"
        write_pairs(source, args.records)
        print(f"{args.records:,} records, {source.stat().st_size / 1e9:.2f} GB of JSON lines", flush=True)
        tool = [sys.executable, "tools/prepare_data.py", "--num-workers", "1", "--input", str(source)]
        run("one process", [*tool, "--output", str(one)])
        flags = ["--output", str(shared), "--num-shards", str(args.shares)]
        for index in range(args.shares):
            run(f"share {index} of {args.shares}", [*tool, *flags, "--shard-index", str(index)])
        run("merge", [*tool, *flags, "--merge"])
        same = subprocess.run(["cmp", one / "manifest.arrow", shared / "manifest.arrow"]).returncode == 0
        size = (one / "manifest.arrow").stat().st_size
        print(f"manifests are {'equal' if same else 'DIFFERENT'}; {size / 1e9:.2f} GB", flush=True)
        source.unlink()
        shutil.rmtree(shared)
        if args.rows:
            repeat(one / "manifest.arrow", folder / "many.arrow", args.rows)
            print(f"{args.rows:,} rows: {(folder / 'many.arrow').stat().st_size / 1e9:.2f} GB", flush=True)
            done = subprocess.run(
                [sys.executable, "-c", OPEN, str(folder / "many.arrow")], cwd=ROOT, capture_output=True, text=True
            )
            print(done.stdout or done.stderr[-2000:])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
