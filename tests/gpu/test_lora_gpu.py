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


CASES = (Case("all", Layout()), Case("all", Layout(), FULL_RECOMPUTE))


def compare_all(folder: str, requested: str) -> dict[bool, list[dict[str, Any]]]:
    device = start(requested)
    return {
        bf16: [compare(Path(folder), case, Variant(), device, bf16=bf16) for case in CASES] for bf16 in (False, True)
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lora")
    write_reference(folder, Variant())
    return run_distributed(compare_all, 1, str(folder), "cuda")[0]


def test_fp32_outputs_and_gradients_are_those_of_peft_on_the_host(found) -> None:
    for case in found[False]:
        assert max(case["outputs"].values()) <= 2e-4, case["outputs"]
        assert max(case["gradients"].values()) <= 1e-3  # sums in another order, atomics in index_add
        assert case["others in training"] == []


def test_bf16_outputs_and_gradients_are_near_those_of_peft_on_the_host(found) -> None:
    """With Transformer Engine's layers where they are installed. An adapter left out moves logits by more than 1."""
    for case in found[True]:
        assert max(case["outputs"].values()) <= 0.3, case["outputs"]
        assert max(case["gradients"].values()) <= 0.3, case["gradients"]
        assert case["others in training"] == []
