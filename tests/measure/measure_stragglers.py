"""Which replica the others wait for: samples dealt out by rows alone, as before, and by rows and views together.

    OMP_NUM_THREADS=1 python -m tests.measure.measure_stragglers [--replicas 2 4] [--steps 12] [--repetitions 2]

A LLaVA-OneVision with a tower larger than its language model, which pools features, so that a picture of many tiles is
much work and few rows; on drawn pictures of many sizes, dialogues without one, and records of several. The trainer
itself runs on gloo processes; the two sides take turns. FLOPs of replicas are what the trainer counts of its packs,
free of noise; CPU seconds are each process's own, which others on its core change little; `rank-time-spread` (slowest
rank over the median one, of two the faster) is read from metrics.jsonl, and processes that share a core with others
blur it. Medians over all steps but the first of each run.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

from PIL import Image

from tests import distributed
from tests.data.tiny_tokenizer import WORDS
from tests.distributed import run_distributed
from tests.tiny_tiles import write_tiny_onevision

TOWER = {"hidden": 320, "ffn": 1280, "layers": 24, "heads": 5}
LANGUAGE = {"hidden": 192, "ffn": 512, "layers": 2, "heads": 6, "groups": 6}
"""Wide enough that a FLOP takes about as long in it as in the tower; at a width of 48 it takes several times as long,
and then rows, not FLOPs, say which replica is last."""
LENGTH = 2048
GLOBAL_BATCH, MICRO_BATCH = 16, 2


def write_inputs(
    folder: Path,
    *,
    records: int,
    seed: int = 0,
    tower: dict[str, int] | None = None,
    language: dict[str, int] | None = None,
) -> Path:
    """Model, pictures and `mixed.json` in `folder`: one record in 5 has no picture, one in 4 has two to four."""
    write_tiny_onevision(folder / "model", tower=TOWER if tower is None else tower, **(language or {}))
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = LENGTH
    path.write_text(json.dumps(config))
    draw, words, found = random.Random(seed), WORDS.split(), []
    (folder / "images").mkdir()
    for number in range(records):
        kind = draw.random()
        count = 0 if kind < 0.2 else draw.randint(2, 4) if kind < 0.45 else 1
        names = [f"{number}-{index}.jpg" for index in range(count)]
        for name in names:
            size = tuple(int(24 * 10 ** draw.random()) for _ in range(2))
            Image.effect_noise(size, 60).convert("RGB").save(folder / "images" / name)
        question = " ".join(["<image>"] * count + draw.choices(words, k=8))
        answer = " ".join(draw.choices(words, k=draw.randint(5, 250)))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        found.append({"id": str(number), "conversations": turns} | ({"image": names} if names else {}))
    (folder / "mixed.json").write_text(json.dumps(found))
    return folder


def flags_of(folder: Path, save: Path, *more: str) -> list[str]:
    return [
        "--pretrained-checkpoint", str(folder / "model"), "--data-path", str(folder / "mixed.json"), "--version", "v1",
        "--image-folder", str(folder / "images"), "--model-max-length", str(LENGTH), "--contrastive-weight", "0",
        "--global-batch-size", str(GLOBAL_BATCH), "--micro-batch-size", str(MICRO_BATCH), "--save", str(save),
        "--max-bad-fraction", "1", "--make-vocab-size-divisible-by", "4", *more,
    ]  # fmt: skip


def record_packs(flags: list[str], by_rows: bool) -> list[dict[str, float]]:
    """Trains; of every step this rank's FLOPs, views and the rows of its fullest micro-batch."""
    from hacl_megatron.train import run
    from hacl_megatron.training import build
    from hacl_megatron.training.loop import Trainer

    found: list[dict[str, float]] = []
    own_numbers: Callable[..., Any] = Trainer._own_numbers

    def numbers(self, micro_batches, waited):
        own = own_numbers(self, micro_batches, waited)
        packs = [batch.main for batch in micro_batches]
        rows = max(pack.num_rows for pack in packs)
        views = sum(pack.num_images for pack in packs)
        found.append({"flops": own.flops, "views": views, "rows": rows, "cpu": time.process_time()})
        return own

    cost = (lambda *args, **named: None) if by_rows else build.sample_cost
    with mock.patch.object(Trainer, "_own_numbers", numbers), mock.patch.object(build, "sample_cost", cost):
        run(flags)
    for step, before in zip(reversed(found), [*found[-2::-1], None], strict=True):
        step["cpu"] -= 0 if before is None else before["cpu"]  # the first is left out of all medians
    return found


def spreads(ranks: list[list[dict[str, float]]], kind: str) -> list[float]:
    """Of every step, the most that a rank has over the mean of all."""
    return [max(step) / mean(step) for step in zip(*([one[kind] for one in rank] for rank in ranks), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--flags", nargs="*", default=[], help="more of the trainer's, as --flags=--freeze-ViT=false")
    args = parser.parse_args()
    distributed.TIMEOUT_S = 3600  # of a machine that does much else
    head = (
        "replicas",
        "dealt out by",
        "views max / mean",
        "FLOPs max / mean",
        "CPU s max / mean",
        "rank-time-spread",
        "s a step",
        "most rows",
    )
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    with tempfile.TemporaryDirectory(prefix="measure_stragglers-") as name:
        folder = write_inputs(Path(name), records=args.steps * GLOBAL_BATCH, language=LANGUAGE)
        for replicas in args.replicas:
            found: dict[bool, list[tuple]] = {True: [], False: []}
            for repetition in range(args.repetitions):
                for by_rows in (True, False):
                    save = folder / f"{replicas}-{by_rows}-{repetition}"
                    flags = flags_of(folder, save, "--train-iters", str(args.steps), *args.flags)
                    ranks = run_distributed(partial(record_packs, flags, by_rows), replicas)
                    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
                    logged = [[line[tag] for line in lines] for tag in ("rank-time-spread", "iteration-time")]
                    rows = [max(step) for step in zip(*([one["rows"] for one in rank] for rank in ranks), strict=True)]
                    by_rank = (spreads(ranks, kind) for kind in ("views", "flops", "cpu"))
                    steps = zip(*by_rank, *logged, rows, strict=True)
                    found[by_rows] += [*steps][1:]
            for by_rows, steps in found.items():
                *ratios, seconds, rows = map(median, zip(*steps, strict=True))
                how = "rows" if by_rows else "rows and views"
                said = " | ".join(f"{ratio:.3f}" for ratio in ratios)
                print(f"| {replicas} | {how} | {said} | {seconds:.2f} | {rows:.0f} |", flush=True)


if __name__ == "__main__":
    main()
