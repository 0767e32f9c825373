"""What object stores gave, kept on the node's disk for all its ranks, within a bound.

    key ─→ kept/3f/3f91… ─ there ─────────────────────────────────────────→ bytes
              └ not there ─ one process fetches, the others wait for it ─┬→ bytes
                                                          room in kept? ─┴→ kept/, else recent/

An epoch reads each image once, so that what was read longest ago is what comes next: evicting it would leave a cache
of half the data without one hit. What is kept first therefore stays as long as any run uses it, and only a small part,
`recent`, is turned over: ranks of a node that read the same images at about the same time share them there.
Manifests and JSON, which are mapped into memory whole, lie beside, in `whole`, and are not counted.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from hacl_megatron.config.console import notify
from hacl_megatron.config.files.checksum import BLOCK_BYTES, Checksum, checksum
from hacl_megatron.config.files.objects import ObjectChanged, object_state, read_range
from hacl_megatron.config.files.urls import split_url
from hacl_megatron.config.flags import DataFlags

KEPT, RECENT = 5 / 8, 1 / 8
"""Of the bound. The rest is for what other processes have written and this one has not seen."""
_DRAWERS = 64
"""Folders that either part is divided into, each with its share of the bound."""
_UNUSED_SECONDS = 24 * 3600
"""What nobody has read for so long makes room in `kept`."""
_TOUCH_SECONDS = 3600
_LOOK_AGAIN_SECONDS = 300
_PIECE = 8 << 20
"""Bytes of a large object that are asked for at a time."""

Fetch = Callable[[str | None], "tuple[bytes, str] | None"]
"""Bytes and their version; None where the version that it is called with is still the newest."""


class NodeCache:
    """The cache of one node, for processes of one user; threads may share it. Nothing is made before it is used.

    Args:
        folder: where; None: the temporary folder.
        most_bytes: of images, 0 keeps none.
    """

    def __init__(self, folder: str | None = None, most_bytes: int = int(DataFlags.data_cache_gb * 1e9)) -> None:
        self.folder = os.path.join(folder or tempfile.gettempdir(), f"hacl_megatron_objects-{os.geteuid()}")
        self.most_bytes = most_bytes
        self.hits, self.fetches = 0, 0
        self._parts = [
            _Part(os.path.join(self.folder, "kept"), int(most_bytes * KEPT) // _DRAWERS, turns_over=False),
            _Part(os.path.join(self.folder, "recent"), int(most_bytes * RECENT) // _DRAWERS, turns_over=True),
        ]
        self._made = False
        self._lock = threading.Lock()

    @classmethod
    def of(cls, data: DataFlags) -> "NodeCache":
        """As a run of these flags keeps it."""
        return cls(data.data_cache_dir, int(data.data_cache_gb * 1e9))

    def read(self, key: str, fetch: Fetch, *, fixed: bool) -> bytes:
        """The bytes under a key, out of the cache or fetched.

        Args:
            fixed: whether the key tells the bytes; else a version that is found here is asked for again.

        Raises what `fetch` raises. A cache that cannot be written is said once, and does without.
        """
        if self.most_bytes <= 0 or not self._is_made():
            return self._fetched(fetch)[0]
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        if (found := self._find(name)) is not None:
            data, version = found
            if fixed or (newer := fetch(version)) is None:
                self.hits += 1
                return data
            self.fetches += 1
            with self._held(name) as file:
                self._keep(name, file, *newer)
            return newer[0]
        with self._held(name) as file:
            if (found := self._find(name)) is not None:  # another has fetched it while this one waited
                self.hits += 1
                return found[0]
            data, version = self._fetched(fetch)
            self._keep(name, file, data, version)
        return data

    def whole(self, url: str, *, threads: int = 8) -> str:
        """Path of a copy of a whole object, which is made where there is none of its newest version, or a damaged one.

        Manifests have a checksum in themselves, which whoever opens them holds them to; of others it is kept beside.
        Raises NoSuchObject, StoreError (ObjectChanged where it is replaced meanwhile), and OSError where it cannot be
        written.
        """
        state = object_state(url, first_look=True)
        self._make()
        folder = os.path.join(self.folder, "whole")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        stem = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        key = hashlib.blake2b(f"{state.size} {state.version}".encode(), digest_size=8).hexdigest()
        path = os.path.join(folder, f"{stem}-{key}-{split_url(url)[2].rpartition('/')[2][-100:]}")
        sums = None if path.endswith(".arrow") else os.path.join(self.folder, "sums", os.path.basename(path))
        if (fault := _fault_of_copy(path, state.size, sums)) is None:
            return path
        with _locked(f"{path}.part") as file:
            if (fault := _fault_of_copy(path, state.size, sums)) is not None:  # no other has made it meanwhile
                if fault:
                    notify(f"the copy of {url} at {path} {fault}: copied anew")
                if state.size >= 100 << 20:
                    notify(f"copying {url} ({state.size / 1e9:.1f} GB), once a node: {path}")
                file.truncate(state.size)

                def copy(start: int) -> None:
                    size = min(_PIECE, state.size - start)
                    data = memoryview(read_range(url, start, size, version=state.version))
                    while data:  # a disk that fills up takes a part first, and says so of the next
                        written = os.pwrite(file.fileno(), data, start)
                        start, data = start + written, data[written:]

                with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
                    try:
                        list(pool.map(copy, range(0, state.size, _PIECE)))
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise
                if not state.version.startswith('"') and object_state(url) != state:  # no tag that pieces are asked by
                    raise ObjectChanged(f"{url}: changed while it was read; start again when it is finished")
                os.fsync(file.fileno())
                with contextlib.suppress(FileNotFoundError):  # without locks another may have moved it
                    if sums is not None:
                        os.makedirs(os.path.dirname(sums), mode=0o700, exist_ok=True)
                        text = _sum_of(f"{path}.part")
                        with open(sums, "w", opener=_make_anew) as summed:
                            summed.write(text)
                    os.replace(f"{path}.part", path)
                for place in (folder, os.path.join(self.folder, "sums")):
                    for other in os.listdir(place) if os.path.isdir(place) else ():
                        if other.startswith(f"{stem}-") and other != os.path.basename(path):
                            with contextlib.suppress(OSError):
                                os.unlink(os.path.join(place, other))
        return path

    # ---- files of images: checksum (8 bytes), length of the version (2 bytes), version, bytes

    def _find(self, name: str) -> tuple[bytes, str] | None:
        for part in self._parts:
            path = part.path(name)
            try:
                with open(path, "rb", opener=_no_link) as file:
                    if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_SECONDS:
                        os.utime(file.fileno())
                    content = file.read()
            except OSError:
                continue
            length = int.from_bytes(content[8:10], "little")
            if len(content) >= 10 + length and checksum(memoryview(content)[8:]).to_bytes(8, "little") == content[:8]:
                return content[10 + length :], content[10 : 10 + length].decode("utf-8", "replace")
            with contextlib.suppress(OSError):  # a power cut, a bad disk
                os.unlink(path)
        return None

    def _keep(self, name: str, file: BinaryIO | None, data: bytes, version: str) -> None:
        """Writes into the file that is held, and puts it where there is room."""
        if file is None:
            return
        tag = version.encode("utf-8", "replace")[:0xFFFF]
        head = len(tag).to_bytes(2, "little") + tag
        digest = Checksum(head)
        digest.update(data)
        try:
            part = next((part for part in self._parts if part.has_room(name, 8 + len(head) + len(data))), None)
            if part is None:
                return
            os.ftruncate(file.fileno(), 0)  # a killed process may have left more
            written = os.writev(file.fileno(), [digest.value.to_bytes(8, "little"), head, data])
            if written != 8 + len(head) + len(data):
                raise OSError(errno.ENOSPC, "no room for all of it")
            os.replace(file.name, part.path(name))
            for other in self._parts if tag else ():  # an earlier version
                if other is not part:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(other.path(name))
        except OSError as error:
            _say_once(f"{self.folder}: images are not kept ({error.strerror or error})")

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[BinaryIO | None]:
        """An empty file that one process and thread holds at a time; None where none can be made."""
        with contextlib.ExitStack() as stack:
            file = None
            try:
                os.makedirs(os.path.join(self.folder, "part"), mode=0o700, exist_ok=True)
                file = stack.enter_context(_locked(os.path.join(self.folder, "part", name)))
            except OSError as error:
                _say_once(f"{self.folder}: images are not kept ({error.strerror or error})")
            yield file

    def _fetched(self, fetch: Fetch) -> tuple[bytes, str]:
        self.fetches += 1
        found = fetch(None)
        assert found is not None, "nothing was known of it"
        return found

    def _is_made(self) -> bool:
        if self._made:
            return True
        try:
            self._make()
        except OSError as error:
            _say_once(f"{self.folder}: images are not kept ({error.strerror or error})")
            return False
        _say_once(f"images of object stores are kept in {self.folder}, {self.most_bytes / 1e9:g} GB a node at most")
        return True

    def _make(self) -> None:
        """Makes the folder, for this user alone. PermissionError where it is another's, or others may enter it."""
        with self._lock:
            if self._made:
                return
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            found, above = os.lstat(self.folder), os.stat(os.path.dirname(self.folder))
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise PermissionError(1, "the folder may be entered by other users", self.folder)
            if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
                raise PermissionError(1, "other users may replace the folder", self.folder)
            self._made = True


