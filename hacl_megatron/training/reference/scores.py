"""Log-likelihoods of answers and twins by sample, in a file that says what they are of."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hacl_megatron.config.files.partial import hold, remove_leftovers

_TENSORS = {"sample_ids": np.int64, "starts": np.int64, "likelihoods": np.float64}


@dataclass(frozen=True, kw_only=True)
class ReferenceScores:
    """Of S samples with P twins in all. Calling it gives a sample's own: float64 [P of the sample, A], or None."""

    sample_ids: np.ndarray
    """int64 [S]: manifest indices, ascending."""
    starts: np.ndarray
    """int64 [S + 1]: where each sample's twins begin, then P."""
    likelihoods: np.ndarray
    """float64 [P, A]: log π₀ of the true answer and of the twin, summed over the tokens that are compared; for mdpo
    also of the true answer behind a crop of the image."""
    identity: Mapping[str, str]
    """What the scores are of: weights, data, tokenizer and whatever decides the rows, by names that a user knows."""

    def __call__(self, sample_id: int) -> np.ndarray | None:
        at = int(np.searchsorted(self.sample_ids, sample_id))
        if at == len(self.sample_ids) or self.sample_ids[at] != sample_id:
            return None
        return self.likelihoods[self.starts[at] : self.starts[at + 1]]

    @classmethod
    def of(cls, by_sample: Mapping[int, Sequence[Sequence[float]]], identity: Mapping[str, str]) -> "ReferenceScores":
        """From each sample's numbers of its twins, A of each; samples without any are left out."""
        ids = sorted(sample_id for sample_id, pairs in by_sample.items() if len(pairs))
        counts = [len(by_sample[sample_id]) for sample_id in ids]
        pairs = [pair for sample_id in ids for pair in by_sample[sample_id]]
        return cls(
            sample_ids=np.array(ids, dtype=np.int64),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            likelihoods=np.array(pairs, dtype=np.float64).reshape(-1, len(pairs[0]) if pairs else 2),
            identity=dict(identity),
        )

    @classmethod
    def read(cls, path: Path) -> "ReferenceScores":
        """Raises ValueError, which names the file, for whatever `write` did not leave."""
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file; expected what tools/score_reference.py wrote")
        try:
            with safe_open(path, "np") as file:
                identity = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys() if name in _TENSORS}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError) as error:
            raise ValueError(f"{path}: not a file of reference scores ({error}); make it again") from None
        if {name: values.dtype for name, values in found.items()} != _TENSORS or not _fit(**found):
            raise ValueError(f"{path}: its arrays are not those of tools/score_reference.py; make it again")
        return cls(**found, identity=identity)

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        with open(partial, "wb") as file:
            hold(file)
            file.write(save(arrays, metadata=dict(self.identity)))
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)

    def same_numbers(self, other: "ReferenceScores") -> bool:
        """Whether all samples have the very same scores."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _TENSORS)

    def difference(self, identity: Mapping[str, str]) -> str | None:
        """In words, in what the scores are of something else; None where they are not.

        Args:
            identity: what is wanted; what it does not name is not compared.
        """
        for name, wanted in identity.items():
            if (found := self.identity.get(name, "not known")) != wanted:
                return f"{name} was {found} and is {wanted}"
        return None


def _fit(sample_ids: np.ndarray, starts: np.ndarray, likelihoods: np.ndarray) -> bool:
    shapes = sample_ids.ndim == starts.ndim == 1 and likelihoods.ndim == 2 and likelihoods.shape[1] in (2, 3)
    if not shapes or len(starts) != len(sample_ids) + 1 or starts[0] != 0 or starts[-1] != len(likelihoods):
        return False
    rises = (np.diff(starts) > 0).all() and (np.diff(sample_ids) > 0).all()
    return bool(rises and np.isfinite(likelihoods).all())
