"""Writes a distributed checkpoint that megatron-core reads at every layout, chunk by chunk and never holding the model.

    read(canonical name, rows, columns) ─ rule ─ chunk of one layer ─ worker threads ─→ __0_0.distcp, __1_0.distcp, ...
                                          plan of all chunks ─→ .metadata, metadata.json, common.pt

Tensors are cut the way tensor parallelism cuts them, into up to `MAX_PIECES`, so that a rank of a parallel run reads
little more than its own part. Their keys are megatron-core's (`stored_names`).
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import set_crc32_options

from hacl_megatron.checkpoint.convert.stored_names import OUTPUT_LAYER, stored_name
from hacl_megatron.checkpoint.hf.export import cast
from hacl_megatron.checkpoint.hf.names import NameTable, ReadRows, Rule
from hacl_megatron.checkpoint.run.part_files import Part, StoredPart, serialized, write_format, write_index, write_parts

MAX_PIECES = 8
"""Tensor-parallel ranks that find their own chunks; more ranks share them."""
SMALLEST_CHUNK = 1 << 18
"""Bytes below which a tensor is not cut further."""


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
        """The chunk's values, from the tensors that the rule names; ValueError where `dtype` cannot hold them."""
        rule, pieces = self.rule, self.pieces
        if rule.partition == "gate_up":  # stored as [gate; up], so a piece is rows of one of them
            half, piece = divmod(self.piece, pieces // 2)
            rows = self.sizes[-2]
            start = piece * rows
            part = read(rule.sources[half], slice(start, start + rows), slice(None))
        else:
            part = rule.read_shard(read, tp_rank=self.piece, tp_size=pieces, padded_vocab_size=padded_vocab_size)
        return cast(part, self.dtype, rule.ours).reshape(self.sizes).contiguous()


def plan_chunks(
    table: NameTable, dtype_of: Callable[[Rule], torch.dtype], padded_vocab_size: int, more: Sequence[Rule] = ()
) -> list[Chunk]:
    """All chunks in the table's order, then those of `more`. A tied output layer is not stored."""
    chunks: list[Chunk] = []
    for rule in [*table.rules.values(), *more]:
        if table.config.language.tie_word_embeddings and rule.ours == OUTPUT_LAYER:
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

    dtypes: dict[str, set[torch.dtype]] = {}
    for chunk in chunks:
        dtypes.setdefault(chunk.key, set()).add(chunk.dtype)
    for key, several in dtypes.items():
        if len(several) > 1:
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in several))
            raise ValueError(f"{key}: its layers are stored as {found}; choose one with --dtype")
    return chunks


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
    read: ReadRows,
    *,
    padded_vocab_size: int,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[StoredPart]:
    """Write the planned chunks into `folder`, one file for each worker, and what makes a checkpoint of them.

    A worker holds one chunk and the slices that it is made of; of a tensor cut by columns, the whole.
    """
    shares = _split(chunks, max(1, workers))
    shapes = _global_shapes(chunks)
    stop = threading.Event()

    def parts(share: list[Chunk]) -> Iterator[Part]:
        for chunk, values in _read_chunks(share, read, padded_vocab_size):
            if stop.is_set():  # another worker has failed
                return
            yield Part(key=chunk.key, values=values, offsets=chunk.offsets, global_shape=shapes[chunk.key])
            if progress is not None:
                progress(values.nbytes)

    # torch's own checksums, which no reader looks at, are a tenth of a conversion's work. The option is a thread's own.
    with ThreadPoolExecutor(len(shares), initializer=set_crc32_options, initargs=(False,)) as pool:
        try:
            futures = [pool.submit(write_parts, folder, parts(share), rank) for rank, share in enumerate(shares)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    stored = [part for future in futures for part in future.result()]
    write_index(folder, stored)
    write_format(folder, serialized({}))
    return stored


def _global_shapes(chunks: list[Chunk]) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape of the whole tensor, which its chunks cover."""
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        ends = tuple(offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        shapes[chunk.key] = tuple(map(max, ends, shapes.get(chunk.key, ends)))
    return shapes


def _read_chunks(share: list[Chunk], read: ReadRows, padded_vocab_size: int) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk and its values, read when its turn has come."""
    for rule, chunks in groupby(share, lambda chunk: chunk.rule):
        whole: Tensor | None = None
        if rule.partition == "row":  # columns lie scattered in the file: one read serves all pieces
            whole = read(rule.sources[0], slice(None), slice(None))
        for chunk in chunks:
            part = read if whole is None else lambda _, rows, columns, whole=whole: whole[rows, columns]
            yield chunk, chunk.read(part, padded_vocab_size)


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
