"""The parts of `tests/gpu/run.sh`, one process each, and the table of what they found."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = "transformer_engine,flash_attn"
HIDDEN = {"HACL_WITHOUT": LIBRARIES}
SPEED = ("-m", "tests.gpu.measure_package", "--label")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "280")
CASES = ("pretrain-image", "pretrain-prompt", "finetune-image")
ON_LAYERS = tuple(f"tests/gpu/test_{name}_gpu.py" for name in ("attention", "training", "lora", "synchronisations"))


@dataclass(frozen=True)
class Part:
    """A command of this Python and the seconds that it may take."""

    limit: int
    command: tuple[str, ...]
    environment: dict[str, str] | None = None


PARTS = {
    "platform": Part(60, ("-m", "hacl_megatron.platform")),
    "tests-local": Part(300, (*PYTEST, *ON_LAYERS), HIDDEN),
    "tests": Part(300, (*PYTEST, *ON_LAYERS)),
    "runs-local": Part(300, (*PYTEST, "-s", "tests/gpu/test_runs_gpu.py"), HIDDEN),
    "runs": Part(300, (*PYTEST, "-s", "tests/gpu/test_runs_gpu.py")),
    "images": Part(100, (*PYTEST, "tests/gpu/test_images_gpu.py")),
    "speed": Part(200, (*SPEED, "best", "--cases", *CASES, "pretrain-image-fp8")),
    "speed-dali": Part(100, (*SPEED, "DALI mixed", "--cases", "pretrain-prompt")),
    "speed-fp8": Part(120, (*SPEED, "best", "--cases", "pretrain-image-fp8", "finetune-image-fp8")),
    "speed-preference": Part(150, (*SPEED, "best", "--cases", "finetune-twins", "finetune-dpo", "finetune-phrase")),
    "speed-qwen": Part(80, (*SPEED, "best", "--cases", "pretrain-qwen")),
    "speed-local": Part(120, (*SPEED, "local", "--cases", "pretrain-image", "finetune-image"), HIDDEN),
    "plain": Part(120, ("-m", "tests.gpu.measure_plain", "--attention", "sdpa")),
    "plain-flash": Part(120, ("-m", "tests.gpu.measure_plain", "--attention", "flash_attention_2")),
}
"""In the order in which they run; `plain` needs the lengths that `speed` leaves."""


def main() -> None:
    limits = ", ".join(f"{name} ({part.limit} s)" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"Parts: {limits}.")
    parser.add_argument("--out", type=Path, default=Path("output/gpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.only:
        results.append(run_part(name, PARTS[name], args.out, rehearse=args.rehearse))
        (args.out / "parts.json").write_text(json.dumps(results, indent=1))
    print_table(results, args.out / "speed.jsonl")
    raise SystemExit(any(result["status"] != "passed" for result in results))


def run_part(name: str, part: Part, out: Path, *, rehearse: bool) -> dict[str, object]:
    """Run it, its output to a file and its end to the terminal."""
    command = [sys.executable, *part.command]
    if "tests.gpu.measure" in " ".join(command):
        command += ["--out", str(out), *(["--tiny"] if rehearse else [])]
    environment = {**os.environ, **(part.environment or {}), **({"HACL_REHEARSE": "1"} if rehearse else {})}
    started = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(None if rehearse else part.limit)
            status = "passed" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"over its {part.limit} s"
    seconds = round(time.monotonic() - started, 1)
    tail = log.read_text(errors="replace").splitlines()[-25:] if status != "passed" else []
    last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
    print(f"--- {name}: {status}, {seconds} s: {last[:300]}", flush=True)
    print("\n".join(f"    {line[:300]}" for line in tail), flush=True)
    return {"part": name, "status": status, "seconds": seconds, "last line": last[:300]}


def print_table(results: list[dict[str, object]], speed: Path) -> None:
    for result in results:
        print(f"{result['part']:<14} {result['seconds']:>7} s  {result['status']}")
    if not speed.exists():
        return
    head = ("case", "with", "layers", "s/step", "samples/s", "TFLOP/s", "MFU", "GiB", "data wait", "planned s")
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for line in speed.read_text().splitlines():
        row = json.loads(line)
        if "error" in row:
            print(f"| {row['case']} | {row['label']} | {row['error'][:150]} |")
            continue
        numbers = (
            f"{row['iteration-time']:.3f}", f"{row['samples-per-second']:.2f}",
            _number(row, "model-tflops-per-gpu", "{:.0f}"), _number(row, "mfu", "{:.1%}"),
            _number(row, "mem-max-allocated-bytes", "{:.1f}", 2**30), _number(row, "data-wait-share", "{:.1%}"),
            _number(row, "planned seconds", "{:.3f}"),
        )  # fmt: skip
        print("| " + " | ".join((row["case"], row["label"], str(row["layers"]), *numbers)) + " |")


def _number(row: dict, key: str, form: str, unit: float = 1) -> str:
    return form.format(row[key] / unit) if key in row else ""


if __name__ == "__main__":
    main()
