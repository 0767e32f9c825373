"""The vocabulary-parallel cross entropy against PyTorch's own, with a vocabulary that no tensor-parallel size divides.

The mistakes it would catch: padded columns in the softmax (a Hugging Face model has none, so its loss would differ),
NaN on a rank whose whole shard is padding, logits overwritten in place, a mean instead of a sum.
"""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from hacl_megatron.objective.generation import generation_losses
from tests.distributed import run_distributed

VOCAB_SIZE = 331  # a prime
NUM_TARGETS = 9
PADDED_SIZES = {
    1: (331, 384),
    2: (332, 384, 768),  # one padded column, many, and a second rank with nothing but padding
}
CASES = [
    (world_size, padded, dtype)
    for world_size, sizes in PADDED_SIZES.items()
    for padded in sizes
    for dtype in (torch.float32, torch.bfloat16)
]


def _whole_logits(padded_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [K, padded] and targets [K]; padded columns hold what would spoil any softmax that saw them."""
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(NUM_TARGETS, padded_size, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (NUM_TARGETS,), generator=generator)
    targets[0], targets[1] = 0, VOCAB_SIZE - 1
    logits[:, VOCAB_SIZE:] = 60.0
    logits[2:4, VOCAB_SIZE:] = float("inf")
    return logits.to(dtype), targets


def _losses_of_rank() -> dict[tuple[int, torch.dtype], dict[str, torch.Tensor]]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    results = {}
    for _, padded, dtype in (case for case in CASES if case[0] == world_size):
        whole, targets = _whole_logits(padded, dtype)
        shard = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
        logits = shard * 1  # what an LM head gives is no leaf
        loss = generation_losses(logits, targets, vocab_size=VOCAB_SIZE, tp_group=tp_group).sum()
        (loss / 4).backward()
        unchanged = torch.equal(logits.detach(), shard.detach())
        results[padded, dtype] = {"loss": loss.detach(), "gradient": shard.grad, "unchanged": unchanged}
    empty = torch.zeros(0, VOCAB_SIZE + 1, requires_grad=True)
    none = generation_losses(empty, torch.zeros(0, dtype=torch.int64), vocab_size=VOCAB_SIZE, tp_group=tp_group).sum()
    none.backward()
    results["no targets"] = {"loss": none.detach(), "gradient": empty.grad}
    return results


@functools.cache
def _results(world_size: int) -> list[dict]:
    return run_distributed(_losses_of_rank, world_size)


@pytest.mark.parametrize(("world_size", "padded_size", "dtype"), CASES)
def test_equals_pytorchs_cross_entropy(world_size: int, padded_size: int, dtype: torch.dtype) -> None:
    whole, targets = _whole_logits(padded_size, dtype)
    whole.requires_grad_()
    expected = F.cross_entropy(whole[:, :VOCAB_SIZE].float(), targets, reduction="sum")
    (expected / 4).backward()
    ranks = [result[padded_size, dtype] for result in _results(world_size)]
    for result in ranks:
        assert result["loss"].dtype == torch.float32 and result["loss"].shape == ()
        # Sums of 331 exponentials in another order: fp32 rounding of a sum near 100.
        torch.testing.assert_close(result["loss"], expected.detach(), rtol=2e-6, atol=0)
        assert result["unchanged"]
    gradient = torch.cat([result["gradient"] for result in ranks], dim=1)
    assert gradient.dtype == dtype
    # bf16 logits get the fp32 gradient rounded once (8 bits), so one step of the last bit may differ.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-7}
    torch.testing.assert_close(gradient, whole.grad, **tolerance)
    assert (gradient[:, VOCAB_SIZE:] == 0).all()


@pytest.mark.parametrize("world_size", PADDED_SIZES)
def test_no_target_gives_zero_with_a_gradient(world_size: int) -> None:
    for result in _results(world_size):
        assert result["no targets"]["loss"].item() == 0
        assert result["no targets"]["gradient"].shape == (0, VOCAB_SIZE + 1)
