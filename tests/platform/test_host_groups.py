"""What ranks tell each other by way of their hosts, on real gloo groups."""

from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hacl_megatron.platform import host_groups
from hacl_megatron.platform.cpu.stand_ins import install
from hacl_megatron.platform.host_groups import Groups, broadcast_integers, gather_integers
from tests.distributed import run_distributed

TOLD = [[7, -(2**63), 2**63 - 1], [], [5], []]
"""Of each rank."""


def talk() -> dict[str, object]:
    install()
    found: dict[str, object] = {}
    # Pipeline stages are in different numbers of groups, so nothing may depend on how many a rank has made.
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    with mock.patch.object(host_groups, "takes_host_tensors", return_value=False):  # as with NCCL
        groups = Groups.of_parallel_state(timeout_minutes=1)
    rank = dist.get_rank()
    for name in ("mp", "dp"):
        group, host = getattr(groups, name), getattr(groups, f"{name}_host")
        found[name] = host is not group and dist.get_process_group_ranks(host) == dist.get_process_group_ranks(group)
    found["gathered"] = [
        values.tolist() for values in gather_integers(torch.tensor(TOLD[rank]).long(), dist.group.WORLD)
    ]
    own = torch.tensor(TOLD[rank] * 2).long() if groups.mp.rank() == 0 else None
    found["broadcast"] = broadcast_integers(own, groups.mp_host).tolist()
    found["sums"] = groups.sums([1.0, rank, 2.0**40])
    parallel_state.destroy_model_parallel()
    return found


def test_hosts_gather_broadcast_and_add_up() -> None:
    for rank, found in enumerate(run_distributed(talk, 4)):
        assert found["mp"] and found["dp"]
        assert found["gathered"] == TOLD
        assert found["broadcast"] == TOLD[rank % 2] * 2  # ranks 0 and 2, 1 and 3 are the two replicas
        assert found["sums"] == [4.0, 6.0, 2.0**42]
