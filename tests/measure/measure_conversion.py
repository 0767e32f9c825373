"""How long the conversion tools take beside `cp` and `sync` of the same bytes, and how much memory.

No test, for its result is a time; needs free disk of twice the model, under --folder:

    python -m tests.measure.measure_conversion --size 1.3B --repetitions 3 --folder /tmp/measure
    python -m tests.measure.measure_conversion --size 7B --repetitions 1 --folder /tmp/measure

Writes a LLaVA of random bf16 weights and then, in turns: copies it, converts it into a distributed checkpoint, copies
that, converts it back. Each time is that of the command and a `sync` after it. Before each, everything is synced and
the data's pages are dropped from the page cache (posix_fadvise, which needs no privilege); those of programs and
libraries stay, for cp as for Python. The result of one repetition is the source of the next, so that two copies at most
are on the disk; at the end every tensor must be what it was at the beginning.

Anonymous memory is RssAnon of /proc/PID/status, summed over the tool's process tree and sampled every 10 ms.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

from hacl_megatron.checkpoint.hf.config_write import to_config_json, to_preprocessor_json
from hacl_megatron.checkpoint.hf.json_files import write_json
from hacl_megatron.checkpoint.hf.names import NameTable
from hacl_megatron.checkpoint.hf.safetensors_writer import SafetensorsWriter
from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig

TOOLS = Path(__file__).parents[2] / "tools"
# Language model: layers, width, feed-forward width, heads. The tower is always CLIP ViT-L/14 of 336 pixels.
SIZES = {"0.1B": (4, 1024, 2752, 8), "1.3B": (24, 2048, 5504, 16), "7B": (32, 4096, 11008, 32)}
SHARD_BYTES = 5 * 10**9


def model_config(size: str) -> ModelConfig:
    layers, hidden, ffn, heads = SIZES[size]
    return ModelConfig(
        language=LanguageConfig(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
            num_query_groups=heads, vocab_size=32064,
        ),
        vision=VisionConfig(
            num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, image_size=336, patch_size=14
        ),
        image=ImageConfig(size=336),
        extra={"layout": "hf", "image_token_index": 32000, "pad_token_id": 32001},
    )  # fmt: skip


def write_llava(folder: Path, config: ModelConfig) -> None:
    """A Hugging Face folder without a tokenizer, in shards; values are drawn from one block of random ones."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_config_json(config, "hf", dtype="bfloat16"))
    write_json(folder / "preprocessor_config.json", to_preprocessor_json(config))
    table, shards, filled = NameTable(config), [{}], 0
    for canonical, shape in (table.expected | table.carried).items():
        if canonical.startswith("heads."):
            continue
        num_bytes = 2 * torch.Size(shape).numel()
        if filled + num_bytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][table.spelled(canonical, "hf")] = (torch.bfloat16, shape)
        filled += num_bytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for file, shard in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / file, shard) as writer:
            for name, (_, shape) in shard.items():
                count, start = torch.Size(shape).numel(), zlib.crc32(name.encode()) % len(block)
                repeats = -(-(start + count) // len(block))
                writer.write(name, block.repeat(repeats)[start : start + count].reshape(shape))


def checksums(folder: Path) -> dict[str, int]:
    """Spelled name -> CRC-32 of a tensor's bytes."""
    sums = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                sums[name] = zlib.crc32(opened.get_tensor(name).view(torch.uint8).numpy())
    return sums


def drop_pages(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its children; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return 0
    own = next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_bytes(int(child)) for child in " ".join(children).split())


def timed(command: list[object], source: Path) -> tuple[float, float]:
    """Seconds of a command and a sync, and the peak of its anonymous bytes."""
    drop_pages(source)
    peak, start = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        if process.returncode != 0:
            log.seek(0)
            raise SystemExit(f"{command} ended with status {process.returncode}\n{log.read()[-2000:]}")
    os.sync()
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workers", type=int, help="default: the tools' own")
    parser.add_argument("--folder", type=Path, required=True, help="made here, and deleted at the end")
    args = parser.parse_args()
    workers = ["--workers", args.workers] if args.workers else []
    args.folder.mkdir(parents=True)
    hf, save, copy = args.folder / "hf", args.folder / "save", args.folder / "copy"
    seconds: dict[str, list[float]] = {"in": [], "out": []}
    ratios: dict[str, list[float]] = {"in": [], "out": []}
    peaks: dict[str, list[float]] = {"in": [], "out": []}

    def compare(direction: str, source: Path, tool: list[object]) -> None:
        copied, _ = timed(["cp", "-r", "--reflink=never", source, copy], source)
        size = num_bytes(copy)
        shutil.rmtree(copy)
        took, peak = timed([sys.executable, TOOLS / tool[0], *tool[1:], *workers], source)
        shutil.rmtree(source)
        seconds[direction].append(took)
        ratios[direction].append(took / copied)
        peaks[direction].append(peak)
        print(
            f"{direction:3}  cp + sync {copied:6.2f} s ({size / copied / 1e9:.2f} GB/s), conversion {took:6.2f} s "
            f"({size / took / 1e9:.2f} GB/s), ratio {took / copied:.2f}, anonymous memory {peak / 1e9:.2f} GB",
            flush=True,
        )

    try:
        config = model_config(args.size)
        write_llava(hf, config)
        before = checksums(hf)
        table = NameTable(config)
        largest = max(2 * torch.Size(rule.shape).numel() for rule in table.rules.values())
        print(f"{args.size}: {num_bytes(hf) / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
        for _ in range(args.repetitions):
            compare("in", hf, ["convert_hf_to_megatron.py", "--hf-path", hf, "--save", save])
            compare("out", save, ["convert_megatron_to_hf.py", "--load", save, "--hf-path", hf])
        for direction in seconds:
            print(
                f"median of {direction}: {statistics.median(seconds[direction]):.2f} s, "
                f"ratio {statistics.median(ratios[direction]):.2f}, memory {max(peaks[direction]) / 1e9:.2f} GB at most"
            )
        after = checksums(hf)
        print(f"tensors the same after {args.repetitions} round trips: {before == after}")
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
