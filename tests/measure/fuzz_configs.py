"""Mutates the JSON and tokenizer files of model folders, and opens each in a process of its own.

    OMP_NUM_THREADS=1 python -m tests.measure.fuzz_configs [--count 500] [--seed 0] [--keep FOLDER]

Of every mutant the conversion's and a run's first steps are asked: sizes, names of weights, tokenizer, the export
without its weights. Allowed are an answer, and a ValueError of one line from this project; each in 10 s and 2 GB.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.convert.export_check import check_export
from hacl_megatron.checkpoint.hf.assets.write import ChatTemplate
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.hf.import_weights import open_sources
from hacl_megatron.checkpoint.run.folder import copy_assets
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.tokenizer import load_tokenizer
from tests.tiny import write_tiny_blip2, write_tiny_llava, write_tiny_original_llava

SECONDS, BYTES = 10, 2 << 30
PACKAGE = str(Path(__file__).parents[2] / "hacl_megatron")
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, -(10**12), 2**63, 10**40, 0.5, 1e-300, 1e300, -0.0, "", "0", "a",
    "1" * 5000, "/etc/passwd", "../../x", "\x00", "\ud800", "{{ 1/0 }}", "<image>", [], {}, [[]], [1, 2], {"a": 1},
    {"content": "<x>"}, [{"id": 5}], {"name": {}}, {"height": 10**12, "width": 10**12}, "llava", "clip", "auto_map",
]  # fmt: skip
TEXTS = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 10**6, b'{"a":' * 10**5, b"NaN",
    b'{"model_type": NaN}', b'{"model_type": "llava", "model_type": "llama"}', b'{"hidden_size": 1e999}',
    b'{"x": ' + b"9" * 10**5 + b"}", b"\x00" * 100, b"{}",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or object, key) of everything inside a JSON value."""
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, dict | list):
            yield from places(part)


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of `folder`, once or a few times; returns what was done."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model", ".jinja")]
    path = rng.choice(files)
    content = path.read_bytes()
    kind = rng.choice(["value"] * 6 + ["key", "text", "bytes", "cut", "node"])
    if kind in ("value", "key") and path.suffix == ".json":
        parsed = json.loads(content)
        done = []
        for _ in range(rng.choice([1, 1, 2, 4])):
            if not (found := list(places(parsed))):
                break
            # Settings rather than the many pieces of a vocabulary.
            holder, key = rng.choice(found[:300] if rng.random() < 0.8 else found)
            if kind == "key" and isinstance(holder, dict):
                holder[
                    rng.choice(["auto_map", "quantization_config", "num_labels", "id2label", "layer_types", "x"])
                ] = rng.choice(VALUES)
            elif rng.random() < 0.15:
                del holder[key]
            else:
                holder[key] = rng.choice(VALUES)
            done.append(str(key)[:40])
        path.write_text(json.dumps(parsed))
        return f"{path.name}: {kind} {done}"
    if kind == "node":
        path.unlink()
        node = rng.choice(["fifo", "folder", "link", "loop", "gone"])
        if node == "fifo":
            os.mkfifo(path)
        elif node == "folder":
            path.mkdir()
        elif node == "link":
            path.symlink_to("/etc/passwd")
        elif node == "loop":
            path.symlink_to(path.name)
        return f"{path.name}: {node}"
    if kind == "text":
        path.write_bytes(rng.choice(TEXTS))
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    else:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
    return f"{path.name}: {kind}"


def open_folder(folder: Path, tower: Path | None) -> None:
    """All that is asked of a folder before a weight is read."""
    steps = [lambda: load_tokenizer(str(folder)), lambda: copy_assets(folder, folder / "copy")]

    def model() -> None:
        config = read_model_config(folder, tower)
        open_sources(folder, config, vision_tower=tower)
        template = ChatTemplate(version="v1", jinja="{{ messages }}")
        check_export(RunConfig(architecture=config, data=data_flags(config)), folder, template)

    for step in [*steps, model]:
        try:
            step()
        except ValueError as error:
            raised = traceback.extract_tb(error.__traceback__)[-1].filename
            if not raised.startswith(PACKAGE):
                raise
            assert "\n" not in str(error) and len(str(error)) < 1500, error


def child(folder: Path, tower: Path | None) -> tuple[str, str]:
    """(what became of it, details), in a process of its own."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    if (process := os.fork()) == 0:
        os.close(reading)
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            open_folder(folder, tower)
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(code)
    os.close(writing)
    while (ended := os.wait4(process, os.WNOHANG))[0] == 0:
        if time.perf_counter() - started > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            os.close(reading)
            return "no answer", f"after {SECONDS} s"
        time.sleep(0.01)
    with os.fdopen(reading, "rb") as pipe:
        details = pipe.read().decode()
    _, status, usage = ended
    if usage.ru_maxrss * 1024 > BYTES:
        return "memory", f"{usage.ru_maxrss >> 10} MB"
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name
    return ("traceback", details) if os.WEXITSTATUS(status) else ("right", "")


def sources(folder: Path) -> list[tuple[Path, Path | None]]:
    """Small folders of three layouts, and the tower that goes with one of them."""
    original, _ = write_tiny_original_llava(folder / "original", layers=1, vision_layers=2, vision_tower_inside=False)
    return [
        (write_tiny_llava(folder / "hf", layers=1, vision_layers=2, max_shard_size="60KB"), None),
        (original, folder / "original-clip"),
        (write_tiny_blip2(folder / "blip2", layers=1, qformer_layers=1, vision_layers=2), None),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for mutants that were not answered as they should be")
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folders = sources(Path(name))
        for folder, tower in folders:
            assert child(folder, tower) == ("right", ""), child(folder, tower)
        for number in range(args.count):
            rng = random.Random(f"{args.seed} {number}")
            folder, tower = folders[number % len(folders)]
            mutant = Path(shutil.copytree(folder, Path(name) / "mutant" / folder.name))
            done = mutate(mutant, rng)
            started = time.perf_counter()
            outcome, details = child(mutant, tower)
            slowest = max(slowest, time.perf_counter() - started)
            counts[outcome] += 1
            if outcome != "right":
                print(f"{number} {folder.name} {done}: {outcome}\n{details}", flush=True)
                if args.keep:
                    shutil.copytree(mutant, args.keep / str(number), symlinks=True)
            shutil.rmtree(mutant.parent)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{args.count} mutants: {dict(counts)}; slowest {slowest:.1f} s, most memory {peak} MB")
    return int(counts["right"] != args.count)


if __name__ == "__main__":
    sys.exit(main())
