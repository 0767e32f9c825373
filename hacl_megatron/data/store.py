"""Where image bytes come from: a folder, read by the names that LLaVA's JSON gives, or tar shards, read by place.

    name ("train2014/COCO_x.jpg") ──FolderStore.read──┐
    shard, offset, size ─────────────ShardReader.read─┴→ bytes ─image_key→ int64 that tells equal images

Either may be a path or the URL of an object store, whose bytes go through the node's cache: `image_folder` and
`ShardReader.read` are where the two part.

A name comes from a user's file, so it is not trusted to stay inside the folder. A shard is never unpacked: its bytes
are read where the manifest says, and whatever its member headers name is not looked at.
"""

import hashlib
import io
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hacl_megatron.config.files.checksum import checksum
from hacl_megatron.config.files.objects import NoSuchObject, NotThatLong, TooLarge, read_object, read_range
from hacl_megatron.config.files.regular import NotRegular, only_regular
from hacl_megatron.config.files.urls import below, check_url, inside, is_url, split_url
from hacl_megatron.data.node_cache import NodeCache

MAX_IMAGE_BYTES = 512 << 20
"""Eight bytes for each of the default `--max-image-pixels`; a larger file is refused unread."""


_NOT_IN_KEYS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""What obstore sends no request for: control characters, and halves of surrogate pairs."""
_MOST_KEY_BYTES = 1024
"""Of an object's whole name, as S3 has it."""


class UnusableImage(ValueError):
    """An image that cannot be read or decoded; its message is one line for `bad_samples.jsonl`."""


