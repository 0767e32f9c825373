"""Weights that do not train are written once: `SAVE/frozen/DIGEST/`, to which every iteration's index refers.

    SAVE/frozen/0123456789abcdef/__0_0.distcp      one file a rank
    SAVE/frozen/0123456789abcdef/files.json        sizes of the files, and which part is where

The digest is of the values themselves, whatever the layout they were divided by: another run, resumed at another layout
or frozen otherwise, finds what is the same and writes what is not. Nothing deletes these folders.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hacl_megatron.checkpoint.run.integrity import FILES_FILE, FROZEN_FOLDER, damage, read_files, write_files
from hacl_megatron.checkpoint.run.part_files import Part, StoredPart, checksums_of

_BLOCK = 1 << 22
"""Values that are hashed at once; each takes 16 bytes meanwhile."""

Sums = dict[str, tuple[tuple[int, ...], str, int]]
"""Key -> shape of the whole tensor, dtype, sum over what was seen of it."""


def value_sums(parts: Iterable[Part]) -> Sums:
    """A linear hash of the values of each tensor, modulo 2**64: sums of disjoint parts add up to the whole's."""
    sums: Sums = {}
    for part in parts:
        assert isinstance(part.values, Tensor)
        shape, dtype, total = sums.get(part.key, (part.global_shape, str(part.values.dtype), 0))
        sums[part.key] = shape, dtype, (total + _sum(part.values, part.offsets)) % 2**64
    return sums


def digest_of(all_sums: Iterable[Sums]) -> str:
    """16 hexadecimal digits of the sums of all ranks together."""
    total: Sums = {}
    for sums in all_sums:
        for key, (shape, dtype, value) in sums.items():
            total[key] = shape, dtype, (total.get(key, (shape, dtype, 0))[2] + value) % 2**64
    text = json.dumps([[key, list(shape), dtype, value] for key, (shape, dtype, value) in sorted(total.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_name(save: Path, digest: str) -> str:
    """Where the part with this digest is or may be put: a folder damaged since then is left to those who name it."""
    name = digest
    while (save / FROZEN_FOLDER / name).exists() and references(save, name) is None:
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return name


def references(save: Path, digest: str) -> list[StoredPart] | None:
    """The parts of a frozen folder, their files named as an iteration's index names them; None if it is not whole."""
    folder = save / FROZEN_FOLDER / digest
    if not (folder / FILES_FILE).is_file() or damage(folder) is not None:
        return None
    parts = [StoredPart(**part) for part in read_files(folder)["parts"]]
    return [replace(part, file=f"../{FROZEN_FOLDER}/{digest}/{part.file}") for part in parts]


def finish_frozen(partial: Path, digest: str, parts: list[StoredPart]) -> None:
    """Give a frozen folder, whose files are written, its list of parts, and then its name."""
    files = sorted({part.file for part in parts})
    write_files(partial, files, checksums_of(parts), parts=[part.as_json() for part in parts])
    partial.rename(partial.with_name(digest))


@torch.no_grad()
def _sum(values: Tensor, offsets: tuple[int, ...]) -> int:
    """Sum over all values of bits x weight(index in dim 0) x weight(index in dim 1) x …, with odd weights, so that
    every single change of a value shows."""
    bits = (
        values.detach()
        .contiguous()
        .view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])
    )
    columns = values.shape[-1] if values.dim() else 1
    rows = bits.reshape(-1, columns)
    last = _weights(values.dim() - 1, offsets[-1] if offsets else 0, columns, rows.device)
    step = max(1, _BLOCK // max(columns, 1))
    per_row = [(rows[i : i + step].to(torch.int64) * last).sum(-1) for i in range(0, rows.shape[0], step)]
    total = torch.cat(per_row).view(values.shape[:-1]) if per_row else torch.zeros(values.shape[:-1], dtype=torch.int64)
    for dim in range(values.dim() - 2, -1, -1):
        total = (total * _weights(dim, offsets[dim], values.shape[dim], total.device)).sum(-1)
    return int(total) % 2**64


def _weights(dim: int, start: int, length: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers that depend on dim and index alone (the finaliser of splitmix64)."""
    x = torch.arange(start, start + length, dtype=torch.int64, device=device) + ((dim + 1) << 40)
    x = x * _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
    return (x ^ (x >> 31)) | 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
