"""Every rank of a replica gets what the source has packed."""

from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from torch import Tensor

from hacl_megatron.assemble.exchange import exchange_step
from hacl_megatron.batch import MicroBatch, PackedBatch
from hacl_megatron.platform.cpu.stand_ins import install
from hacl_megatron.platform.host_groups import Groups
from tests.distributed import run_distributed
from tests.model.parity_batches import IMAGE_SIZE, make_batches


def packed() -> list[MicroBatch]:
    """Two micro-batches, one without images or pairs, with something to run ahead and branches."""
    mains = make_batches()
    mains[0] = replace(
        mains[0], branch_rows=torch.tensor([3]), branch_context_rows=torch.arange(4),
        branch_lengths=torch.tensor([4], dtype=torch.int32), branch_sizes=torch.tensor([1], dtype=torch.int32),
        rejected_rows=torch.tensor([2, 3]), rejected_ids=torch.tensor([5, 6]),
        preference_tokens=torch.tensor([0, 1, 2]), preference_lengths=torch.tensor([1, 1, 1]), answers_per_twin=3,
        reference_likelihoods=torch.tensor([-1 / 3, 1e-300, -7.0], dtype=torch.float64),
        twin_sample_ids=torch.tensor([4]),
        pooled_rows=torch.arange(8).reshape(2, 4), pooled_weights=torch.tensor([[1 / 3, 1e-30, 0, 1], [0.25] * 4]),
        num_text_rows=5, lengths=None,
    )  # fmt: skip
    return [
        MicroBatch(main=main, ahead=replace(other, pixel_values=other.pixel_values[:0]))
        for main, other in zip(mains, reversed(mains), strict=True)
    ]


def received() -> list[str]:
    """What differs on this rank from what the source has packed."""
    install()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    groups = Groups.of_parallel_state(timeout_minutes=1)
    first_stage = groups.pp.rank() == 0
    stage = SimpleNamespace(groups=groups, pre_process=first_stage, image_size=IMAGE_SIZE)
    expected, wrong = packed(), []
    for step in (expected, [MicroBatch(main=batch.main) for batch in expected]):
        found = exchange_step(step if groups.mp.rank() == 0 else None, stage, torch.device("cpu"))
        assert len(found) == len(step)
        for index, (one, other) in enumerate(zip(found, step, strict=True)):
            assert (one.ahead is None) == (other.ahead is None)
            wrong += [f"{index} main {name}" for name in _differences(one.main, other.main, first_stage)]
            if other.ahead is not None:
                wrong += [f"{index} ahead {name}" for name in _differences(one.ahead, other.ahead, first_stage)]
    parallel_state.destroy_model_parallel()
    return wrong


def _differences(found: PackedBatch, expected: PackedBatch, has_pixels: bool) -> list[str]:
    different = []
    for item in fields(PackedBatch):
        one, other = getattr(found, item.name), getattr(expected, item.name)
        if item.name == "pixel_values" and not has_pixels:
            same = one.is_meta and one.shape == other.shape
        elif isinstance(other, Tensor):
            same = one.dtype == other.dtype and torch.equal(one, other)
        else:
            same = one == other
        if not same:
            different.append(item.name)
    return different


def test_every_rank_gets_every_field_of_every_pack() -> None:
    assert run_distributed(received, 4) == [[]] * 4
