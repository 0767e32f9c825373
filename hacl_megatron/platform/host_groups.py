"""What ranks tell each other by way of their hosts: sizes, counts, keys.

Numbers that a host has and a host needs do not travel through the GPU: reading them back would wait for all that the
GPU still has to do. Without a GPU a group serves for both.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup


class Groups(ProcessGroupCollection):
    """megatron-core's groups of this rank, two of them once more for tensors on the host, and that of a replica.

    `mp` are tensor-parallel ranks times pipeline stages, `dp` and `mp` leave context parallelism out.
    """

    mp_host: ProcessGroup
    """The ranks of `mp`."""
    dp_host: ProcessGroup
    """The ranks of `dp`."""
    replica: ProcessGroup
    """The ranks that work on the same samples: `mp` times context-parallel ranks, in the order of their ranks. Takes
    host tensors where there are context-parallel ranks."""
    replica_host: ProcessGroup
    """The same ranks."""

    @classmethod
    def of_parallel_state(cls, timeout_minutes: int) -> "Groups":
        """Those that megatron-core has initialised; every rank must call it at the same time."""
        groups = cls.use_mpu_process_groups()
        groups.mp_host, groups.dp_host = groups.mp, groups.dp
        if not takes_host_tensors(groups.mp):
            groups.mp_host = _host_twin(groups.mp, timedelta(minutes=timeout_minutes))
            groups.dp_host = parallel_state.get_data_parallel_group_gloo()
        groups.replica, groups.replica_host = groups.mp, groups.mp_host
        if groups.cp.size() > 1:
            groups.replica = groups.replica_host = _replica(groups, timedelta(minutes=timeout_minutes))
        assert groups.replica.size() * groups.dp.size() == dist.get_world_size(), "sums over the world go by both"
        return groups

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        return host_sums(host_sums(values, self.replica_host), self.dp_host)


def takes_host_tensors(group: ProcessGroup) -> bool:
    """Whether the group serves hosts too."""
    return dist.get_backend(group) != "nccl"


def _replica(groups: ProcessGroupCollection, timeout: timedelta) -> ProcessGroup:
    """This rank's group of all ranks of its replica. All ranks of the world make all of them, in one order.

    megatron-core's order of ranks: tensor-parallel ones are neighbours, then context-parallel, data-parallel, stages.
    """
    of_stage = groups.tp.size() * groups.cp.size()
    a_stage = of_stage * groups.dp.size()
    for index in range(groups.dp.size()):
        firsts = (stage * a_stage + index * of_stage for stage in range(groups.pp.size()))
        ranks = [first + rank for first in firsts for rank in range(of_stage)]
        made = dist.new_group(ranks=ranks, timeout=timeout, backend="gloo")
        if index == groups.dp.rank():
            own = made
            for part in (groups.mp, groups.cp):
                assert set(dist.get_process_group_ranks(part)) <= set(ranks), (ranks, part)
    return own


def _host_twin(group: ProcessGroup, timeout: timedelta) -> ProcessGroup:
    """This rank's group of the same ranks. All ranks of the world make all of them, in one order, as torch wants it."""
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_process_group_ranks(group))
    own, _ = dist.new_subgroups_by_enumeration(sorted(map(list, {tuple(r) for r in everyone})), timeout, backend="gloo")
    return own


def host_sums(values: Sequence[float], group: ProcessGroup) -> list[float]:
    """Element-wise sums over a host group, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total.tolist()


def broadcast_integers(values: Tensor | None, group: ProcessGroup) -> Tensor:
    """int64 [n] of the group's rank 0 on all of its ranks; the others need not know n."""
    source = dist.get_global_rank(group, 0)
    size = torch.tensor([0 if values is None else values.numel()])
    dist.broadcast(size, source, group=group)
    received = torch.empty(int(size), dtype=torch.int64) if values is None else values
    dist.broadcast(received, source, group=group)
    return received


def gather_integers(values: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's int64 [n], rank 0's first; n may differ.

    By sums in which everyone has a place of its own: gloo's all-gather goes round in a ring, a thousand steps for a
    thousand ranks, its sums in their logarithm.
    """
    sizes = torch.zeros(group.size(), dtype=torch.int64)
    sizes[group.rank()] = values.numel()
    dist.all_reduce(sizes, group=group)
    everyone = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    everyone.split(sizes.tolist())[group.rank()].copy_(values)
    dist.all_reduce(everyone, group=group)
    return list(everyone.split(sizes.tolist()))
