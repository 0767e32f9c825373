"""Steps of this package at LLaVA-1.5 7B's sizes on one GPU, by the trainer itself; prints one JSON line a case.

    python -m tests.gpu.measure_package --out FOLDER [--cases pretrain-image finetune-image …] [--steps 8]

Medians over the steps behind the first three, which load kernels and compile. `planned seconds` is what the planner
says of the very packs that ran. What is used (Transformer Engine, flash-attn) is what is installed; `tests/gpu/without`
hides some.
"""

import argparse
import gc
import gzip
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hacl_megatron.platform.__main__ import table
from hacl_megatron.platform.hardware import gpu_of_device
from tests.gpu.speed_cases import Case, cases, write_config, write_data

WARM_UP, PROFILED = 3, 2
"""Steps at the beginning and at the end that do not count: the last one is profiled, the one before warms that up."""

TAGS = (
    "iteration-time", "samples-per-second", "tokens-per-second-per-gpu", "model-tflops-per-gpu", "mfu",
    "data-wait-share", "ahead-share", "mem-max-allocated-bytes",
)  # fmt: skip


def measure(case: Case, data: Path, out: Path, *, tiny: bool, steps: int) -> dict[str, Any]:
    """Train `steps` steps; medians of what the trainer logs."""
    from hacl_megatron.train import run
    from hacl_megatron.training.loop import Trainer
    from hacl_megatron.training.step import Step

    seen: dict[str, Any] = {}
    receive, report = Step.receive, Trainer._report
    rows: list[dict[str, float]] = []

    def receive_and_keep(self: Step, step_batches: Any) -> Any:
        found = receive(self, step_batches)
        if not seen:
            seen.update(step=self, micro_batches=found[0])
        return found

    def report_and_keep(self: Trainer, scalars: dict[str, float]) -> None:
        rows.append(scalars)
        report(self, scalars)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    command = ["--config", str(write_config(case, data, tiny=tiny, steps=steps)), "--log-interval", "1"]
    traces = out / "traces" / f"{case.name}{time.time():.0f}"
    command += [
        "--tensorboard-dir",
        str(traces),
        "--profile-step-start",
        str(steps),
        "--profile-step-end",
        str(steps + 1),
    ]
    started = time.perf_counter()
    with mock.patch.object(Step, "receive", receive_and_keep), mock.patch.object(Trainer, "_report", report_and_keep):
        run(command)
    counted = rows[WARM_UP : steps - PROFILED]
    result: dict[str, Any] = {
        tag: statistics.median(row[tag] for row in counted) for tag in TAGS if all(tag in row for row in counted)
    }
    result["iteration-times"] = [round(row["iteration-time"], 4) for row in rows]
    result["lm losses"] = [round(row["lm loss"], 4) for row in rows]
    result |= kernels(traces, out / f"kernels-{case.name}.txt")
    result["seconds in all"] = round(time.perf_counter() - started, 1)
    if case.preference is None:
        (out / f"lengths-{case.name}.json").write_text(json.dumps(lengths(seen["micro_batches"])))
    result |= planned(seen["step"].config, seen["micro_batches"], tiny=tiny)
    return result


