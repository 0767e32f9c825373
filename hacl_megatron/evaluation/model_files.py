"""What is settled of a model before it is loaded: which files it is, on which device and in which precision it runs."""

import hashlib
from pathlib import Path

import torch


def choose_device(device: str) -> torch.device:
    """The device that `auto`, `cuda` or `cpu` means here. Raises ValueError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU; leave the flag out to run on the CPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> str:
    """The precision that answers are made in where no flag says another."""
    return "bfloat16" if device.type == "cuda" else "float32"


def fingerprint(folder: Path) -> str:
    """`sha256:` over names, sizes and first and last MiB of a model's files: tells two exports apart in no time.

    For its answers only: the whole of a 7B's 14 GB would take a minute to read.
    """
    digest, edge = hashlib.sha256(), 1 << 20
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(edge))
            if size > edge:
                file.seek(max(edge, size - edge))
                digest.update(file.read())
    return f"sha256:{digest.hexdigest()}"
