"""A new file of many gigabytes, written end to end: on a clean exit all of it has reached the disk."""

import io
import os
from pathlib import Path

WRITEBACK_BYTES = 64 << 20


class SyncedFile(io.BufferedWriter):
    """A binary file to write, as a context manager.

    The disk is told to begin every `WRITEBACK_BYTES`: left alone, Linux waits until a tenth of memory is dirty, and the
    sync at the end for all of it. Without this, 3.3 GB took a conversion to Hugging Face 12.5 s instead of 7.4.
    """

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "wb"))
        self._unsent = 0

    def write(self, content) -> int:
        count = super().write(content)
        self._unsent += count
        if self._unsent >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsent = 0
        return count

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().__exit__(kind, error, traceback)
