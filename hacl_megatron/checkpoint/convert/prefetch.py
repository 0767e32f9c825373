"""Lets the disk read a conversion's first files while Python imports torch; imports nothing large itself.

Without it, 3.3 GB from Hugging Face took 9.4 s instead of 8.1 (of pairs measured in turn, the median ratio was 1.16).
"""

import os
import threading
from pathlib import Path

SHARE = 1 / 8
"""Of the machine's memory: no more than this is asked for."""


def prefetch(folder: Path) -> None:
    """Ask for the weight files of a Hugging Face folder, in a thread; does nothing where the system cannot."""
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_ask, args=(folder,), daemon=True).start()


def _ask(folder: Path) -> None:
    left = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE)
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        try:
            size = min(left, path.stat().st_size)
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # whoever reads it will say so
            return
        left -= size
        if left <= 0:
            return
