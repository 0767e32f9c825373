"""Damages prepared folders at random and counts what becomes of each: refused, harmless, or something worse.

    OMP_NUM_THREADS=1 python -m tests.measure.fuzz_manifests [--count 2000] [--seed 0]

A case changes a manifest, a tar shard or an index of a killed start (bits, bytes, holes, cuts, moved blocks), or a
manifest whose checksum is made to hold again, as a stranger's would. Then everything is read, in a process of its own
that may take 2 GB more than it had and 10 seconds. Exits with 1 if a case was worse than refused or harmless.

    refused    one line that names the file          silent     another record or image, unnoticed
    bad image  that sample's alone                   traceback  an error that is none for users
    harmless   all as it was written                 crash      the process ended; memory, slow: its bounds
    as written a checksum that was made to hold: whatever is in the file, read or refused
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.prepare import parts
from hacl_megatron.data.store import ImageStore, UnusableImage
from tests.hostile.prepared import prepare

MEMORY_BYTES, SECONDS = 2 << 30, 10
FINE = {"refused", "bad image", "harmless", "as written"}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to eight changes of one kind."""
    changed = bytearray(data)
    kind = rng.choice(("bit", "bit", "byte", "number", "hole", "cut", "move", "insert"))
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(changed))
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[at] = rng.randrange(256)
        elif kind == "number":  # an offset or a length
            value = rng.choice((-1, 1 << 31, (1 << 62) - 8, 1 << 20, rng.getrandbits(63)))
            at -= at % 8
            changed[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")[: len(changed) - at]
        elif kind == "hole":
            end = min(len(changed), at + rng.choice((8, 512, 4096)))
            changed[at:end] = bytes(end - at)
        elif kind == "cut":
            del changed[at:]
        elif kind == "move":
            block = changed[at : at + 64]
            del changed[at : at + 64]
            to = rng.randrange(len(changed) + 1)
            changed[to:to] = block
        else:
            changed[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
        if len(changed) < 2:
            break
    return bytes(changed)


def contents(out: Path) -> dict[str, Any]:
    """All that a run takes from a prepared folder; a bad image is its reason, marked as one."""
    manifest = Manifest.read([str(out)], version="v1")
    samples = list(manifest)
    store = ImageStore(out)
    images: list[Any] = []
    for sample in samples:
        try:
            images.append([*map(store.fetch, sample.images, sample.stored)])
        except UnusableImage as error:
            images.append(error)
    store.close()
    lengths = manifest.modality_lengths().tolist()
    return {"samples": samples, "digest": manifest.digest, "lengths": lengths, "remarks": list(manifest.remarks()),
            "images": images}  # fmt: skip


def verdict(target: str, file: Path, expected: Any) -> str:
    """What becomes of a damaged file."""
    try:
        if target == "index":
            found = parts.read_part(str(file))
            found.validate()
            return "harmless" if found.to_pylist() == expected else "silent"
        found = contents(file.parent if target != "shard" else file.parents[1])
    except ValueError as error:
        text = str(error)
        plain = type(error) is ValueError and "\n" not in text and file.name in text
        return "refused" if plain else f"traceback {type(error).__name__}: {text[:80]}"
    except MemoryError:
        return "memory"
    except Exception as error:
        return f"traceback {type(error).__name__}: {str(error)[:80]}"
    if target == "resealed":
        return "as written"
    bad = [isinstance(image, UnusableImage) for image in found["images"]]
    found["images"] = [e if b else i for i, e, b in zip(found["images"], expected["images"], bad, strict=False)]
    return "silent" if found != expected else "bad image" if any(bad) else "harmless"


def run_cases(cases: list[tuple[str, bytes]], files: dict[str, Path], expected: dict[str, Any], pipe: Any) -> None:
    """The child: a verdict for each case down the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for target, data in cases:
        signal.alarm(SECONDS)  # ends the process, which the parent sees
        files[target].unlink(missing_ok=True)
        files[target].write_bytes(data)
        if target == "resealed":
            from hacl_megatron.data.prepare.sealed_arrow import seal

            try:
                with open(files[target], "rb+") as file:
                    seal(file)
            except ValueError:
                pass  # so damaged that there is no place for one
        pipe.send(verdict(target, files[target], expected[target]))
        if target == "shard":
            files[target].write_bytes(expected["whole shard"])
        elif target != "index":
            files[target].write_bytes(expected["whole manifest"])
    pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-manifests-"))
    try:
        counts = fuzz(folder, args.count, random.Random(args.seed))
    finally:
        shutil.rmtree(folder)
    for target, kind in sorted(counts):
        print(f"{target:<10}{counts[target, kind]:6}  {kind}")
    worse = sum(count for (_, kind), count in counts.items() if kind not in FINE)
    print(f"{sum(counts.values())} cases, {worse} worse than refused or harmless")
    sys.exit(worse > 0)


def fuzz(folder: Path, count: int, rng: random.Random) -> Counter[tuple[str, str]]:
    """The number of cases by (what was damaged, what became of it)."""
    out = prepare(folder / "data")
    (part,), _ = parts.build_parts([str(folder / "data" / "a.json")], str(folder), deduplicate=False, num_workers=1)
    manifest, shard = out / "manifest.arrow", out / "shards" / "images-000000.tar"
    files = {"manifest": manifest, "resealed": manifest, "shard": shard, "index": Path(part)}
    whole = {target: path.read_bytes() for target, path in files.items()}
    whole_contents = contents(out)
    expected = dict.fromkeys(files, whole_contents) | {
        "index": parts.read_part(part).to_pylist(), "whole manifest": whole["manifest"], "whole shard": whole["shard"],
    }  # fmt: skip
    has_seals = "checksum" in vars(sys.modules["hacl_megatron.data.store"])
    targets = ["manifest"] * 6 + ["shard", "index"] + ["resealed"] * 2 * has_seals
    cases = [(target := rng.choice(targets), mutate(whole[target], rng)) for _ in range(count)]
    counts: Counter[tuple[str, str]] = Counter()
    context = multiprocessing.get_context("fork")
    done = 0
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=run_cases, args=(cases[done:], files, expected, theirs))
        child.start()
        theirs.close()
        try:
            while True:
                start = time.monotonic()
                found = ours.recv()
                seconds = time.monotonic() - start
                counts[cases[done][0], found if seconds < SECONDS else "slow"] += 1
                done += 1
        except EOFError:
            pass
        child.join()
        if done < count:
            counts[cases[done][0], "slow" if child.exitcode == -signal.SIGALRM else f"crash {child.exitcode}"] += 1
            done += 1
            manifest.write_bytes(whole["manifest"])
            shard.write_bytes(whole["shard"])
    return counts


if __name__ == "__main__":
    main()
