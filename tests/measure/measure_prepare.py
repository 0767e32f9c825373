"""Times and weighs `tools/prepare_data.py` and the opening of its manifest, beside `json.load` of the same file.

    OMP_NUM_THREADS=1 python -m tests.measure.measure_prepare [--samples 665000] [--folder /tmp/prepare] [--workers 2]

Memory is RssAnon (pages no file stands behind), summed over the process tree, sampled every 50 ms.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from PIL import Image

from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.order.sampler import Sampler
from tests.data.tiny_tokenizer import WORDS, write_tokenizer

ROOT = Path(__file__).parents[2]
MORE_WORDS = "sunny garden with colourful balls children wooden bench under tall tree"


def write_json(path: Path, samples: int) -> None:
    """LLaVA-like records: one to six questions with answers, about 1.5 kB each; one in 16 without an image."""
    words = [*WORDS.split(), *MORE_WORDS.split()]
    rng = random.Random(0)
    with open(path, "w") as file:
        file.write("[\n")
        for index in range(samples):
            turns = []
            for number in range(rng.randint(1, 6)):
                question = " ".join(rng.choices(words, k=14))
                turns.append({"from": "human", "value": ("<image>\n" if number == 0 and index % 16 else "") + question})
                turns.append({"from": "gpt", "value": " ".join(rng.choices(words, k=45))})
            record = {"id": f"{index:09d}", "conversations": turns}
            if index % 16:
                record["image"] = f"coco/train2017/{index // 2:012d}.jpg"
            file.write((",\n" if index else "") + json.dumps(record))
        file.write("\n]\n")


def anonymous_bytes(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except (OSError, psutil.Error):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


def run(name: str, command: list[str]) -> str:
    """Runs a command; prints its wall and CPU time and its peak of anonymous memory. Returns its output."""
    load = os.getloadavg()[0]
    start = time.monotonic()
    child = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = cpu = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child))
        with contextlib.suppress(psutil.Error):
            cpu = max(cpu, sum(child.cpu_times()[:2]))
        time.sleep(0.05)
    seconds = time.monotonic() - start
    output = child.stdout.read()
    assert child.returncode == 0, output
    print(
        f"{name:<24}{seconds:8.1f} s   CPU {cpu:6.1f} s   peak anonymous {peak / 1e6:5.0f} MB  (load {load:.1f})",
        flush=True,
    )
    return output


OPEN = """
import re, sys, time
def anon(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
import torch, numpy, PIL.Image
bare = anon()
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.order.sampler import Sampler
imported = anon()
start, cpu = time.perf_counter(), time.process_time()
manifest = Manifest.read([sys.argv[1]], version="v1")
digest = manifest.digest
opened, cpu = time.perf_counter() - start, time.process_time() - cpu
sampler = Sampler(len(manifest), 0, seed=1, global_batch_size=256)
start = time.perf_counter()
for _ in range(20):
    for _, index in sampler.next_batch(): manifest[index]
each = (time.perf_counter() - start) / 20 / 256
print(f"open {opened:.2f} s (CPU {cpu:.2f} s)")
print(f"RssAnon {imported - bare:.0f} MB by imports beyond torch, {anon() - imported:.0f} MB by "
      f"manifest and sampler, a random sample {each * 1e6:.0f} us, first epoch's order included")
"""

FIRST = """
import re, sys, time
def anon(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
from tests.data.loader_runs import MODEL
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.loader import build_loader
from hacl_megatron.data.step_maker import MicroBatching
from hacl_megatron.data.tokenizer import load_tokenizer
folder, prepared = sys.argv[1:]
tokenizer = load_tokenizer(f"{folder}/tokenizer")
before, start, cpu = anon(), time.perf_counter(), time.process_time()
with build_loader(
    RunConfig(
        data=DataFlags(data_path=[prepared], image_folder=f"{folder}/images", prefetch_steps=1), architecture=MODEL
    ),
    tokenizer, global_batch_size=32,
    micro_batching=MicroBatching(micro_batch_size=32), data_parallel_rank=0, data_parallel_size=1, pad_multiple=1,
) as loader:
    step = next(loader)
    print(f"first batch of 32 after {time.perf_counter() - start:.2f} s (CPU "
          f"{time.process_time() - cpu:.2f} s), {len(step.bad_samples)} bad samples, "
          f"RssAnon {anon() - before:.0f} MB by loader, decoder and batch")
"""


def write_first_images(folder: Path, prepared: Path) -> None:
    """The 640 x 480 photographs (noise) of the first 64 samples that a run of the default seed draws."""
    manifest = Manifest.read([str(prepared)], version="v1")
    for _, index in Sampler(len(manifest), 0, seed=1234, global_batch_size=64).next_batch():
        if manifest[index].image:
            path = folder / "images" / manifest[index].image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((640, 480), 60).convert("RGB").save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=665_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/measure_prepare"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / f"{args.samples}.json"
    if not source.is_file():
        write_json(source, args.samples)
    tokenizer = write_tokenizer(args.folder / "tokenizer", legacy=True)
    print(f"{args.samples} records, {source.stat().st_size / 1e9:.2f} GB of JSON, {os.cpu_count()} cores")
    tool = [sys.executable, "tools/prepare_data.py", "--num-workers", str(args.workers), "--input", str(source)]
    prepared = args.folder / "prepared"
    run("json.load", [sys.executable, "-c", f"import json; json.load(open({str(source)!r}))"])
    run("prepare", [*tool, "--output", str(prepared)])
    run("prepare, token lengths", [*tool, "--output", str(args.folder / "tokens"), "--tokenizer", tokenizer])
    print(run("open and draw 20 x 256", [sys.executable, "-c", OPEN, str(prepared)]), end="")
    write_first_images(args.folder, prepared)
    print(run("first batch", [sys.executable, "-c", FIRST, str(args.folder), str(prepared)]), end="")


if __name__ == "__main__":
    main()
