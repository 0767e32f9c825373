"""A step on a GPU waits for it once: torch itself says where the host waits (`torch.cuda.set_sync_debug_mode`).

On a CPU `tests/training/test_synchronisations.py` counts the same on more layouts, but not in a GPU's own kernels.
"""

import json
import os
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from tests.distributed import context
from tests.gpu.test_runs_gpu import WIDTHS
from tests.gpu.test_training_gpu import start
from tests.training.runs import make_inputs
from tests.training.test_synchronisations import OBJECTIVES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 4


def write_waits(out: str, folder: str, flags: list[str]) -> None:
    """Write to `out` where the host waits in each of the trainer's steps, and end this process.

    At once: on an H200, NCCL's groups did not shut down behind these steps, which a run's do.
    """
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    Path(out).write_text(json.dumps(waits_of_steps(folder, flags)))
    os._exit(0)


def waits_of_steps(folder: str, flags: list[str]) -> list[list[str]]:
    from hacl_megatron.assemble.start_from import resolve_architecture
    from hacl_megatron.config.checks.flags import check_flags
    from hacl_megatron.config.run import parse_run_config, with_architecture
    from hacl_megatron.training.build import build_trainer

    device = start("cuda")
    config = parse_run_config(
        ["--config", f"{folder}/finetune.yaml", "--train-iters", str(STEPS), "--bf16", "--device", "cuda", *flags]
    )
    layout = check_flags(config, 1)
    trainer = build_trainer(with_architecture(config, resolve_architecture(config, None)), layout, None, device)
    begins: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.beat = lambda: begins.append(len(caught))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    trainer.loader.close()
    trainer.close()
    parallel_state.destroy_model_parallel()
    return [
        [f"{one.filename}:{one.lineno}" for one in caught[begin:end] if "synchronizing CUDA" in str(one.message)]
        for begin, end in pairwise(begins[: STEPS + 1])
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("waits"), **WIDTHS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_waits_for_its_gpu_once(inputs: Path, objective: str) -> None:
    """From the second step on: the first one makes what is kept, and compiles."""
    out = inputs / f"{objective}.json"
    process = context.Process(target=write_waits, args=(str(out), str(inputs), OBJECTIVES[objective]))
    process.start()
    process.join(120)
    process.kill()
    _, *steps = json.loads(out.read_text())
    assert all(len(waits) == 1 and "training/step.py" in waits[0] for waits in steps), steps
