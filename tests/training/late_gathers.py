"""The slowest and strictest network for `--overlap-param-gather`: what is not waited for is not there.

megatron-core's distributed optimiser updates a rank's own shard of each bucket and gathers the others' during the next
forward pass. Here other ranks' shards are NaN from the update on, and a gather that was begun does
its work when it is waited for. So a parameter that is read without waiting for it makes the loss NaN, every time.
Ranks that begin the gathers in different orders, which would mix up buckets (or hang), are told apart at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hacl_megatron.train import run

_start, _step = BucketGroup.start_param_sync, DistributedOptimizer.step_with_ready_grads


def _name(bucket: _ParamAndGradBucket) -> tuple[int, list[torch.Size]]:
    return bucket.offset, [parameter.shape for parameter in bucket.params_list]


class _Late:
    """Handle of a gather that has not begun yet."""

    def __init__(self, buckets: BucketGroup) -> None:
        self.buckets = buckets

    def wait(self) -> None:
        self.buckets.param_gather_handle = None
        _start(self.buckets, force_sync=True)


def _start_late(self: BucketGroup, force_sync: bool = False) -> None:
    if force_sync:
        _start(self, force_sync=True)
        return
    assert self.param_gather_handle is None, "megatron-core's own check"
    group = self.intra_distributed_optimizer_instance_group
    names = [None] * group.size()
    dist.all_gather_object(names, [_name(bucket) for bucket in self.buckets], group=group)
    assert all(name == names[0] for name in names), f"ranks gather different buckets: {names}"
    self.param_gather_handle, self.param_gather_dispatched = _Late(self), True


def _step_and_forget(self: DistributedOptimizer) -> bool:
    done = _step(self)
    for model in self.model_chunks:
        for buckets in model.bucket_groups:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                for rank, shard in enumerate(bucket.param_data.chunk(group.size())):
                    if rank != group.rank():
                        shard.fill_(torch.nan)
    return done


@contextmanager
def late_gathers() -> Iterator[None]:
    """Inside, parameters come late."""
    with (
        mock.patch.object(BucketGroup, "start_param_sync", _start_late),
        mock.patch.object(DistributedOptimizer, "step_with_ready_grads", _step_and_forget),
    ):
        yield


def run_with_late_gathers(command: Sequence[str]) -> None:
    """A training; a command for `tests.training.runs.train` by way of `functools.partial`."""
    with late_gathers():
        run(command)
