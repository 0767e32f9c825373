"""The benchmark's FLOP counts against torch's own counter on both sides, and the command end to end."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.warm import run_warm

# 384 rows of vocabulary: a multiple of 128 is not padded.
SIZES = {
    "hidden": 48, "layers": 3, "heads": 4, "ffn": 88, "vocab": 384, "vision_hidden": 32, "vision_layers": 3,
    "vision_heads": 2, "image": 42, "patch": 14,
}  # fmt: skip
CASES = [(stage, context) for stage in ("pretrain", "finetune") for context in ("image", "prompt")]
SIDES = ("plain", "package", "all-features-off")
ATTENTION = ("vision attention", "LLM attention")
"""Parts that torch's counter does not see on the CPU: its kernel is not among those it knows."""


def counted_flops(folder: str) -> dict[str, tuple[float, float]]:
    """(ours, torch's) FLOPs of each side's step in each case, attention left out."""
    from megatron.core import parallel_state
    from torch.utils.flop_counter import FlopCounterMode

    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from tests.measure.step_flops import FEATURES, package_flops, plain_flops
    from tests.measure.step_sides import Work, draw_samples, lengths_of, package_side, plain_side, write_model

    write_model(Path(folder), Namespace(**SIZES, seed=0))
    architecture = read_model_config(folder)
    found = {}
    for stage, context in CASES:
        work = Work(
            folder=folder, context=context, stage=stage, threads=1, pairs=3, hallucinated=2, shortest=3, longest=9,
            seed=0,
        )  # fmt: skip
        lengths = lengths_of(work, draw_samples(work, SIZES["vocab"], 1)[0], architecture.visual_tokens)
        settings: dict[str, Any] = {"prompt": context == "prompt", "trained": stage == "finetune"}
        expected = {
            "plain": plain_flops(architecture, lengths, **settings),
            "package": package_flops(architecture, lengths, **settings),
            "all-features-off": package_flops(architecture, lengths, **settings, without=FEATURES),
        }
        for side, parts in expected.items():
            without = FEATURES if side == "all-features-off" else ()
            take_step = plain_side(work) if side == "plain" else package_side(work, (), without)
            with FlopCounterMode(display=False) as counter:
                take_step()
            needed = sum(value for part, value in parts.items() if part not in ATTENTION)
            found[f"{side} {stage} {context}"] = (needed, float(counter.get_total_flops()))
            if side != "plain":
                parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    return run_distributed(counted_flops, 1, str(tmp_path_factory.mktemp("model")))[0]


@pytest.mark.parametrize("case", [f"{side} {stage} {context}" for side in SIDES for stage, context in CASES])
def test_flops_are_those_that_torch_counts(counted, case):
    """Up to the similarities of the contrastive loss, which are not counted, and a dialogue's last row, which is read
    although it predicts nothing."""
    needed, seen = counted[case]
    assert needed == pytest.approx(seen, rel=1e-2), (case, needed / seen)


FORKED = """
from tests.measure import measure_step, step_processes
step_processes.START = "fork"
measure_step.benchmark(measure_step.parse())
"""
"""The command, its processes forks of itself: what they would import is there, with one thread."""


def test_the_command_prints_a_table(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    flags += ["--pairs=2", "--repetitions=1", "--contexts=prompt", "--threads=1", "--profile"]
    (tmp_path / "forked.py").write_text(FORKED)
    done = run_warm([str(tmp_path / "forked.py"), *flags, "--variant", "small loss=--contrastive-weight 1.0"])
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| prompt")]
    assert [row[2].strip() for row in rows] == ["plain", "ours", "small loss"], done.stdout
    assert all(float(row[3]) > 0 and float(row[9]) > 0 for row in rows), rows
    assert "matrix products" in done.stdout
