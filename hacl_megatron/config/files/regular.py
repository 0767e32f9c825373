"""Opens what a user names as a file only where it is one: a pipe would wait for ever, a device may never end.

with open(path, "rb", opener=only_regular) as file: ...
"""

import errno
import os
import stat

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


class NotRegular(OSError):
    """What is named as a file is a folder, a pipe, a socket or a device; `strerror` says which."""


def only_regular(path: str | os.PathLike[str], flags: int) -> int:
    """`opener` of `open`: the file's descriptor. Raises OSError, NotRegular among them."""
    try:
        _expect_regular(path, os.stat(path))  # before it is opened: that alone may do something to a device
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # Without O_NONBLOCK the opening of a pipe that has taken its place waits. It means nothing to a regular file.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _expect_regular(path, os.fstat(descriptor))
    except NotRegular:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | os.PathLike[str], expected: str) -> None:
    """Raises ValueError, one line, unless there is a regular file at `path`; `expected` says which, and what to do."""
    try:
        _expect_regular(path, os.stat(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}; expected {expected}") from None


def _expect_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise NotRegular(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))
