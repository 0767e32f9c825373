"""What the checksums of a checkpoint's records cost when it is loaded.

No test, for its result is a time; needs free disk of twice the model, under --folder:

    python -m tests.measure.measure_checksums --size 7B --repetitions 3 --folder /tmp/measure

Converts a LLaVA of random bf16 weights, then reads every record of the checkpoint as a load does, in turns with its
checksums compared and without. Before each the data's pages are dropped from the page cache; `--warm` leaves them.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hacl_megatron.checkpoint.run.stored.parts import StoredParts
from tests.measure.measure_conversion import SIZES, TOOLS, model_config, write_llava


def checkpoint_of(size: str, folder: Path) -> Path:
    """A converted LLaVA's `iter_0000000` in `folder`; made once."""
    found = folder / f"megatron-{size}"
    if not found.exists():
        write_llava(folder / "hf", model_config(size))
        command = [sys.executable, str(TOOLS / "convert_hf_to_megatron.py"), "--hf-path", str(folder / "hf")]
        subprocess.run([*command, "--save", str(found)], check=True)
        shutil.rmtree(folder / "hf")
    return found / "iter_0000000"


def drop(folder: Path) -> None:
    """The pages of its files, from the page cache."""
    for path in folder.glob("*.distcp"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(folder: Path, *, compared: bool) -> float:
    """To read and decode every tensor, one after another."""
    start = time.perf_counter()
    parts = StoredParts(folder)
    assert parts.has_checksums
    if not compared:
        parts._checksums = None
    for key, tensor in parts.index.tensors.items():
        for chunk in tensor.chunks:
            parts.values(key, chunk)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="1.3B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--warm", action="store_true", help="from the page cache")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = checkpoint_of(args.size, args.folder)
    size = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.repetitions):
        for compared in (True, False) if number % 2 else (False, True):
            if not args.warm:
                drop(folder)
            times[compared].append(seconds(folder, compared=compared))
            print(f"{'with' if compared else 'without'}: {times[compared][-1]:.2f} s", flush=True)
    medians = {compared: statistics.median(found) for compared, found in times.items()}
    share = medians[True] / medians[False] - 1
    print(f"{size / 1e9:.1f} GB: {medians[False]:.2f} s without, {medians[True]:.2f} s with: {share:+.1%}")


if __name__ == "__main__":
    main()