class _Part:
    """Part of the cache, in drawers by the names' first digits, each with its bound.

    Args:
        bound: bytes of a drawer.
        turns_over: whether the oldest files make room for new ones; else those that nobody has read for a day.
    """

    def __init__(self, folder: str, bound: int, *, turns_over: bool) -> None:
        self._folder, self._bound, self._turns_over = folder, bound, turns_over
        self._used: dict[str, int] = {}
        self._unseen: dict[str, int] = {}
        """Bytes written since the last look."""
        self._full_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> str:
        return os.path.join(self._folder, self._drawer(name), name)

    def has_room(self, name: str, size: int) -> bool:
        """Whether a file may be added, which is then counted."""
        drawer = self._drawer(name)
        with self._lock:
            if size > self._bound or time.monotonic() < self._full_until.get(drawer, 0):
                return False
            unseen = self._unseen.get(drawer, 0)
            used = self._used.get(drawer)
            if used is None or unseen > self._bound // 64 or used + size > self._bound:
                used = self._used[drawer] = self._look(drawer, size)
                self._unseen[drawer] = 0
            if used + size > self._bound:
                self._full_until[drawer] = time.monotonic() + _LOOK_AGAIN_SECONDS
                return False
            self._used[drawer] += size
            self._unseen[drawer] = self._unseen.get(drawer, 0) + size
            return True

    def _look(self, drawer: str, size: int) -> int:
        """Bytes that lie there, once what may go has made room where it is needed."""
        folder = os.path.join(self._folder, drawer)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = []
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room
                found.append((entry.stat(), entry.path))
        used = sum(about.st_size for about, _ in found)
        if used + size <= self._bound:
            return used
        aim = self._bound // 2 if self._turns_over else self._bound - size
        for about, path in sorted(found, key=lambda item: item[0].st_mtime):
            if used <= aim or (not self._turns_over and time.time() - about.st_mtime < _UNUSED_SECONDS):
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            used -= about.st_size
        return used

    def _drawer(self, name: str) -> str:
        return f"{int(name[:2], 16) % _DRAWERS:02x}"


