"""Standard output and error that fail: lines are lost and counted, and the program goes on."""

import io
import os
import subprocess
import sys
from pathlib import Path

from hacl_megatron.config.console import _Stream

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from hacl_megatron.config.console import lost_lines, streams_that_may_fail
with streams_that_may_fail():
    for number in range(2000):
        print("a line", number, flush=number % 7 == 0)
        print("another", file=sys.stderr)
    sys.stdout.flush()
    with open(sys.argv[1], "w") as file:
        print(file.fileno(), lost_lines(), file=file)
"""


def run(result: Path, shell: str) -> tuple[int, str, int, int]:
    """Status, output, the number of the next file's descriptor, lines lost."""
    env = {**os.environ, "PROGRAM": PROGRAM, "RESULT": str(result), "PYTHON": sys.executable}
    command = "set -o pipefail; " + shell.format('"$PYTHON" -c "$PROGRAM" "$RESULT"')
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr[-2000:]
    descriptor, lost = map(int, result.read_text().split())
    return done.returncode, done.stdout + done.stderr, descriptor, lost


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """Catches BrokenPipeError, and status 120 of an output that Python cannot flush at its end."""
    code, said, _, lost = run(tmp_path / "result", "{} | head -1")
    assert code == 0 and said.startswith("a line 0\n") and lost > 1000
    assert said.count("standard output cannot be written (Broken pipe)") == 1


def test_a_full_disk_under_either_or_both(tmp_path: Path) -> None:
    code, said, _, lost = run(tmp_path / "result", "{} > /dev/full")
    assert code == 0 and lost > 1000 and said.count("standard output cannot be written (No space left") == 1
    code, said, _, lost = run(tmp_path / "result", "{} 2> /dev/full")
    assert code == 0 and lost >= 2000 and said.count("standard error cannot be written (No space left") == 1
    code, said, _, lost = run(tmp_path / "result", "{} > /dev/full 2>&1")
    assert code == 0 and lost > 3000 and said == ""


def test_closed_descriptors_are_not_given_to_the_next_file(tmp_path: Path) -> None:
    """Catches a checkpoint's file with what libraries print in it, and `None` for a stream."""
    code, _, descriptor, _ = run(tmp_path / "result", "{} <&- >&- 2>&-")
    assert code == 0 and descriptor > 2


def test_a_stream_that_was_closed_has_lost_nothing() -> None:
    """Python 3.12 flushes standard error once more when it has closed it: that is no line for the user."""
    stream = _Stream(io.StringIO(), "standard error")
    stream.write("a line\n")
    stream._stream.close()
    stream.flush()
    assert stream.num_lost == 0 and not stream.fails


def test_nothing_is_lost_where_all_is_well(tmp_path: Path) -> None:
    code, said, _, lost = run(tmp_path / "result", "{}")
    assert (code, lost, said.count("\n")) == (0, 0, 4000)


def test_every_tool_lets_its_streams_fail() -> None:
    """Catches one that ends with `Broken pipe` under `| head`, after the work or before."""
    tools = [path for path in (ROOT / "tools").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(tools) > 10
    assert [path.name for path in tools if "with streams_that_may_fail(" not in path.read_text()] == []


def plan(shell: str) -> subprocess.CompletedProcess[str]:
    flags = "--config examples/llava_1_5/finetune_7b.yaml --gpu a100-80g --num-samples 1000"
    command = f"set -o pipefail; {sys.executable} tools/plan_run.py {flags} {shell}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_plan_that_nobody_can_read_is_no_plan() -> None:
    """Catches `plan_run.py > plan.txt && sbatch ...` that goes on with an empty file."""
    done = plan("> /dev/full")
    assert done.returncode == 1
    assert done.stderr.count("standard output cannot be written (No space left") == 1


def test_whoever_reads_the_head_of_a_plan_has_it() -> None:
    done = plan("| head -1")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert "cannot be written" not in done.stderr
