"""Writes a distributed checkpoint that megatron-core reads at every layout, chunk by chunk and never holding the model.

    read(canonical name, rows, columns) ─ rule ─ chunk of one layer ─ worker threads ─→ __0_0.distcp, __1_0.distcp, ...
                                          plan of all chunks ─→ .metadata, metadata.json, common.pt

Tensors are cut the way tensor parallelism cuts them, into up to `MAX_PIECES`, so that a rank of a parallel run reads
little more than its own part. The names are megatron-core's: layers stacked along a new first dim, a layer's norms
under the linear layer that follows them.
"""

import io
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hacl_megatron.checkpoint.hf_names import FUSED_NORMS, NameTable, ReadRows, Rule

MAX_PIECES = 8
"""Tensor-parallel ranks that find their own chunks; more ranks share them."""
SMALLEST_CHUNK = 1 << 18
"""Bytes below which a tensor is not cut further."""
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
          "common_backend_version": 1}  # fmt: skip
_LAYER = re.compile(r"(.*\.decoder\.layers\.)(\d+)\.(.*)")


@dataclass(frozen=True)
class Chunk:
    """One contiguous part of a stored tensor: piece `piece` of `pieces` of the parameter of `rule`."""

    rule: Rule
    piece: int
    pieces: int
    key: str
    """Name in the checkpoint."""
    layer: int | None
    """Row of the stacked dim."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def read(self, read: ReadRows, padded_vocab_size: int) -> Tensor:
        """The chunk's values, from the tensors that the rule names."""
        rule, pieces = self.rule, self.pieces
        if rule.partition == "gate_up":  # stored as [gate; up], so a piece is rows of one of them
            half, piece = divmod(self.piece, pieces // 2)
            rows = self.sizes[-2]
            start = piece * rows
            part = read(rule.sources[half], slice(start, start + rows), slice(None))
        else:
            part = rule.read_shard(read, tp_rank=self.piece, tp_size=pieces, padded_vocab_size=padded_vocab_size)
        return part.to(self.dtype).reshape(self.sizes).contiguous()


def stored_name(ours: str) -> tuple[str, int | None]:
    """Our name -> megatron-core's key in a checkpoint, and the layer if it is one of a stack."""
    if not (match := _LAYER.fullmatch(ours)):
        return ours, None
    rest = next((theirs for theirs, name in FUSED_NORMS.items() if name == match[3]), match[3])
    return match[1] + rest, int(match[2])


def plan_chunks(
    table: NameTable, dtype_of: Callable[[Rule], torch.dtype], padded_vocab_size: int
) -> tuple[list[Chunk], dict[str, TensorStorageMetadata]]:
    """All chunks in the table's order, and the entry of each stored tensor. A tied output layer is not stored."""
    chunks: list[Chunk] = []
    for rule in table.rules.values():
        if table.config.language.tie_word_embeddings and rule.ours == "language_model.output_layer.weight":
            continue
        key, layer = stored_name(rule.ours)
        dtype, dim = dtype_of(rule), 1 if rule.partition == "row" else 0
        whole = rule.local_shape(1, padded_vocab_size)
        pieces = _num_pieces(rule, whole, dim, dtype)
        sizes = tuple(size // pieces if i == dim else size for i, size in enumerate(whole))
        for piece in range(pieces):
            offsets = tuple(piece * sizes[i] if i == dim else 0 for i in range(len(sizes)))
            stack = ((), ()) if layer is None else ((layer,), (1,))
            chunks.append(Chunk(rule, piece, pieces, key, layer, dtype, stack[0] + offsets, stack[1] + sizes))

    entries: dict[str, TensorStorageMetadata] = {}
    grouped: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        grouped.setdefault(chunk.key, []).append(chunk)
    for key, parts in grouped.items():
        dtypes = {chunk.dtype for chunk in parts}
        if len(dtypes) > 1:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(f"{key}: its layers are stored as {found}; choose one with --dtype")
        size = tuple(max(c.offsets[i] + c.sizes[i] for c in parts) for i in range(len(parts[0].sizes)))
        entries[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=parts[0].dtype),
            size=torch.Size(size),
            chunks=[ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in parts],
        )
    return chunks, entries


def _num_pieces(rule: Rule, whole: tuple[int, ...], dim: int, dtype: torch.dtype) -> int:
    if rule.partition in ("replicated", "class_token"):
        return 1
    halves = 2 if rule.partition == "gate_up" else 1
    units = whole[dim] // halves
    if rule.partition == "qkv":  # whole query groups, each source's rows of which are contiguous
        units //= sum(rule.blocks) * rule.head_dim
    pieces = math.gcd(units, MAX_PIECES)
    while pieces > 1 and math.prod(whole) * dtype.itemsize // (pieces * halves) < SMALLEST_CHUNK:
        pieces //= 2
    return pieces * halves


def write_sharded(
    folder: Path,
    chunks: list[Chunk],
    entries: dict[str, TensorStorageMetadata],
    read: ReadRows,
    *,
    padded_vocab_size: int,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the planned chunks into `folder`, one file for each worker, and what makes a checkpoint of them.

    A worker holds one chunk and the slices that it is made of.
    """
    shares = _split(chunks, max(1, workers))
    planner = _ChunkReader(shares, entries, read, padded_vocab_size, progress)
    # One writer, as many plans as workers: as if each were a rank, which names their files.
    writer = FileSystemWriter(str(folder), thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans = [writer.prepare_local_plan(plan) for plan in planner.plans]
    plans = writer.prepare_global_plan(plans)

    def write(plan: SavePlan) -> list:
        try:
            return writer.write_data(plan, planner).wait()
        except BaseException as error:
            planner.failure = planner.failure or error
            raise

    with ThreadPoolExecutor(len(plans)) as pool:
        try:
            futures = [pool.submit(write, plan) for plan in plans]
            wait(futures)
        except BaseException as error:  # an interrupt of the user's
            planner.failure = error
            raise
    if planner.failure is not None:
        raise planner.failure
    results = [future.result() for future in futures]
    assert sum(len(written) for written in results) == len(chunks)
    writer.finish(Metadata(state_dict_metadata=entries), results)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


def _split(chunks: list[Chunk], workers: int) -> list[list[Chunk]]:
    """Runs of neighbours with about the same number of bytes each, none of them empty."""
    share = sum(chunk.num_bytes for chunk in chunks) / workers
    shares: list[list[Chunk]] = [[]]
    filled = 0
    for chunk in chunks:
        if shares[-1] and filled >= share * len(shares):
            shares.append([])
        shares[-1].append(chunk)
        filled += chunk.num_bytes
    return shares


class _ChunkReader(SavePlanner):
    """Gives torch's writer each chunk when its turn has come."""

    def __init__(
        self,
        shares: list[list[Chunk]],
        entries: dict[str, TensorStorageMetadata],
        read: ReadRows,
        padded_vocab_size: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._read, self._padded_vocab_size, self._progress = read, padded_vocab_size, progress
        self.failure: BaseException | None = None
        """Why a worker stopped; the others stop at their next chunk."""
        self._chunks: dict[MetadataIndex, Chunk] = {}
        self.plans = []
        counts: dict[str, int] = {}
        for share in shares:
            items = []
            for chunk in share:
                position = counts[chunk.key] = counts.get(chunk.key, -1) + 1
                index = MetadataIndex(chunk.key, torch.Size(chunk.offsets), position)
                self._chunks[index] = chunk
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=entries[chunk.key].size,
                )
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
            self.plans.append(SavePlan(items))

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self.failure is not None:
            raise self.failure
        chunk = self._chunks[write_item.index]
        tensor = chunk.read(self._read, self._padded_vocab_size)
        if self._progress is not None:
            self._progress(tensor.nbytes)
        return tensor

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError  # the plans are made at once, for all workers

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan
