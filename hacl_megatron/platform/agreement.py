"""Whether the processes of a run are the same run: compared through the launcher's store, before they work together.

    every rank    facts, name -> value ─ digest ─┐
    rank 0        digest and facts ──────────────┼─→ store ─→ another digest? that rank names what differs ─→ all leave
    every rank    "I am here" ───────────────────┘

Ranks that differ train on silently (another rate), hang in a collective (another layout, another back end) or abort
without a cause (other frozen parts), so no collective may come before this. Where all agree a rank moves its digest and
a count, some 50 bytes, whatever the facts are.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic, sleep

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from hacl_megatron.config.console import rank_and_node

_SHOWN = 4
"""So many differences are named; the rest is counted."""
_LINGER_SECONDS = 10.0
"""Rank 0, whose process may be the store, waits so long until all have read what it had to say."""
_calls = itertools.count()
"""Every process makes the same calls in the same order, so that their numbers are keys."""


def agree(store: Store, rank: int, world_size: int, what: str, facts: Mapping[str, str] | None) -> None:
    """See that all ranks have the same facts; every rank calls it, rank 0 with facts.

    Args:
        store: of all ranks.
        what: that the facts are of, for the error: `configuration`.
        facts: name -> value, the names as a user knows them; None on a rank that has none and takes the others' word.

    Raises:
        ValueError: on every rank, the same line: which rank differs from rank 0, in what, both values. Also where two
            processes call themselves the same rank.
    """
    if world_size == 1:
        return
    own = PrefixStore(f"hacl_megatron/agree/{next(_calls)}", store)
    digest = hashlib.blake2b(json.dumps(sorted((facts or {}).items())).encode(), digest_size=16).hexdigest()
    complaint = None
    if own.add(f"rank/{rank}", 1) > 1:
        complaint = f"two processes are rank {rank} (RANK), one of them {rank_and_node()}: give each rank once"
    elif rank == 0:
        own.set("facts", json.dumps([rank_and_node(), dict(facts or {})]))
        own.set("digest", digest)
    elif facts is not None and own.get("digest").decode() != digest:
        who, expected = json.loads(own.get("facts"))
        complaint = _difference(what, who, expected, facts)
    if complaint is not None:
        own.compare_set("complaint", "", complaint)
        own.add("complaints", 1)
    if own.add("here", 1) == world_size:
        own.set("all here", "yes")
    _wait_for_all(own, world_size)
    complaints = own.add("complaints", 0)
    if not complaints:
        return
    line = own.get("complaint").decode()
    own.add("read", 1)
    if rank == 0:
        _linger(own, world_size)
    raise ValueError(line if complaints == 1 else f"{line} ({complaints} ranks differ from rank 0)")


def told_by_rank_0(store: Store, rank: int, world_size: int, work: Callable[[], str]) -> str:
    """What `work` returns on rank 0, on every rank; the others wait for it in no collective, however long it takes."""
    if world_size == 1:
        return work()
    own = PrefixStore(f"hacl_megatron/told/{next(_calls)}", store)
    if rank != 0:
        text = own.get("text").decode()
        own.add("read", 1)
        return text
    text = work()
    own.set("text", text)
    own.add("read", 1)
    _linger(own, world_size)
    return text


def default_store() -> Store:
    """The store of the process group that this process has joined."""
    return dist.distributed_c10d._get_default_store()


def _difference(what: str, who: str, expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """`--lr is 1e-30 on rank 1 on n2 and 0.001 on rank 0 on n1; ...`: what differs, on which rank, both values."""
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    shown = [f"{name} is {_shown(found.get(name))} there and {_shown(expected.get(name))} here" for name in names]
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return (
        f"ranks differ in their {what}, seen from {who} here to {rank_and_node()} there: "
        f"{'; '.join([*shown[:_SHOWN], *more])}: expected the same everywhere; start all ranks with the same command, "
        "data, code and libraries"
    )


def _shown(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 100 else f"{value[:97]}..."


def _wait_for_all(store: Store, world_size: int) -> None:
    try:
        store.wait(["all here"])
    except dist.DistStoreError:
        raise ValueError(
            f"{store.add('here', 0)} of {world_size} ranks are here after --distributed-timeout-minutes: see why the "
            "others did not start"
        ) from None


def _linger(store: Store, world_size: int) -> None:
    end = monotonic() + _LINGER_SECONDS
    with suppress(RuntimeError):
        while store.add("read", 0) < world_size and monotonic() < end:
            sleep(0.01)
