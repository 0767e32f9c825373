"""Weights that a narrower dtype cannot hold: a conversion must not write infinity and call it a model.

Checkpoints trained in bfloat16 and cast to float16 give NaN from the first token on, as many reports have it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_tiny_llava
from tests.tool_runs import run_tool

PLACES = {
    "matrix": "language_model.model.layers.0.mlp.gate_proj.weight",
    "norm": "language_model.model.norm.weight",
    "carried": "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
}


def write_with(folder: Path, place: str, value: float, dtype: torch.dtype) -> Path:
    source = write_tiny_llava(folder, layers=1, vision_layers=2)
    tensors = load_file(source / "model.safetensors")
    end = PLACES[place].removeprefix("language_model.model.").removeprefix("vision_tower.vision_model.")
    name = next(name for name in tensors if name.endswith(end))
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[0] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("place", PLACES)
def test_a_conversion_to_float16_refuses_what_becomes_infinity(tmp_path: Path, place: str, capsys) -> None:
    """Catches a silent infinity in what is converted, layers that training does not run among it."""
    source = write_with(tmp_path / "in", place, 1e5, torch.float32)
    convert = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save")
    assert run_tool(*convert, "--dtype", "float16") == 2
    assert "holds values beyond float16's range; write bfloat16 or float32 instead" in capsys.readouterr().err
    assert not (tmp_path / "save").exists()
    assert run_tool(*convert, "--dtype", "bfloat16") == 0


def test_infinity_that_was_there_is_converted(tmp_path: Path) -> None:
    """Catches a refusal of what the source holds itself: nothing is changed by the conversion."""
    source = write_with(tmp_path / "in", "norm", float("inf"), torch.float32)
    convert = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save", "--dtype", "float16")
    assert run_tool(*convert) == 0


def test_float64_beyond_float32_is_refused(tmp_path: Path, capsys) -> None:
    """Catches the same out of the widest dtype."""
    source = write_with(tmp_path / "in", "norm", 1e300, torch.float64)
    convert = ("convert_hf_to_megatron", "--hf-path", source, "--save", tmp_path / "save", "--dtype", "float32")
    assert run_tool(*convert) == 2
    assert "beyond float32's range" in capsys.readouterr().err
