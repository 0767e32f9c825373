"""Raw LLaVA JSON as `--data-path`: prepared into a cache when it is first used, by one process while others wait.

    data.json ─(path, size, mtime)→ .hacl_megatron_cache/data.json-1a2b…-3c4d….arrow ─whose is it?→ ArrowManifest

A URL is copied to the node first (`hacl_megatron.data.node_cache`).

The cache lies beside the file, where all nodes see it; where that folder cannot be written, or where others may write
what they like, in ~/.cache/hacl_megatron, else in the temporary folder. Its records are the file's, one for one:
duplicates are dropped by tools/prepare_data.py alone. One that another user made could hold anything: it is used only
where that user is root or owns the data.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Container, Iterator

from hacl_megatron.config.console import notify
from hacl_megatron.config.files.objects import NoSuchObject
from hacl_megatron.config.files.regular import check_regular, only_regular
from hacl_megatron.config.files.urls import check_url, data_object, is_url
from hacl_megatron.config.flags import MANIFEST_FILE
from hacl_megatron.data.node_cache import NodeCache
from hacl_megatron.data.prepare.arrow_manifest import FINDINGS, FORMAT, ArrowManifest
from hacl_megatron.data.prepare.parts import build_parts, merge_parts, remove_folder

CACHE_FOLDER = ".hacl_megatron_cache"
"""Beside the JSON file."""
READING = 7
"""Raised when files are read in another way or more is found in them, so that they are prepared again."""
NOTICE_BYTES = 100 << 20
"""Files from this size on take long enough to say so."""


def open_data(path: str, cache_dir: str | None = None) -> ArrowManifest:
    """What `--data-path` names: a folder of tools/prepare_data.py, its manifest.arrow, or raw LLaVA JSON; or their URL.

    `cache_dir` replaces the places where prepared JSON is kept, and copies of what lies at URLs. Raises ValueError for
    whatever is wrong with the data.
    """
    if is_url(path):
        return _open_url(path, cache_dir)
    if os.path.isdir(path):
        return ArrowManifest(os.path.join(path, MANIFEST_FILE))
    if path.endswith(".arrow"):
        return ArrowManifest(path)
    return _open_json(path, cache_dir)


def _open_url(url: str, cache_dir: str | None) -> ArrowManifest:
    check_url("data", url)
    name = data_object(url)
    try:
        copy = NodeCache(cache_dir).whole(name)
        if name.endswith(".arrow"):
            file = open(copy, "rb")  # noqa: SIM115  # closed by what reads it
            found = os.fstat(file.fileno()).st_ino
            try:
                return ArrowManifest(name, file)
            except ValueError as error:  # the object, or the copy: a power cut, a bad disk
                notify(f"{str(error).split(';')[0]}: copied anew")
            with contextlib.suppress(FileNotFoundError):
                if os.stat(copy).st_ino == found:  # else another process has copied it anew
                    os.unlink(copy)
            return ArrowManifest(name, open(NodeCache(cache_dir).whole(name), "rb"))
    except NoSuchObject:
        raise ValueError(
            f"{name}: no such object; expected LLaVA JSON (.json, .jsonl), or a folder of tools/prepare_data.py"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{name}: cannot be copied to this node ({error.strerror or error}); give --data-cache-dir a folder of "
            "your own with room for it"
        ) from None
    try:
        return _open_json(copy, cache_dir, shown=name)
    except ValueError as error:
        raise ValueError(str(error).replace(copy, name)) from None


def _open_json(path: str, cache_dir: str | None, shown: str | None = None) -> ArrowManifest:
    """Of JSON at `path`; `shown` is how records name it where that is not the path."""
    check_regular(path, "a LLaVA JSON or JSONL file, check --data-path")
    name = _cache_name(path)
    folders = [cache_dir] if cache_dir else _default_folders(path)
    trusted = {0, os.geteuid(), os.stat(path).st_uid}
    for folder in folders:  # a file beside the data may be older than the right to write there
        found = _ready(os.path.join(folder, name), trusted)
        if found is not None:
            return found
    problem: OSError | None = None
    for folder in (*folders, _temporary_folder()):
        file = os.path.join(folder, name)
        try:
            _make_folder(folder)
            _expect_safe(folder, trusted)
            with _locked(f"{file}.lock") as is_alone:
                found = _ready(file, trusted)  # another process has prepared it while this one waited
                if found is not None:
                    return found
                _remove_abandoned(file, is_alone)
                _build(path, file, shown)
                found = _ready(file, trusted)
        except OSError as error:  # read-only, full, over quota, forbidden, others': the next one may do
            problem = error
            continue
        if found is not None:
            return found
        problem = OSError(errno.EIO, "what was written there is not what is read back", file)
    raise ValueError(
        f"{path}: nowhere to keep its prepared form ({problem}); give --data-cache-dir a folder with room for it"
    )


def _ready(path: str, trusted: Container[int]) -> ArrowManifest | None:
    """The cache file at `path`; None where there is none, or none to be relied on, which is said.

    `trusted`: users whose files are.
    """
    try:
        file = open(path, "rb", opener=_no_link)  # noqa: SIM115  # closed by what reads it
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:  # a link, a pipe
        notify(f"{path}: {error.strerror}: not used as a cache, the data are prepared anew")
        return None
    found = os.fstat(file.fileno())
    fault = None
    if found.st_uid not in trusted:
        fault = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = "may be written by other users"
    if fault is not None:
        file.close()
        notify(f"{path}: {fault}: not used as a cache, the data are prepared anew")
        return None
    try:
        return ArrowManifest(path, file)
    except ValueError as error:
        notify(f"{str(error).split(';')[0]}: the data are prepared anew")
        return None


def _no_link(path: str, flags: int) -> int:
    return only_regular(path, flags | os.O_NOFOLLOW)


def _expect_safe(folder: str, trusted: Container[int]) -> None:
    """OSError, and a line, where another user could put another file in the place of one in `folder`."""
    if folder == _temporary_folder():  # nobody else may write in it: `_make_folder`
        return
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        found, fault = os.stat(place), None
        owners = {found.st_uid, os.lstat(place).st_uid} if place == folder else set()
        if others := [owner for owner in owners if owner not in trusted]:
            fault = f"belongs to another user (uid {others[0]})"
        elif found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            fault = "may be written by every user"
        if fault is not None:
            notify(f"{place} {fault}: no cache is kept in {folder}")
            raise PermissionError(errno.EACCES, fault, place)


def _cache_name(path: str) -> str:
    """File name that says which file, in which state, read by which version of this code."""
    real = os.path.realpath(path)
    state = os.stat(real)

    def key(*parts: object) -> str:
        return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()

    stem = os.path.basename(path)[-100:]
    return f"{stem}-{key(real)}-{key(FORMAT, READING, state.st_size, state.st_mtime_ns)}.arrow"


def _default_folders(path: str) -> list[str]:
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), CACHE_FOLDER)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [beside, os.path.join(home, "hacl_megatron")]


def _temporary_folder() -> str:
    return os.path.join(tempfile.gettempdir(), f"hacl_megatron-{os.geteuid()}")


def _make_folder(folder: str) -> None:
    """Raises OSError also where the temporary folder, whose name anyone can guess, belongs to someone else."""
    ours = folder == _temporary_folder()
    os.makedirs(folder, mode=0o700 if ours else 0o775, exist_ok=True)
    if ours and (os.path.islink(folder) or os.lstat(folder).st_uid != os.geteuid()):
        raise PermissionError(errno.EACCES, "the folder belongs to another user", folder)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Holds a lock that the kernel frees with the process; gives whether there is one. Without it (file systems that
    know none) each process prepares for itself, and whoever is last puts the same content in place."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    is_alone = True
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            is_alone = False
        yield is_alone
    finally:
        os.close(file)


def _build(path: str, output: str, shown: str | None = None) -> None:
    name, size = _cache_name(path), os.path.getsize(path)
    if size >= NOTICE_BYTES:
        notify(f"preparing {path} ({size / 1e9:.1f} GB), once: {output}")
    work = tempfile.mkdtemp(prefix=f"{os.path.basename(output)}.parts-", dir=os.path.dirname(output))
    try:
        parts, counts = build_parts([path], work, deduplicate=False, num_workers=1)
        if _cache_name(path) != name:
            raise ValueError(f"{path}: changed while it was read; start again when it is finished")
        merge_parts(parts, output, {"files": [shown or path], FINDINGS: [found.as_json() for found in counts.findings]})
        os.chmod(output, 0o644)
    finally:
        remove_folder(work)
    _remove_older(output)


ABANDONED_SECONDS = 3600
"""A work folder that was not touched for so long belongs to a process that was killed."""


def _remove_abandoned(output: str, is_alone: bool) -> None:
    """Removes what killed processes left of this very file, at once where a lock says that none is at work."""
    folder, name = os.path.split(output)
    for other in os.listdir(folder):
        if other.startswith((f"{name}.parts-", f"{name}.tmp-")):
            path = os.path.join(folder, other)
            with contextlib.suppress(OSError):
                if is_alone or time.time() - os.stat(path).st_mtime > ABANDONED_SECONDS:
                    remove_folder(path) if os.path.isdir(path) else os.unlink(path)


def _remove_older(output: str) -> None:
    """Removes what was prepared, wholly or in part, from earlier states of the same file."""
    folder, name = os.path.split(output)
    stem = name.rpartition("-")[0]
    for other in os.listdir(folder):
        path = os.path.join(folder, other)
        with contextlib.suppress(OSError):
            if other == name or not other.startswith(f"{stem}-"):
                continue
            if other.endswith(".arrow"):
                os.unlink(path)
            elif (".parts-" in other or ".tmp-" in other) and (
                time.time() - os.stat(path).st_mtime > ABANDONED_SECONDS
            ):
                remove_folder(path) if os.path.isdir(path) else os.unlink(path)
