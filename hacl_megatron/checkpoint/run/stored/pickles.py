"""Reads pickles, and the archives that `torch.save` makes, without looking up anything that they name.

A pickle is a program: with Python's own reader, and with torch's where it is told to trust a file, it calls whatever it
names. Here a name is looked up in a short list alone, and stands for a few lines of this file or of `index`; an
operation that the checkpoints of this trainer do not need is refused. What an archive says of a tensor (dtype, sizes,
strides) is held against the bytes that are there before a tensor is made of them. `torch.load(weights_only=True)` has
such a list too, but reads beyond the end of a storage whose size is a lie.
"""

import io
import pickle
import reprlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Names = Mapping[tuple[str, str], Any]
"""(module, name) -> what stands for it: a `Maker`, or a value that nothing can call or change."""

_OPERATIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPERSID",
)  # fmt: skip
"""By their names in the `pickle` module: all that pickles of protocols 2 to 4 of plain values and records need."""


_DEEPEST, _MOST_PARTS = 64, 1 << 22
"""Levels and values of what is neither tensor nor index: the state of a run has some 6 and 10,000."""
_MOST_STACKED, _MOST_MEMOS = 100_000, 1 << 26
"""At once; pickles of lists put a thousand values on the stack, and an index remembers some ten a part."""


def shown(value: Any) -> str:
    """`value` as a message has it: tuples in tuples, each there twice, would be a text without end."""
    return _SHORT.repr(value)[:100]


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3


class Record:
    """Stands for an object of a class that is on the list: `arguments` of its making, `state` it was given then."""

    def __init__(self, name: str, *arguments: Any):
        self.name, self.arguments, self.state = name, arguments, {}

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute; dataclasses leave out those that are None."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default


