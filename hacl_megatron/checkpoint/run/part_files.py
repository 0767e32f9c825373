"""Writes parts into `.distcp` files and the index of them: torch.distributed.checkpoint's format, by its own writer.

Each rank writes one file. `.metadata` says which file holds which rectangle of which tensor; a name of the form
`../frozen/DIGEST/FILE` stands for a file beside the iteration's folder.
"""

import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from hacl_megatron.checkpoint.run.local_parts import Part


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A part and where it is. Plain values: it goes through JSON."""

    key: str
    offsets: list[int]
    sizes: list[int]
    """Empty for an object, as is `global_shape`."""
    global_shape: list[int]
    dtype: str | None
    """`bfloat16`; None for an object."""
    file: str
    """Relative to the folder of the checkpoint."""
    offset: int
    """Bytes from the file's beginning."""
    length: int
    """Bytes in the file."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def write_parts(folder: Path, parts: list[Part], rank: int) -> list[StoredPart]:
    """Write this rank's parts into one file of `folder`, which exists, and sync it. [] and no file without parts."""
    if not parts:
        return []
    by_index = {MetadataIndex(part.key, torch.Size(part.offsets)): part for part in parts}
    assert len(by_index) == len(parts), "two parts of a rank have one place"
    writer = FileSystemWriter(str(folder), thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plan = SavePlan([_write_item(index, part) for index, part in by_index.items()])
    # The writer numbers files by the plans it is given, one a rank.
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[-1]
    results = writer.write_data(plan, _Parts(by_index)).wait()
    stored = []
    for result in results:
        part, info = by_index[result.index], result.storage_data
        tensor = isinstance(part.values, Tensor)
        stored.append(
            StoredPart(
                key=part.key,
                offsets=list(part.offsets),
                sizes=list(part.values.shape) if tensor else [],
                global_shape=list(part.global_shape),
                dtype=str(part.values.dtype).removeprefix("torch.") if tensor else None,
                file=info.relative_path,
                offset=info.offset,
                length=info.length,
            )
        )
    assert len(stored) == len(parts)
    return stored


def write_index(folder: Path, parts: Iterable[StoredPart], name: str = ".metadata") -> None:
    """Write the index of all ranks' parts.

    Raises:
        RuntimeError: the parts of a tensor do not cover it, or overlap.
    """
    by_key: dict[str, list[StoredPart]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    entries, results = {}, []
    for key, group in by_key.items():
        first = group[0]
        if first.dtype is None:
            entries[key] = BytesStorageMetadata()
            results += [
                WriteResult(MetadataIndex(key), p.length, _StorageInfo(p.file, p.offset, p.length)) for p in group
            ]
            continue
        size = torch.Size(first.global_shape)
        covered = sum(torch.Size(part.sizes).numel() for part in group)
        if covered != size.numel() or len({tuple(part.offsets) for part in group}) < len(group):
            raise RuntimeError(f"{key}: {covered} of {size.numel()} values are in {len(group)} parts")
        entries[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, first.dtype)),
            size=size,
            chunks=[ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in group],
        )
        for position, part in enumerate(group):
            index = MetadataIndex(key, torch.Size(part.offsets), position)
            results.append(WriteResult(index, part.length, _StorageInfo(part.file, part.offset, part.length)))
    writer = FileSystemWriter(str(folder))
    writer.set_up_storage_writer(True)
    writer.finish(Metadata(state_dict_metadata=entries), [results])
    os.replace(folder / ".metadata", folder / name)  # the writer knows one name alone


def _write_item(index: MetadataIndex, part: Part) -> WriteItem:
    if isinstance(part.values, bytes):
        return WriteItem(index=index, type=WriteItemType.BYTE_IO)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape),
        properties=TensorProperties(dtype=part.values.dtype),
        size=torch.Size(part.global_shape),
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _Parts(SavePlanner):
    """Gives torch's writer the values of each item."""

    def __init__(self, by_index: dict[MetadataIndex, Part]) -> None:
        self._by_index = by_index

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        values = self._by_index[write_item.index].values
        return io.BytesIO(values) if isinstance(values, bytes) else values

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError  # the plan is made by write_parts

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan
