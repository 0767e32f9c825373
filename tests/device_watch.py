"""Finds, on a CPU, what would make a host wait for its GPU.

Every tensor is taken to be on the host or on the device, by where it came from: parameters, buffers and whatever is
made with an explicit `device=` are on the device, whatever an operation makes of one on the device is there too, and
the rest (what data loaders and `torch.tensor` without a device make) is on the host. `to_device` brings a tensor over.
Then these wait:

    item, tolist, float, bool, numpy, cpu                       the device's value is read back
    nonzero, masked_select, unique, bincount, equal, indexing   the size of the result, or what Python does next,
      by a mask, repeat_interleave without an output size       depends on values of the device
    a copy between the two without `to_device`                  from memory that is not pinned

What would fail on a GPU is found as well: an operation on tensors of both kinds, and a collective of the one kind's
group on a tensor of the other. Kernels that run on a GPU alone are not seen: `tests/gpu` asks torch itself.
"""

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, DEVICE, UNSEEN = "host", "device", "unseen"
_BRINGS_OVER = ("platform/device.py", "hacl_megatron/batch.py")
"""Files whose `Tensor.to` is what it is for."""
_CPU_ALONE = ("platform/cpu/kernels.py",)
"""Files that stand for a GPU's kernels."""
_READS = {"tolist", "numpy", "cpu"}
_WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount",
    "aten::equal", "aten::is_nonzero", "aten::histc",
}  # fmt: skip
_MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::index_put", "aten::set_"}
_FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "ones", "rand", "randint",
    "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


class DeviceWatch:
    """Keeps, while it `watches`, one line for everything that would wait or fail, in `events`.

    Args:
        device_tensors: those there are already.
        host_groups: names of process groups for tensors on the host.
    """

    def __init__(self, device_tensors: Iterable[Tensor], host_groups: Iterable[str] = ()) -> None:
        self.events: list[str] = []
        self.host_groups = frozenset(host_groups)
        self.placing = DEVICE
        """Where an operation without tensors among its arguments puts its result."""
        # A weak reference keeps the address of a storage from being given to another one.
        self._places: dict[int, tuple[StorageWeakRef, str]] = {}
        for tensor in device_tensors:
            self.put(tensor, DEVICE)

    @contextmanager
    def watches(self) -> Iterator[None]:
        def synchronize(device: Any = None) -> None:
            self.note("torch.cuda.synchronize")

        with mock.patch.object(torch.cuda, "synchronize", synchronize), _Operations(self), _Calls(self):
            yield

    def put(self, tensor: Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        self._places[storage._cdata] = (StorageWeakRef(storage), place)

    def place(self, tensor: Tensor) -> str:
        """Where it is; UNSEEN if nothing was seen to make it, as with what other threads and collectives make."""
        return self._places.get(tensor.untyped_storage()._cdata, (None, UNSEEN))[1]

    def note(self, what: str) -> None:
        """With the line of the innermost file that is neither torch nor this one."""
        ours = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != __file__ and "<" not in frame.filename
        ]
        self.events.append(f"{what} in {ours[-1].filename.split('site-packages/')[-1]}:{ours[-1].lineno}")


class _Calls(TorchFunctionMode):
    """What is seen of Python's calls alone."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        watch, kwargs, name = self.watch, kwargs or {}, getattr(func, "__name__", "")
        if name in _FACTORIES:
            on_host = kwargs.get("device") is None and not _caller().endswith(_CPU_ALONE)
            place = HOST if on_host else DEVICE
            before, watch.placing = watch.placing, place
            made = func(*args, **kwargs)
            watch.placing = before
            if not (args and isinstance(args[0], Tensor)):
                if name == "tensor" and place == DEVICE:
                    watch.note("torch.tensor on the device")
                watch.put(made, place)
            return made
        if name == "type":  # what `platform.host` gave CPU tensors would be asked twice
            func = getattr(func, "__wrapped__", func)
        if name in _READS and isinstance(args[0], Tensor) and watch.place(args[0]) == DEVICE:
            watch.note(name)
            if name == "cpu":
                copy = args[0].clone()
                watch.put(copy, HOST)
                return copy
        if name == "to" and watch.place(args[0]) != DEVICE and _names_a_device((*args[1:], *kwargs.values())):
            if not _caller().endswith(_BRINGS_OVER):
                watch.note("to(device)")
            copy = args[0].clone().to(*args[1:], **kwargs)
            watch.put(copy, DEVICE)
            return copy
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """What is seen of torch's operations, backward included."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [watch.place(tensor) for tensor in tensors]
        self._judge(func, args, tensors, places)
        result = func(*args, **kwargs)
        place = DEVICE if DEVICE in places else HOST if places else watch.placing
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                watch.put(made, place)
        return result

    def _judge(self, func: Any, args: tuple, tensors: list[Tensor], places: list[str]) -> None:
        name, watch = func._schema.name, self.watch
        if name.startswith("c10d::"):
            group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
            on_host = torch.distributed.ProcessGroup.unbox(group).group_name in watch.host_groups
            if any((place == DEVICE) == on_host for place in places):
                watch.note(f"{name} of the wrong side's tensor")
            return
        if DEVICE not in places:
            return
        if name in _WAITS or (name == "aten::repeat_interleave" and func._overloadname == "Tensor"):
            watch.note(name)
        elif name in ("aten::index", "aten::index_put_", "aten::index_put"):
            # What is set to one number under a mask is torch's masked_fill.
            fills = name != "aten::index" and args[2].dim() == 0
            for index in args[1]:
                if index is not None and watch.place(index) != DEVICE:
                    watch.note(f"{name} by indices of the host")
                elif index is not None and index.dtype in (torch.bool, torch.uint8) and not fills:
                    watch.note(f"{name} by a mask")
        elif name == "aten::copy_" and HOST in places and tensors[places.index(HOST)].dim() > 0:
            watch.note("copy_ between host and device")
        elif name not in _MAY_MIX and any(
            place != DEVICE and tensor.dim() > 0 for tensor, place in zip(tensors, places, strict=True)
        ):
            watch.note(f"{name} of host and device")


def _caller() -> str:
    """The file from which torch was called."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(("platform/cpu/stand_ins.py", "torch/_tensor.py")):
        frame = frame.f_back
    return frame.f_code.co_filename


def _names_a_device(arguments: Iterable[Any]) -> bool:
    return any(isinstance(argument, torch.device | str) for argument in arguments)
