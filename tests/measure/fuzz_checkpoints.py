"""Damages checkpoints at random and loads them: `python -m tests.measure.fuzz_checkpoints --count 500`.

Bits, bytes, cuts and additions in `.metadata`, `common.pt`, `.distcp`, `files.json`, `run_config.yaml`, `metadata.json`
and the latest file of a tiny checkpoint, half of them without `files.json`, as an older one. Each is chosen, read whole
(every weight, object and plain value) and compared in a child with 2 GB of memory. Right is a refusal of one line, or
the very values that were written. Without checksums a changed value cannot be told from a right one, and is counted
apart. Wrong is anything else: a crash, another error, a silent change, more memory, more than 10 s.
"""

import argparse
import collections
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hacl_megatron.checkpoint.run.choose import choose_checkpoint
from hacl_megatron.checkpoint.run.folder import read_run_config
from hacl_megatron.checkpoint.run.load import load_common_state
from hacl_megatron.checkpoint.run.stored.parts import StoredParts

MEMORY = 2 << 30
SECONDS = 10
FILES = (".metadata", "common.pt", "__0_0.distcp", "files.json", "run_config.yaml", "metadata.json", "latest")
LATEST = "latest_checkpointed_iteration.txt"


def write_checkpoint(save: Path) -> None:
    """A conversion of the tiny LLaVA, with an object and plain values as a run has them."""
    import numpy as np

    from hacl_megatron.checkpoint.run import folder
    from hacl_megatron.checkpoint.run.part_files import Part, serialized, write_parts
    from hacl_megatron.checkpoint.run.publish import begin, partial_folder, publish
    from tests.tiny import write_tiny_llava
    from tests.tool_runs import to_megatron

    source = to_megatron(write_tiny_llava(save.with_name("in")), save.with_name("converted")) / "iter_0000000"
    parts = StoredParts(source)
    listed = [
        Part(key=key, values=parts.values(key, chunk), offsets=chunk.offsets, global_shape=entry.size)
        for key, entry in parts.index.tensors.items()
        for chunk in entry.chunks
    ]
    state = {"numpy": np.random.get_state(), "torch": torch.get_rng_state(), "python": random.getstate()}
    listed.append(Part(key="random_states/shard_0_1", values=serialized([state])))
    begin(save, 1)
    publish(
        save, 1, write_parts(partial_folder(save, 1), listed, 0), run_config=(source / "run_config.yaml").read_text(),
        common=serialized({"progress": {"iteration": 1}, "data_state": {"epoch": 0}, "layout": [1, 1, 1]}),
        write_assets=lambda target: folder.copy_assets(source / "hf_assets", target),
    )  # fmt: skip


def mutate(generator: random.Random, save: Path) -> str:
    """Damage one file of the checkpoint; returns what was done."""
    kind = generator.choice(FILES)
    path = save / LATEST if kind == "latest" else save / "iter_0000001" / kind
    content = bytearray(path.read_bytes())
    how = generator.choice(("bit", "bytes", "cut", "extend", "zeros", "swap"))
    at = generator.randrange(len(content))
    if kind == "latest" and generator.random() < 0.3:
        how, content = "text", bytearray(generator.choice(("²", "-1", "9" * 5000, "١", "\0")).encode())
    elif how == "bit":
        content[at] ^= 1 << generator.randrange(8)
    elif how == "bytes":
        for _ in range(generator.randrange(1, 9)):
            content[generator.randrange(len(content))] = generator.randrange(256)
    elif how == "cut":
        del content[at:]
    elif how == "extend":
        content += generator.randbytes(generator.randrange(1, 100))
    elif how == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    else:
        other = generator.randrange(len(content))
        content[at : at + 8], content[other : other + 8] = content[other : other + 8], content[at : at + 8]
    path.write_bytes(content)
    return f"{kind} {how}"


def values_of(save: Path) -> dict[str, Any]:
    """All that is in the checkpoint that `save` names, in comparable form."""
    checkpoint, _ = choose_checkpoint(save, fallback=False)
    if checkpoint is None:
        raise ValueError(f"{save} holds no checkpoint")
    config = read_run_config(checkpoint)
    parts = StoredParts(checkpoint)
    found: dict[str, Any] = {"common": repr(load_common_state(checkpoint)), "config": repr(config)}
    for key, entry in parts.index.tensors.items():
        for chunk in entry.chunks:
            values = parts.values(key, chunk).contiguous()
            found[f"{key}@{chunk.offsets}"] = (
                values.dtype,
                tuple(values.shape),
                values.view(torch.uint8).numpy().tobytes(),
            )
    for key in parts.index.objects:
        found[key] = repr(parts.object(key))
    return found


def judged(save: Path, right: dict[str, Any], sender) -> None:
    """In a child: what became of it, in one word, and the error."""
    started_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (started_with + MEMORY, started_with + MEMORY))
    try:
        found = values_of(save)
    except ValueError as error:
        line = str(error)
        sender.send(("refused", line) if "\n" not in line else ("several lines", line))
        return
    except BaseException as error:
        sender.send(("another error", f"{type(error).__name__}: {error}"))
        return
    changed = [key for key in right if found.get(key) != right[key]] + [key for key in found if key not in right]
    sender.send(("changed", ", ".join(changed)[:200]) if changed else ("right", ""))


def main() -> None:
    """Prints counts, and every case that is wrong; exits with 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="checkpoints to damage (500)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    context, wrong, slowest = multiprocessing.get_context("fork"), [], 0.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "save"
        write_checkpoint(whole)
        right = values_of(whole)
        for number in range(arguments.count):
            generator = random.Random(f"{arguments.seed} {number}")
            copy = shutil.copytree(whole, Path(folder) / "copy")
            has_sums = number % 2 == 0
            done = mutate(generator, copy)
            if not has_sums and not done.startswith("files.json"):
                (copy / "iter_0000001" / "files.json").unlink()
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=judged, args=(copy, right, sender))
            started = time.perf_counter()
            child.start()
            sender.close()
            try:
                outcome, text = receiver.recv() if receiver.poll(SECONDS) else ("too slow", "")
            except EOFError:
                outcome, text = "crash", ""
            slowest = max(slowest, time.perf_counter() - started)
            child.kill()
            child.join()
            # run_config.yaml is a text that people edit, and has no checksum.
            tells = has_sums and not done.startswith(("run_config.yaml", "files.json"))
            if outcome not in ("refused", "right") and not (outcome == "changed" and not tells):
                wrong.append(f"{number} {done}, {'with' if has_sums else 'without'} checksums: {outcome} {text}"[:300])
            counts[f"{'with' if has_sums else 'without'} checksums: {outcome}"] += 1
            shutil.rmtree(copy)
    for name, count in sorted(counts.items()):
        print(f"{count:5} {name}")
    print(f"slowest answer {slowest:.2f} s")
    print(*wrong, sep="\n")
    print(f"{len(wrong)} of {arguments.count} wrong")
    os._exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