class Maker:
    """A name on the list that a pickle may call: with what, `make` judges."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make


def maker_of(name: str) -> Maker:
    """Of `Record`s with a name."""
    return Maker(lambda *arguments: Record(name, *arguments))


class Unpickler(pickle._Unpickler):
    """Reads one pickle, in Python: the reader in C makes room for 2**32 objects where a single byte tells it to.

    Raises:
        pickle.UnpicklingError: it names or does something that is not on the lists. Errors of many other types (see
            `ERRORS`) for what is no pickle.
    """

    def __init__(self, content: bytes | bytearray | memoryview, names: Names, persistent: Callable | None = None):
        super().__init__(_Memory(content))
        self._names, self._persistent = names, persistent

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, str(name), None), torch.dtype):
            return dtype
        try:
            return self._names[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to something outside")
        return self._persistent(pid)

    def load_plain(self) -> Any:
        """`load`, of what may be gone through: nested in few levels, and nothing that holds itself.

        Raises:
            pickle.UnpicklingError: a text, a copy or a comparison of it would have no end.
        """
        found = self.load()
        level, left = [found], _MOST_PARTS
        for _ in range(_DEEPEST):
            level = [value for value in level if isinstance(value, dict | list | tuple) and value]
            if not level:
                return found
            left -= sum(map(len, level))
            if left < 0:
                break
            level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        raise pickle.UnpicklingError("it nests values without end")

    def _memoize(self) -> None:
        if len(self.memo) >= _MOST_MEMOS:
            raise pickle.UnpicklingError("it remembers more than there can be")
        self.load_memoize()

    def _empty_list(self) -> None:
        self._stack([])

    def _empty_dict(self) -> None:
        self._stack({})

    def _stack(self, value: Any) -> None:
        if len(self.stack) >= _MOST_STACKED:
            raise pickle.UnpicklingError("it stacks more than there can be")
        self.append(value)

    def _mark(self) -> None:
        if len(self.metastack) >= _MOST_STACKED:
            raise pickle.UnpicklingError("it stacks more than there can be")
        self.load_mark()

    def _call(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls what is no name on the list")
        self.stack.append(maker.make(*arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is np.ndarray:
            _fill_array(target, state)
        elif type(target) is not OrderedDict or state:  # torch gives each tensor an empty one, with an empty __dict__
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], key, value)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for index in range(0, len(items), 2):
            _set(self.stack[-1], items[index], items[index + 1])

    def _append(self) -> None:
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    def _extend(self) -> None:
        values = self.pop_mark()
        _list(self.stack[-1]).extend(values)

    dispatch = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]]
        for operation in (getattr(pickle, name) for name in _OPERATIONS)
    } | {
        pickle.EMPTY_LIST[0]: _empty_list,
        pickle.EMPTY_DICT[0]: _empty_dict,
        pickle.MARK[0]: _mark,
        pickle.MEMOIZE[0]: _memoize,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _extend,
    }


ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, AttributeError, LookupError, TypeError, ValueError,
    NotImplementedError, struct.error, OverflowError, RuntimeError,
)  # fmt: skip
"""What `Unpickler.load` and `load_archive` raise for content that is not what it should be."""


def _set(target: Any, key: Any, value: Any) -> None:
    # Tuples in tuples as a key would be hashed by recursion, however deep they are.
    if type(target) not in (dict, OrderedDict) or not isinstance(key, str | int | float | None | Record):
        raise pickle.UnpicklingError(f"it puts a {type(key).__name__} into a {type(target).__name__}")
    target[key] = value


def _list(target: Any) -> list:
    if type(target) is not list:
        raise pickle.UnpicklingError(f"it appends to a {type(target).__name__}")
    return target


class _Memory:
    """Bytes as a file. A read of more than is left gives what is left, and makes no room for more."""

    def __init__(self, content: bytes | bytearray | memoryview):
        self._content, self._position = memoryview(content).cast("B"), 0

    def read(self, size: int = -1) -> bytes:
        start = self._position
        end = len(self._content) if size is None or size < 0 else min(len(self._content), start + size)
        self._position = max(start, end)
        return bytes(self._content[start:end])

    def readline(self) -> bytes:  # of GLOBAL
        start = self._position
        line = bytes(self._content[start : start + 1000])
        line = line[: line.find(b"\n") + 1] or line
        self._position += len(line)
        return line

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, len(self._content))[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = start + offset
        return self._position


# ----------------------------------------------------------------------------------------------------------- archives

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip


def load_archive(content: bytearray | memoryview) -> Any:
    """What `torch.save` wrote: plain values, tensors on the CPU that share the memory of `content`, NumPy arrays.

    Raises:
        any of `ERRORS`: it is no such archive, names what is not on the list, or holds other bytes than it says.
    """
    content = memoryview(content).cast("B")
    entries = _entries(content)
    if bytes(entries.get("byteorder", b"little")) != b"little":
        raise ValueError("its bytes are in another order than this machine's")

    def storage(pid: Any) -> tuple[torch.dtype, memoryview]:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("it refers to something else than a storage")
        if type(key) is not str:
            raise pickle.UnpicklingError(f"a storage has the name {shown(key)}")
        found = entries[f"data/{key}"]
        if count * dtype.itemsize != len(found):
            raise ValueError(f"storage {key} has {len(found)} bytes, not {count} values of {dtype}")
        return dtype, found

    return Unpickler(entries["data.pkl"], _ARCHIVE_NAMES, storage).load_plain()


def _entries(content: memoryview) -> dict[str, memoryview]:
    """Files of a torch archive, by their names below its folder: none is compressed, and each lies inside."""
    entries: dict[str, memoryview] = {}
    with zipfile.ZipFile(_Memory(content)) as archive:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            start = info.header_offset
            if content[start : start + 4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{info.filename} is not stored as torch stores it")
            start += 30 + sum(struct.unpack("<HH", content[start + 26 : start + 30]))
            if name in entries or start + info.file_size > len(content) or info.compress_size != info.file_size:
                raise zipfile.BadZipFile(f"{info.filename} is twice in it, or not all of it")
            entries[name] = content[start : start + info.file_size]
    return entries


def _tensor(storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any, dtype: torch.dtype | None = None):
    stored, content = storage
    dtype = dtype or stored
    count = len(content) // dtype.itemsize
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"a tensor of sizes {shown(size)} and strides {shown(stride)}")
    numel = 1
    for length in size:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel and (last >= count or numel > count):
        raise ValueError(f"a tensor of sizes {shown(size)} and strides {shown(stride)} in a storage of {count} values")
    if not numel:
        return torch.empty(size, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count).as_strided(size, stride, offset)


def _tensor_with_dtype(storage: tuple, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, dtype: Any, *_):
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of no dtype")
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _array(kind: Any, *_: Any) -> np.ndarray:
    return np.empty(0, dtype=np.int8)


def _fill_array(array: np.ndarray, state: Any) -> None:
    _, shape, dtype, is_fortran, content = state
    order = dtype.state[1]
    if type(order) is not str or type(dtype.arguments[0]) is not str or type(shape) is not tuple:
        raise ValueError(f"a NumPy array of {shown(dtype.arguments)} and shape {shown(shape)}")
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"a NumPy array of shape {shown(shape)}")
    if order not in ("<", "|"):  # the latter of single bytes
        raise ValueError(f"a NumPy array in the byte order {shown(order)}")
    kind = np.dtype(f"<{dtype.arguments[0]}")
    count = 1
    for length in shape:
        count *= length
    if kind.kind not in "biuf":
        raise ValueError(f"a NumPy array of {kind}")
    if type(content) is not bytes or len(content) != count * kind.itemsize:
        raise ValueError("a NumPy array of other bytes than it says")
    array.__setstate__((1, shape, kind, bool(is_fortran), content))


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"text as {shown(encoding)}")
    return text.encode("latin1")


_ARCHIVE_NAMES: Names = {
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_tensor_with_dtype),
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("collections", "OrderedDict"): Maker(lambda *items: OrderedDict()),
    ("numpy._core.multiarray", "_reconstruct"): Maker(_array),
    ("numpy.core.multiarray", "_reconstruct"): Maker(_array),
    ("numpy", "ndarray"): maker_of("ndarray"),
    ("numpy", "dtype"): maker_of("dtype"),
    ("_codecs", "encode"): Maker(_encoded),  # how protocol 2 writes bytes
}


# ------------------------------------------------------------------------------- what Transformer Engine pickled itself


def check_scales(scales: Tensor, name: str) -> None:
    """That the pickle in an extra state (FP8 scales, uint8 [n]) holds what Transformer Engine puts there, and no more.

    Transformer Engine unpickles these very bytes. The tensors in it are archives of torch's old format, which torch's
    own safe reader reads.

    Raises:
        ValueError: it names something else.
    """
    try:
        Unpickler(scales.cpu().numpy().tobytes(), _SCALE_NAMES).load()
    except ERRORS as error:
        raise ValueError(
            f"{name} of the checkpoint: FP8 scales that Transformer Engine did not write ({error}), and no code of "
            "them is run; take another checkpoint, or resume without delayed scaling"
        ) from None


def safe_storage(content: bytes) -> Any:
    """What `torch.storage._load_from_bytes` gives, of tensors alone."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_RECIPE_NAMES = (
    "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling", "Format",
    "_FormatHelper", "MMParams", "QParams",
)  # fmt: skip
_SCALE_NAMES: Names = {
    ("torch._utils", "_rebuild_tensor_v2"): maker_of("tensor"),
    ("torch.storage", "_load_from_bytes"): Maker(safe_storage),
    ("megatron.core.safe_globals", "safe_load_from_bytes"): Maker(safe_storage),
    ("collections", "OrderedDict"): Maker(lambda *items: OrderedDict()),
    **{("transformer_engine.common.recipe", name): maker_of(name) for name in _RECIPE_NAMES},
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): maker_of("TEDelayedScaling"),
}