@contextlib.contextmanager
def _locked(path: str) -> Iterator[BinaryIO]:
    """A file that this thread alone writes; removed at the end, unless it was moved to its place."""
    while True:
        # Whoever has waited may find it moved or removed: another is made.
        with open(path, "r+b", opener=_make) as file:
            with contextlib.suppress(OSError):  # a file system without locks: each fetches for itself
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _lies_at(path, file):
                continue
            try:
                yield file
            finally:
                if _lies_at(path, file):
                    os.unlink(path)
            return


def _lies_at(path: str, file: BinaryIO) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _make(path: str, flags: int) -> int:
    return _no_link(path, flags | os.O_CREAT)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _make_anew(path: str, flags: int) -> int:
    return _no_link(path, flags | os.O_CREAT | os.O_TRUNC)


def _fault_of_copy(path: str, size: int, sums: str | None) -> str | None:
    """What is wrong with a copy, empty where there is none; None where it is whole.

    Args:
        sums: the file with its checksum; None: it is not looked at.
    """
    try:
        found = os.stat(path).st_size
    except OSError:
        return ""
    if found != size:
        return f"has {found:,} of {size:,} bytes"
    try:
        if sums is not None and Path(sums).read_bytes() != _sum_of(path).encode():
            return "is damaged: its checksum is not the one that it was copied with"
    except OSError:
        return "has no checksum beside it"
    return None


def _sum_of(path: str) -> str:
    digest = Checksum()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        notify(line)
