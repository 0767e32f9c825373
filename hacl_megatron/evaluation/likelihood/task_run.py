"""Runs a task over all replicas, round by round, so that a killed evaluation goes on where it stopped.

rank 0: keys not done yet ─→ all ranks; every round each replica takes its share, and rank 0 keeps the records
"""

import base64
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from hacl_megatron.assemble.forward import ForwardOnly
from hacl_megatron.assemble.run import Run
from hacl_megatron.batch import PackedBatch
from hacl_megatron.evaluation.likelihood.item_packs import (
    ItemReader,
    PackedItems,
    PackResult,
    outputs_of_items,
    result_of_pack,
)
from hacl_megatron.evaluation.likelihood.task import Task
from hacl_megatron.model.hacl import HaclModel, ModelOutput
from hacl_megatron.platform.host_groups import Groups

Collect = Callable[[ModelOutput, PackedBatch], PackResult]
NOT_FINITE = "not finite"
"""Key of a record whose numbers say nothing."""
Forward = Callable[[list[PackedBatch] | None, Collect], list[PackResult]]
"""Packs of a replica, on its reading rank, to their results on all its ranks (`hacl_megatron.assemble.forward`)."""


class TaskRunner:
    """One per process; every rank calls `run` for the same tasks in the same order.

    Args:
        reader: on the reading rank of each replica (rank 0 of it), None on the others.
        vocab_size: tokens of the vocabulary, its padding left out.
        batch_size: items in a pack.
        collect: makes a pack's result on the last stage; default: losses and embeddings.
        refuse_not_finite: raise ValueError for a model that gives NaN or infinity; else its records have `NOT_FINITE`.
    """

    def __init__(
        self,
        forward: Forward,
        reader: ItemReader | None,
        *,
        groups: Groups,
        vocab_size: int,
        batch_size: int,
        collect: Collect | None = None,
        refuse_not_finite: bool = False,
    ) -> None:
        assert (reader is not None) == (groups.replica.rank() == 0)
        self.forward = forward
        self.reader = reader
        self.groups = groups
        self.batch_size = batch_size
        self.refuse_not_finite = refuse_not_finite
        self.collect = collect or partial(result_of_pack, vocab_size=vocab_size, tp_group=groups.tp)

    @classmethod
    def of(cls, module: HaclModel, run: Run, *, batch_size: int, collect: Collect | None = None) -> "TaskRunner":
        """Runs tasks on a loaded model; `close` it."""
        return cls(
            ForwardOnly(module, device=run.device),
            ItemReader.of(run.config) if run.reads_data else None,
            groups=run.groups,
            vocab_size=run.config.architecture.language.vocab_size,
            batch_size=batch_size,
            collect=collect,
            refuse_not_finite=True,
        )

    def close(self) -> None:
        """Ends the reader's threads."""
        if self.reader is not None:
            self.reader.close()

    def run(
        self,
        task: Task | None,
        *,
        done: Mapping[int, dict[str, Any]] | None = None,
        keep: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> list[dict[str, Any]] | None:
        """Evaluate the items that are not `done`.

        Args:
            task: where there is a `reader`.
            done: records of an earlier run by their keys; matters on rank 0 alone, as `keep` does.
            keep: takes every new record, after each round.

        Returns:
            On rank 0 all items' records, `done` ones included, in the order of the task's keys; elsewhere None.
        """
        records = dict(done or {})
        todo = [[key for key in task.item_keys() if key not in records] if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(todo, src=0)
        packs_at_once = self.groups.pp.size()  # fewer would leave stages idle
        share = self.batch_size * packs_at_once
        size, rank = self.groups.dp.size(), self.groups.dp.rank()
        rounds = [todo[0][start : start + share * size][rank::size] for start in range(0, len(todo[0]), share * size)]
        with ThreadPoolExecutor(1, thread_name_prefix="item-reader") as thread:

            def read(number: int):
                if self.reader is None or number >= len(rounds):
                    return None
                keys = rounds[number]
                parts = [keys[index::packs_at_once] for index in range(packs_at_once)]
                return thread.submit(lambda: [self.reader.read(task, part) for part in parts])

            ahead = read(0)
            for number in range(len(rounds)):
                items = None if ahead is None else ahead.result()
                ahead = read(number + 1)
                for record in self._round(task, items):
                    if self.refuse_not_finite and record.get(NOT_FINITE):
                        raise ValueError(
                            f"the model's numbers are not finite (NaN or infinity) for item {record['key']}: its "
                            "weights are damaged, or its training diverged; evaluate another checkpoint"
                        )
                    records[record["key"]] = record
                    keep(record)
        return [records[key] for key in task.item_keys()] if dist.get_rank() == 0 else None

    def _round(self, task: Task | None, items: list[PackedItems] | None) -> list[dict[str, Any]]:
        """One forward pass of every replica; all replicas' records on rank 0, nothing elsewhere."""
        results = self.forward(None if items is None else [part.pack for part in items], self.collect)
        if items is None:
            return []
        records = []
        for part, result in zip(items, results, strict=True):
            for key, output in outputs_of_items(part, result).items():
                mark = {} if output.is_finite else {NOT_FINITE: True}
                records.append({"key": key, **task.about(key), **task.measured(key, output), **mark})
            records += [{"key": key, **task.about(key), "error": reason} for key, reason in part.errors.items()]
        group = self.groups.dp
        if group.size() == 1:
            return records
        gathered = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object(records, gathered, dst=dist.get_global_rank(group, 0), group=group)
        return [record for part in gathered or [] for record in part]


def to_text(array: np.ndarray) -> str:
    """fp32 numbers as text for a JSON line, bit for bit; the shape is lost."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def from_text(text: str) -> np.ndarray:
    """fp32 [n]: what `to_text` was given, flat."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
