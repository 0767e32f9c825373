"""Adapters on one CUDA device, with Transformer Engine's layers where it is installed, against `peft` on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.gpu.test_training_gpu import start
from tests.model.lora_cases import FULL_RECOMPUTE, Case, Variant, compare, write_reference
from tests.model.parity_cases import Layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def compare_in_fp32(folder: str, requested: str) -> list[dict[str, Any]]:
    device = start(requested)
    cases = [Case("all", Layout()), Case("all", Layout(), FULL_RECOMPUTE)]
    return [compare(Path(folder), case, Variant(), device) for case in cases]


def test_fp32_outputs_and_gradients_are_those_of_peft_on_the_host(tmp_path: Path) -> None:
    write_reference(tmp_path, Variant())
    for found in run_distributed(compare_in_fp32, 1, str(tmp_path), "cuda")[0]:
        assert max(found["outputs"].values()) <= 2e-4, found["outputs"]
        assert max(found["gradients"].values()) <= 1e-3  # sums in another order, atomics in index_add
        assert found["others in training"] == []
