"""Where image bytes come from: a folder, read by the names that LLaVA's JSON gives.

    name ("train2014/COCO_x.jpg") ─FolderStore.read→ bytes ─image_key→ int64 that tells equal images

A name comes from a user's file, so it is not trusted to stay inside the folder.
"""

import hashlib
import os
import stat
from pathlib import Path


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
        """The file that `name` stands for, every link followed. Raises UnusableImage when that leaves the folder."""
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UnusableImage(f"the name {name!r} leaves the image folder")
        try:
            path = (self.root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # name too long; null byte; loop of links (Python < 3.13)
            raise UnusableImage(f"the name {name!r} is no file name: {error}") from None
        if not path.is_relative_to(self.root):
            raise UnusableImage(f"the name {name!r} is a link to {path}, outside the image folder {self.root}")
        return path

    def read(self, name: str) -> bytes:
        """All bytes of the file `name`. Raises UnusableImage when there is none to read."""
        path = self.path(name)
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise UnusableImage("is a folder, not an image file")
            if not stat.S_ISREG(mode):  # a pipe would block the reader for ever
                raise UnusableImage("is not a regular file")
            data = path.read_bytes()
        except FileNotFoundError:
            raise UnusableImage(f"no such file in the image folder {self.root}") from None
        except OSError as error:
            raise UnusableImage(f"cannot be read: {error.strerror or error}") from None
        if not data:
            raise UnusableImage("the file is empty")
        return data
