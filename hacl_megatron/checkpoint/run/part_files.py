"""Writes parts into `.distcp` files, and the index of them: the format of torch.distributed.checkpoint.

Each rank writes one file: a row of records, for a tensor what `torch.save` makes of it. `.metadata`, which torch's own
writer makes, says which record of which file holds which rectangle of which tensor; a name of the form
`../frozen/DIGEST/FILE` stands for a file beside the iteration's folder. A run writes what is in its memory
(`local_parts`), a conversion what it reads meanwhile (`convert.writer`).
"""

import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from hacl_megatron.checkpoint.hf.synced_file import SyncedFile
from hacl_megatron.checkpoint.run.integrity import Records
from hacl_megatron.checkpoint.run.stored.index import INDEX_FILE
from hacl_megatron.config.files.checksum import Checksum

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to write: a rectangle of a global tensor, or an object. Its place is `key` and `offsets`."""

    key: str
    """Name of the global tensor, or unique name of the object."""
    values: Tensor | bytes
    """Values of the rectangle, of as many dims as the global tensor; for an object what `torch.save` makes of it."""
    offsets: tuple[int, ...] = ()
    """Where the rectangle begins in the global tensor."""
    global_shape: tuple[int, ...] = ()


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
    checksum: str | None = None
    """Of these bytes (`Checksum`), in hexadecimal digits; older frozen parts have none."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def serialized(content: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_parts(folder: Path, parts: Iterable[Part], number: int) -> list[StoredPart]:
    """Write these parts into one file of `folder`, which exists, and sync it. [] and no file for an empty list.

    Of parts that an iterator makes, none is held longer than it takes to write.

    Args:
        number: of the file; a run's ranks and a conversion's workers write one each.

    Raises:
        OSError: the disk is full.
    """
    if not parts:
        return []
    name, stored = f"__{number}_0.distcp", []
    with _SummedFile(folder / name) as file:
        for part in parts:
            offset = file.tell()
            file.checksum = Checksum()
            try:
                _write_record(part.values, file)
            except RuntimeError as error:  # torch.save says only that the file has the wrong length
                raise error_of_system(error) from None
            place = (offset, file.tell() - offset, file.checksum.hexdigest())
            stored.append(_stored(part, name, *place))
    assert len({(part.key, *part.offsets) for part in stored}) == len(stored), "two parts of a file have one place"
    return stored


def not_finite(parts: Iterable[Part]) -> str | None:
    """Key of the first tensor with NaN or infinity in it, None if all values are finite."""
    for part in parts:
        values = part.values
        # The largest magnitude: one pass without a copy, and NaN wins over every number.
        if (
            not isinstance(values, Tensor)
            or not values.is_floating_point()
            or values.itemsize < 2
            or not values.numel()
        ):
            continue
        if not torch.linalg.vector_norm(values.detach(), float("inf")).isfinite():
            return part.key
    return None


class _SummedFile(SyncedFile):
    """Sums what is written as it passes, so that nothing is read again for it."""

    checksum = Checksum()
    """Of what was written since it was set."""

    def write(self, content) -> int:
        self.checksum.update(content)
        return super().write(content)


def checksums_of(parts: Iterable[StoredPart]) -> Records | None:
    """Checksums of the files' records, for `integrity.write_files`; None where a part has none."""
    records: Records = {}
    for part in parts:
        if part.checksum is None:
            return None
        records.setdefault(part.file, {})[part.offset] = part.checksum
    return records


def _write_record(values: Tensor | bytes, file: io.BufferedWriter) -> None:
    if isinstance(values, bytes):
        file.write(values)
        return
    values = values.detach().cpu()
    # torch.save writes the whole storage, whatever part of it a tensor is.
    torch.save(values if values.untyped_storage().nbytes() == values.nbytes else values.clone(), file)


def error_of_system(error: BaseException) -> BaseException:
    """The error of the system that lies behind one of torch's; else the latter."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error


def _stored(part: Part, file: str, offset: int, length: int, checksum: str) -> StoredPart:
    tensor = isinstance(part.values, Tensor)
    return StoredPart(
        key=part.key,
        offsets=list(part.offsets),
        sizes=list(part.values.shape) if tensor else [],
        global_shape=list(part.global_shape),
        dtype=str(part.values.dtype).removeprefix("torch.") if tensor else None,
        file=file,
        offset=offset,
        length=length,
        checksum=checksum,
    )


def write_index(folder: Path, parts: Iterable[StoredPart], name: str = INDEX_FILE) -> None:
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
    os.replace(folder / INDEX_FILE, folder / name)  # the writer knows one name alone


def write_format(folder: Path, common: bytes) -> None:
    """What megatron-core wants beside the index: which format this is, and what is neither tensor nor object.

    Args:
        common: `serialized`.
    """
    (folder / "common.pt").write_bytes(common)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
