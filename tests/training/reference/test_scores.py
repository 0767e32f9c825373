"""The file of the reference's scores: what comes back, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hacl_megatron.training.reference.scores import ReferenceScores

IDENTITY = {"content of --data-path": "a", "--version": "plain"}


def test_scores_come_back_bit_for_bit_by_sample(tmp_path: Path) -> None:
    """Catches a wrong border between samples, and rounding to fp32."""
    rng = np.random.default_rng(0)
    given = {7: rng.normal(size=(1, 2)).tolist(), 3: rng.normal(size=(3, 2)).tolist(), 5: []}
    ReferenceScores.of(given, IDENTITY).write(tmp_path / "deep" / "scores.safetensors")
    found = ReferenceScores.read(tmp_path / "deep" / "scores.safetensors")
    assert found(3).tolist() == given[3] and found(7).tolist() == given[7]
    assert [found(sample_id) for sample_id in (0, 5, 6, 8)] == [None] * 4
    assert found.difference(IDENTITY) is None
    assert found.difference({**IDENTITY, "--version": "v1"}) == "--version was plain and is v1"
    assert found.difference({"--seed": "1"}) == "--seed was not known and is 1"


def test_nothing_scored_is_a_file_too(tmp_path: Path) -> None:
    ReferenceScores.of({}, {}).write(tmp_path / "none.safetensors")
    assert ReferenceScores.read(tmp_path / "none.safetensors")(0) is None


def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    good = {"sample_ids": np.array([1, 4]), "starts": np.array([0, 1, 3]), "likelihoods": np.zeros((3, 2))}
    others = {
        "one missing": {name: good[name] for name in ("sample_ids", "starts")},
        "fp32": {**good, "likelihoods": np.zeros((3, 2), np.float32)},
        "too few": {**good, "likelihoods": np.zeros((2, 2))},
        "not ascending": {**good, "sample_ids": np.array([4, 1])},
        "a negative count": {**good, "starts": np.array([0, 4, 3])},
        "NaN": {**good, "likelihoods": np.full((3, 2), np.nan)},
        "one column": {**good, "likelihoods": np.zeros((3, 1))},
    }
    for name, arrays in others.items():
        save_file(arrays, path)
        with pytest.raises(ValueError, match=f"{path}: its arrays are not those") as refused:
            ReferenceScores.read(path)
        assert "\n" not in str(refused.value), name
    save_file(good, path)
    whole = path.read_bytes()
    assert len(ReferenceScores.read(path)(4)) == 2
    for data in (b"", whole[:-8], b"\x80\x04\x95" + whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}: not a file of reference scores"):
            ReferenceScores.read(path)
    with pytest.raises(ValueError, match="no such file"):
        ReferenceScores.read(tmp_path / "absent")


def test_the_file_is_whole_when_it_is_synced(tmp_path: Path, monkeypatch) -> None:
    """Catches bytes that Python still holds then: renamed and synced, the file would be empty after a power cut."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file, sync=os.fsync: (synced.append(os.fstat(file).st_size), sync(file)))
    ReferenceScores.of({7: [[1.0, 2.0]]}, IDENTITY).write(tmp_path / "scores.safetensors")
    assert synced and synced[0] == (tmp_path / "scores.safetensors").stat().st_size