def kernels(traces: Path, table_file: Path) -> dict[str, float]:
    """What the GPU did in the profiled step: its busy share between the first kernel and the last, and a table."""
    (trace,) = traces.glob("profile/*")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    waits = [e for e in events if e.get("cat") == "cuda_runtime" and "Synchronize" in e["name"]]
    if not spans:
        return {}
    by_name: dict[str, list[float]] = {}
    for event in spans:
        by_name.setdefault(event["name"], []).append(event["dur"])
    lines = [f"{sum(t) / 1e3:9.2f} ms {len(t):6} {name[:150]}" for name, t in by_name.items()]
    lines.sort(key=lambda line: -float(line.split()[0]))
    of_waits: dict[str, list[float]] = {}
    for event in waits:
        of_waits.setdefault(event["name"], []).append(event["dur"])
    lines[60:] = [f"wait {sum(t) / 1e3:9.2f} ms {len(t):6} {name}" for name, t in of_waits.items()]
    table_file.write_text("\n".join(lines) + "\n")
    begin, end = min(e["ts"] for e in spans), max(e["ts"] + e["dur"] for e in spans)
    busy = reached = 0.0
    for event in sorted(spans, key=lambda e: e["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return {"gpu busy": busy / (end - begin), "kernels": len(spans), "synchronisations": len(waits)}


def lengths(micro_batches: list[Any]) -> list[dict[str, list[int]]]:
    """Rows of each kind of segment, for the other side (`measure_plain`)."""
    found = []
    for batch in micro_batches:
        main = batch.main
        texts = batch.ahead if batch.ahead is not None and not main.num_text_rows else main
        borders, targets, images = (rows.tolist() for rows in (main.cu_seqlens, main.target_rows, main.image_rows))
        others = {*_segments_of(main, main.image_eos_rows), *_segments_of(main, main.caption_eos_rows)}
        others |= set(_segments_of(main, main.hallucinated_eos_rows))
        last = len(borders) - 1 - (main.num_padding_rows > 0)
        dialogues = [(borders[i], borders[i + 1]) for i in range(last) if i not in others]
        found.append(
            {
                "dialogues": [end - begin for begin, end in dialogues],
                "targets": [sum(begin <= row < end for row in targets) for begin, end in dialogues],
                "prefix": [min(row for row in images if row >= begin) - begin for begin, _ in dialogues],
                "captions": _lengths_of(texts, texts.caption_eos_rows),
                "hallucinated": _lengths_of(texts, texts.hallucinated_eos_rows),
                "owner": main.hallucinated_owner.tolist(),
            }
        )
    return found


def _segments_of(pack: Any, rows: torch.Tensor) -> list[int]:
    return (torch.searchsorted(pack.cu_seqlens.long(), rows, right=True) - 1).tolist()


def _lengths_of(pack: Any, rows: torch.Tensor) -> list[int]:
    segments = pack.cu_seqlens.diff().tolist()
    return [segments[index] for index in _segments_of(pack, rows)]


def planned(config: Any, micro_batches: list[Any], *, tiny: bool) -> dict[str, Any]:
    """Seconds and bytes that the planner expects of these very packs on this card."""
    from dataclasses import replace

    from hacl_megatron.config.checks.flags import check_flags
    from hacl_megatron.plan.planner import make_plan
    from hacl_megatron.plan.workload import assumed_samples
    from hacl_megatron.platform.hardware import Cluster
    from tests.plan.plan_cases import shape_of

    def on_host(pack: Any) -> Any:
        return None if pack is None else pack.to(torch.device("cpu"))

    first = micro_batches[0]
    shape = shape_of(replace(first, main=on_host(first.main), ahead=on_host(first.ahead)))
    gpu = gpu_of_device(torch.cuda.get_device_name() if torch.cuda.is_available() else None) or "h100-80g"
    layout = check_flags(config, 1, files=False)
    plan = make_plan(config, layout, Cluster(gpu_name=gpu, gpus_per_node=8), assumed_samples(config), shape)
    return {
        "planned seconds": plan.time.total, "planned parts": {k: v for k, v in vars(plan.time).items() if v},
        "planned bytes": plan.memory, "planned flops": plan.model_flops,
    }  # fmt: skip


def release_models() -> None:
    """Free what the case before has left: hooks of megatron-core's DDP keep it, its weights, gradients and masters."""
    from megatron.core.distributed import DistributedDataParallel

    gc.collect()
    for model in [found for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]:
        model.grad_accs.clear()
        del model
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("/tmp/hacl-gpu-data"))
    parser.add_argument("--cases", nargs="+", default=["pretrain-image", "pretrain-prompt", "finetune-image"])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--label", default="")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.data)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0
    known = cases(memory, tiny=args.tiny)
    uses = {label.removeprefix("will use: "): value for label, value in table() if label.startswith("will use")}
    for name in args.cases:
        case = known[name]
        found: dict[str, Any] = {"case": name, "label": args.label, **vars(case), "uses": uses}
        try:
            found |= measure(case, args.data, args.out, tiny=args.tiny, steps=args.steps)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:600]
            found["traceback"] = traceback.format_exc()[-3000:]
        with (args.out / "speed.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in ("uses", "traceback")}), flush=True)
        if "traceback" in found:
            print(found["traceback"], flush=True)
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        release_models()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
