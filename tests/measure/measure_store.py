"""What training out of an object store costs beside the folder: the loader alone, and a tiny training.

    OMP_NUM_THREADS=1 python -m tests.measure.measure_store [--pairs 5] [--latency-ms 20] [--cache-gb 0] [--train]

600 JPEGs of 640 x 480 (some 100 KB) in shards. The store is a server of this host, in a process of its own, which
answers GET with ranges as S3 does, each after the latency. It shares the cores, so its CPU time is shown too. Pairs are
interleaved: folder, store, folder, store ...
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from hacl_megatron.data.prepare.run import PrepareSettings, run_prepare
from hacl_megatron.data.step_maker import MicroBatching
from tests.data.loader_runs import loader_of
from tests.data.tiny_tokenizer import write_tokenizer
from tests.training.runs import make_inputs

NUM_IMAGES, BATCH = 600, 16


def draw_data(folder: Path) -> None:
    """data.json and images/ of smooth noise, which compresses as photographs do."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(NUM_IMAGES):
        small = np.random.default_rng(index).integers(0, 256, (60, 80, 3)).astype(np.uint8)
        noise = np.random.default_rng(index).normal(0, 12, (480, 640, 3))
        image = np.asarray(Image.fromarray(small).resize((640, 480), Image.BICUBIC)) + noise
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{index}.jpg", quality=85)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"image {index}"}]
        records.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    write_tokenizer(folder / "tokenizer", legacy=True)


class _Server(asyncio.Protocol):
    """GET /bucket/KEY of files below a folder, as S3 answers it; nothing is signed or checked."""

    root: Path
    latency: float
    files: dict[str, bytes]

    def connection_made(self, transport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[:end].decode("latin1"), self.buffer[end + 4 :]
            asyncio.get_running_loop().call_later(self.latency, self._answer, head)

    def _answer(self, head: str) -> None:
        key = head.split(" ", 2)[1].split("?")[0].removeprefix("/bucket/")
        path = self.root / key
        if key not in self.files and not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        whole = self.files.setdefault(key, path.read_bytes() if key not in self.files else b"")
        about = b'ETag: "1"\r\nLast-Modified: Fri, 27 Nov 2026 00:00:00 GMT\r\n'
        if found := re.search(r"(?im)^range: bytes=(\d+)-(\d+)", head):
            start, end = int(found[1]), min(int(found[2]) + 1, len(whole))
            about += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, len(whole))
            status, body = b"206 Partial Content", memoryview(whole)[start:end]
        else:
            status, body = b"200 OK", memoryview(whole)
        self.transport.write(b"HTTP/1.1 %s\r\n%bContent-Length: %d\r\n\r\n" % (status, about, len(body)))
        self.transport.write(body)


def serve(root: str, latency: float, port, cpu) -> None:
    _Server.root, _Server.latency, _Server.files = Path(root), latency, {}

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        while True:
            await asyncio.sleep(0.05)
            cpu.value = time.process_time()

    asyncio.run(run())


def load(folder: Path, place: str, cache: Path, gb: float, threads: int) -> tuple[float, float]:
    """Images a second of the loader over an epoch, the first step left out; and its CPU time."""
    start_cpu = resource.getrusage(resource.RUSAGE_SELF)
    flags = {"data_cache_dir": str(cache), "data_cache_gb": gb, "io_threads": threads, "num_workers": 1}
    with loader_of(
        folder, data_paths=[place], contrastive_paths=[], micro_batching=MicroBatching(micro_batch_size=BATCH),
        global_batch_size=BATCH, flags=flags,
    ) as loader:  # fmt: skip
        next(loader)
        start = time.perf_counter()
        steps = NUM_IMAGES // BATCH - 1
        for _ in range(steps):
            assert not next(loader).bad_samples
        seconds = time.perf_counter() - start
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    return steps * BATCH / seconds, cpu.ru_utime + cpu.ru_stime - start_cpu.ru_utime - start_cpu.ru_stime


def train(folder: Path, place: str, cache: Path, gb: float, threads: int) -> tuple[float, float]:
    """The same of a training of a tiny LLaVA, from its second step on; CPU time of the whole process."""
    save = folder / "run"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable, "-m", "hacl_megatron.train", "--config", str(folder / "tiny/pretrain.yaml"),
        "--data-path", place, "--image-folder", ".", "--save", str(save), "--device", "cpu", "--global-batch-size",
        str(BATCH), "--micro-batch-size", str(BATCH), "--train-iters", str(NUM_IMAGES // BATCH), "--io-threads",
        str(threads), "--data-cache-dir", str(cache), "--data-cache-gb", str(gb), "--save-interval", "0",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()][1:]
    shutil.rmtree(save)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return len(rows) * BATCH / sum(row["iteration-time"] for row in rows), cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--cache-gb", type=float, default=20)
    parser.add_argument("--io-threads", type=int, default=8)
    parser.add_argument("--train", action="store_true", help="a training in the loader's place")
    args = parser.parse_args()
    one = train if args.train else load
    folder = Path(tempfile.mkdtemp(prefix="measure_store-"))
    context = multiprocessing.get_context("fork")
    port, cpu = context.Value("i", 0), context.Value("d", 0)
    draw_data(folder)
    if args.train:
        make_inputs(folder / "tiny")
    run_prepare(
        PrepareSettings(
            inputs=[str(folder / "data.json")], output=str(folder / "prepared"), image_folder=str(folder / "images"),
            write_shards=True, images_per_shard=128, progress_bar=False,
        )
    )  # fmt: skip
    server = context.Process(target=serve, args=(str(folder), args.latency_ms / 1000, port, cpu), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.05)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port.value}", AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s"
    )
    ratios, warm = [], []
    try:
        for number in range(args.pairs):
            cache = folder / f"cache-{number}"
            local, local_cpu = one(folder, str(folder / "prepared"), cache, args.cache_gb, args.io_threads)
            before = cpu.value
            store, store_cpu = one(folder, "s3://bucket/prepared", cache, args.cache_gb, args.io_threads)
            time.sleep(0.1)
            served = cpu.value - before
            again, _ = one(folder, "s3://bucket/prepared", cache, args.cache_gb, args.io_threads)
            ratios.append(store / local)
            warm.append(again / local)
            print(
                f"pair {number}: folder {local:.0f} images/s ({local_cpu:.2f} s CPU), store {store:.0f} "
                f"({store_cpu:.2f} s and the server's {served:.2f}): {ratios[-1]:.2f}; "
                f"once more {again:.0f}: {warm[-1]:.2f}",
                flush=True,
            )
    finally:
        server.terminate()
        shutil.rmtree(folder)
    print(f"median of {args.pairs} pairs: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
          f"once more {statistics.median(warm):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