def image_key(data: bytes) -> int:
    """64-bit BLAKE2b of an image file's bytes as a signed integer (`PackedBatch.image_keys`)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class FolderStore:
    """Image files below one folder. Holds no open file, so threads may share it.

    Raises ValueError when `root` is no folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise ValueError(
                f"--image-folder {root} is not a folder; give the one that the image names are relative to"
            )

    def path(self, name: str) -> Path:
        """The file that `name` stands for, every link followed: relative to the folder, or absolute and inside it.

        Raises UnusableImage when that leaves the folder.
        """
        try:
            path = (self.root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # name too long; null byte; loop of links (Python < 3.13)
            raise UnusableImage(f"the name {name!r} is no file name: {error}") from None
        if not path.is_relative_to(self.root):
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise UnusableImage(f"the name {name!r} leaves the image folder {self.root}")
            raise UnusableImage(f"the name {name!r} is a link to {path}, outside the image folder {self.root}")
        return path

    def read(self, name: str) -> bytes:
        """All bytes of the file `name`. Raises UnusableImage when there is none to read."""
        try:
            with self.open(name) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise UnusableImage(f"cannot be read: {error.strerror or error}") from None
        if not data:
            raise UnusableImage("the file is empty")
        _check_size(len(data))
        return data

    def open(self, name: str) -> BinaryIO:
        """The file `name`, open. Raises UnusableImage when there is none to read."""
        path = self.path(name)
        try:
            file = open(path, "rb", opener=only_regular)  # noqa: SIM115 -- the caller's
        except NotRegular as error:
            raise UnusableImage(f"{error.strerror}, expected an image") from None
        except FileNotFoundError:
            raise UnusableImage(f"no such file in the image folder {self.root}") from None
        except OSError as error:
            raise UnusableImage(f"cannot be read: {error.strerror or error}") from None
        try:
            _check_size(os.fstat(file.fileno()).st_size)
        except UnusableImage:
            file.close()
            raise
        return file


class ObjectFolder:
    """Images below one URL of an object store. Threads may share it.

    Raises ValueError where the URL holds a secret, or is of no store that is read.
    """

    def __init__(self, root: str, cache: NodeCache) -> None:
        check_url("--image-folder", root)
        self.root, self._cache = root.rstrip("/"), cache

    def read(self, name: str) -> bytes:
        """All bytes of the object `name`. Raises UnusableImage when there is none to read, StoreError when the store
        fails, which is no fault of the image."""
        plain = inside(name)
        if plain is None:
            raise UnusableImage(f"the name {name!r} leaves the image folder {self.root}")
        url = below(self.root, plain)
        if _NOT_IN_KEYS.search(plain) or len(split_url(url)[2].encode()) > _MOST_KEY_BYTES:
            raise UnusableImage(f"the name {name[:200]!r} is no object's name: too long, or with control characters")

        def fetch(version: str | None) -> tuple[bytes, str] | None:
            found = read_object(url, most=MAX_IMAGE_BYTES, unless=version)
            if found is None:
                return None
            return found[0], found[1].version

        try:
            data = self._cache.read(url, fetch, fixed=False)
        except TooLarge as error:
            raise UnusableImage(_too_large(error.size)) from None
        except NoSuchObject:
            raise UnusableImage(f"no such object in the image folder {self.root}") from None
        if not data:
            raise UnusableImage("the object is empty")
        return data

    def open(self, name: str) -> BinaryIO:
        """The object `name`, as an open file. Raises as `read`."""
        return io.BytesIO(self.read(name))


ImageFolder = FolderStore | ObjectFolder
"""Images by their names."""


def image_folder(root: str | os.PathLike[str], cache: NodeCache | None = None) -> ImageFolder:
    """Images below a folder or a URL, read by their names. Raises ValueError as either class."""
    place = os.fspath(root)
    return ObjectFolder(place, cache or NodeCache()) if is_url(place) else FolderStore(place)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise UnusableImage(_too_large(num_bytes))


def _too_large(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes are more than an image file may have, {MAX_IMAGE_BYTES:,}"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Place of an image in a tar shard."""

    path: str
    """The shard."""
    offset: int
    """First byte."""
    size: int
    """Bytes."""
    checksum: int | None = None
    """Of these bytes; None: not known."""


MAX_OPEN_SHARDS = 256
"""Shards that stay open; more are opened for each read, well below the usual limit of 1024 open files."""


class ShardReader:
    """Random access to the images of tar shards. Threads may share it: reads carry their own position."""

    def __init__(self, cache: NodeCache | None = None) -> None:
        self._cache = cache or NodeCache()
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, stored: StoredImage) -> bytes:
        """The image's bytes. Raises UnusableImage when the shard does not hold them, StoreError when a store fails."""
        if is_url(stored.path):
            return self._read_object(stored)
        try:
            file, keep = self._open(stored.path)
            try:
                room = os.fstat(file).st_size - stored.offset
                if stored.offset < 0 or stored.size < 1 or stored.size > room:
                    raise UnusableImage(_not_in_shard(stored))
                _check_size(stored.size)
                return _checked(_read_at(file, stored), stored)
            finally:
                if not keep:
                    os.close(file)
        except OSError as error:
            raise UnusableImage(f"the shard cannot be read: {error.strerror or error}") from None

    def _read_object(self, stored: StoredImage) -> bytes:
        if stored.offset < 0 or stored.size < 1:
            raise UnusableImage(_not_in_shard(stored))
        _check_size(stored.size)

        def fetch(_: str | None) -> tuple[bytes, str]:
            return _checked(read_range(stored.path, stored.offset, stored.size), stored), ""

        try:
            if stored.checksum is None:  # nothing tells whether what was kept is still what is there
                return fetch(None)[0]
            key = f"{stored.path} {stored.offset} {stored.size} {stored.checksum}"
            return self._cache.read(key, fetch, fixed=True)
        except NotThatLong:
            raise UnusableImage(_not_in_shard(stored)) from None
        except NoSuchObject:
            raise UnusableImage("the shard is not there any more") from None

    def close(self) -> None:
        """Closes the shards. No `read` may be under way."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _open(self, path: str) -> tuple[int, bool]:
        """The shard's descriptor, and whether it stays open."""
        with self._lock:
            if path in self._files:
                return self._files[path], True
        # A link could lead anywhere, a pipe would block for ever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise UnusableImage("the shard is not a regular file")
        with self._lock:
            if path in self._files or len(self._files) >= MAX_OPEN_SHARDS:
                return file, False
            self._files[path] = file
            return file, True


def _not_in_shard(stored: StoredImage) -> str:
    return (
        f"bytes {stored.offset} to {stored.offset + stored.size} are not in the shard: it is cut off or not the one "
        "the manifest was made with"
    )


def _checked(data: bytes, stored: StoredImage) -> bytes:
    """The bytes, if they are those that were packed. Costs 1/40 of `image_key`."""
    if stored.checksum is not None and checksum(data) != stored.checksum:
        raise UnusableImage("is damaged in the shard: its checksum differs; restore the shard, or prepare again")
    return data


def _read_at(file: int, stored: StoredImage) -> bytes:
    pieces, at, end = [], stored.offset, stored.offset + stored.size
    while at < end:
        piece = os.pread(file, end - at, at)
        if not piece:
            raise UnusableImage("the shard ended while it was read")
        pieces.append(piece)
        at += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class ImageStore:
    """Images by sample: out of a tar shard where the manifest knows a place, else out of the image folder.

    Args:
        cache: of the node, for what lies at URLs; default: the one in the temporary folder.

    Raises ValueError when `root` is no folder.
    """

    def __init__(self, root: str | os.PathLike[str], cache: NodeCache | None = None) -> None:
        cache = cache or NodeCache()
        self.folder = image_folder(root, cache)
        self._shards = ShardReader(cache)

    def fetch(self, image: str, stored: StoredImage | None) -> bytes:
        """All bytes of an image file. Raises UnusableImage when there is none to read."""
        return self.folder.read(image) if stored is None else self._shards.read(stored)

    def open(self, image: str, stored: StoredImage | None) -> BinaryIO:
        """An image file, open: for its head alone. Raises UnusableImage when there is none to read."""
        return self.folder.open(image) if stored is None else io.BytesIO(self._shards.read(stored))

    def source(self, image: str, stored: StoredImage | None) -> str:
        """What to name in a complaint about the image."""
        if stored is not None:
            return f"{stored.path}: {image}"
        root = self.folder.root
        return below(root, image) if isinstance(root, str) else str(root / image)

    def close(self) -> None:
        """Closes the shards. No `fetch` may be under way."""
        self._shards.close()
