"""Loads a run's state into a sharded state dict of megatron-core, at any layout.

    sharded state dict ─ its rectangles of global tensors ─ the chunks that they overlap (`stored.parts`) ─ copied in

megatron-core and torch would do that too, but unpickle what the files hold: any code. So their loaders never see a
checkpoint; what is theirs here is the description of what a rank wants.
"""

import math
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch import Tensor

from hacl_megatron.checkpoint.hf.json_files import one_line
from hacl_megatron.checkpoint.run.integrity import check_content, read_whole
from hacl_megatron.checkpoint.run.stored.parts import StoredParts
from hacl_megatron.checkpoint.run.stored.pickles import ERRORS, load_archive, shown

COMMON_FILE = "common.pt"


def state_metadata() -> dict[str, Any]:
    """How megatron-core lays out a state dict: optimiser state in a form that every TP, PP and DP size can read.

    A fresh dictionary each time, for megatron-core writes its process groups into it.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def load_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what the sharded state dict `state` asks for from one checkpoint folder; every rank calls it.

    Tensors are loaded in place, and come back with what the folder holds beside tensors. No rank goes on without the
    others.

    Raises:
        ValueError: a file of the checkpoint is missing, cut, changed or of other sizes; names it.
    """
    error, loaded = None, {}
    try:
        loaded = _load(state, folder)
    except Exception as failure:  # which the other ranks, that may be well, must hear of
        error = failure if isinstance(failure, ValueError | AssertionError) else _not_loaded(folder, failure)
    errors: list[str | None] = [None if error is None else str(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, None if error is None else str(error))
    if error is not None:
        raise error
    if any(errors):
        raise ValueError(next(line for line in errors if line))
    return loaded


def load_common_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder holds beside tensors; ValueError names a damaged checkpoint."""
    path = folder / COMMON_FILE
    try:
        content = bytearray(read_whole(path))
        found = load_archive(content)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: checkpoint {folder} is not whole; load another iter_* folder") from None
    except (OSError, *ERRORS) as error:
        raise ValueError(
            f"{path}: no file of plain values ({one_line(error)}), and no code of it is run; the checkpoint is "
            "damaged, load another iter_* folder"
        ) from None
    check_content(folder, COMMON_FILE, bytes(content))
    if type(found) is not dict:
        raise ValueError(f"{path}: found a {type(found).__name__}, expected a dictionary; load another iter_* folder")
    progress, layout = found.get("progress", {"iteration": 0}), found.get("layout", [1, 1, 1])
    if type(progress) is not dict or type(progress.get("iteration")) is not int:
        raise _not_saved(path, "progress", progress)
    if type(layout) is not list or len(layout) not in (3, 4) or not all(type(n) is int and n > 0 for n in layout):
        raise _not_saved(path, "layout", layout)
    return found


def _not_saved(path: Path, key: str, value: Any) -> ValueError:
    return ValueError(
        f"{path}: found {shown(value)} for `{key}`, expected what a run saves there; the checkpoint is damaged: load "
        "another iter_* folder"
    )


def stored_keys(folder: Path) -> Set[str]:
    """Keys of the tensors and objects that a checkpoint folder holds; ValueError names a damaged checkpoint."""
    index = StoredParts(folder).index
    return index.tensors.keys() | index.objects.keys()


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    parts = StoredParts(folder)
    force_all_tensors_to_non_fp8(state)  # copied into, they would be rounded, and their scales changed
    sharded, fresh, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)

    def loaded(wanted: ShardedTensor | ShardedObject) -> Any:
        return parts.object(wanted.unique_key) if isinstance(wanted, ShardedObject) else _fill(wanted, parts)

    common = load_common_state(folder)
    dict_list_map_inplace(loaded, sharded)
    try:
        merge(common, fresh)
        merge(common, sharded)
        return apply_factory_merges(common, factories)
    except ValueError as error:  # the file of plain values has what is to come from others
        raise _not_loaded(folder, error) from None


@torch.no_grad()
def _fill(wanted: ShardedTensor, parts: StoredParts) -> Tensor:
    """This rank's rectangle of a global tensor."""
    entry = parts.index.tensors.get(wanted.key)
    if entry is None:
        raise ValueError(
            f"checkpoint {parts.folder} cannot be loaded: it holds no {wanted.key}: it is damaged or belongs to "
            "another model; load another iter_* folder"
        )
    if entry.size != tuple(wanted.global_shape) and not wanted.allow_shape_mismatch:
        raise ValueError(
            f"checkpoint {parts.folder} cannot be loaded: {wanted.key} is {list(entry.size)}, this model makes it "
            f"{list(wanted.global_shape)}: it is damaged or belongs to another model; load another iter_* folder"
        )
    assert wanted.flattened_range is None, wanted.key
    if wanted.data is None:
        wanted.init_data(torch.device("cpu"))
    data = wanted.data.detach()
    if wanted.allow_shape_mismatch:  # vocabulary padding, of which the checkpoint may have less
        data.zero_()
    sizes = (1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)
    target, first = data.view(sizes), tuple(wanted.global_offset)
    covered = 0
    for chunk in entry.chunks:
        begin = [max(a, b) for a, b in zip(chunk.offsets, first, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, first, sizes, strict=True)]
        lengths = [b - a for a, b in zip(begin, end, strict=True)]
        if min(lengths, default=1) <= 0:
            continue
        from_chunk = [a - b for a, b in zip(begin, chunk.offsets, strict=True)]
        values = part_of(parts.values(wanted.key, chunk), from_chunk, lengths)
        part_of(target, [a - b for a, b in zip(begin, first, strict=True)], lengths).copy_(values)
        covered += math.prod(lengths)
    there = [max(0, min(n, size - a)) for a, n, size in zip(first, sizes, entry.size, strict=True)]
    if covered != math.prod(there):
        raise ValueError(
            f"checkpoint {parts.folder} cannot be loaded: its parts of {wanted.key} hold {covered} of "
            f"{math.prod(there)} values; it is damaged, load another iter_* folder"
        )
    return data


def part_of(tensor: Tensor, offsets: list[int], lengths: list[int]) -> Tensor:
    """A rectangle of a tensor, as a view."""
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _not_loaded(folder: Path, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {one_line(error)}"
    return ValueError(
        f"checkpoint {folder} cannot be loaded ({reason}): it is damaged or belongs to another model; load another "
        "iter_* folder"
    )
