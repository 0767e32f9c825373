"""`--verify` of models that see pictures in tiles."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.evaluation.agreement import compare_models
from hacl_megatron.evaluation.image_agreement import compare_pixels
from hacl_megatron.evaluation.random_dialogues import random_batch
from tests.tiny_tiles import write_tiny_next, write_tiny_onevision, write_tiny_original_next
from tests.tool_runs import apart, to_hf, to_megatron


def verified_both_ways(folder: Path) -> float:
    """Convert a LLaVA-NeXT of either layout and export a LLaVA-OneVision, all verified.

    Returns how far logits are off where the newline is another.
    """
    next_source = write_tiny_next(folder / "next", family="mistral", head_dim=12, layers=2, vision_layers=2)
    to_megatron(next_source, folder / "next-megatron", "--verify")
    original, _ = write_tiny_original_next(folder / "original", layers=2, vision_layers=2)
    to_megatron(original, folder / "original-megatron", "--verify")
    save = to_megatron(write_tiny_onevision(folder / "onevision", tie=True, layers=2), folder / "onevision-megatron")
    out = to_hf(save, folder / "out", "--verify")
    tensors = load_file(out / "model.safetensors")
    tensors["image_newline"] = tensors["image_newline"].roll(1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return compare_models(save / "iter_0000000", out).largest_difference


def test_verify_passes_tiles_and_looks_at_the_newline(tmp_path: Path) -> None:
    """Of each two dialogues, of one and of two pictures; the pictures' pixels as the image processor makes them."""
    difference, printed = apart(verified_both_ways, tmp_path)
    assert printed.count("verify: largest logit difference") == 3, printed
    assert printed.count("against LlavaNextImageProcessor") == 2 and "against LlavaOnevisionImageProcessor" in printed
    assert difference > 0.1


def test_dialogues_show_pooled_features_newlines_and_several_pictures(tmp_path: Path) -> None:
    """What --verify must not miss of a LLaVA-OneVision."""
    config = read_model_config(write_tiny_onevision(tmp_path))
    batch = random_batch(config)
    newline = len(batch.pixel_values) * config.visual_tokens
    assert len(batch.pooled_rows) > 50 and (batch.feature_rows == newline).sum() > 5
    assert (batch.feature_rows > newline).sum() == len(batch.pooled_rows)
    second = batch.image_rows >= batch.cu_seqlens[1]
    assert second.sum() == 2 * (config.visual_tokens + 1), "two pictures of one view and a newline each"


@pytest.mark.parametrize("write", [write_tiny_next, write_tiny_onevision])
def test_pixels_of_tiles_agree_and_others_are_found(tmp_path: Path, write) -> None:
    config = read_model_config(write(tmp_path))
    assert compare_pixels(config, tmp_path, aspect_ratio="stretch").holds
    other = read_model_config((write_tiny_onevision if write is write_tiny_next else write_tiny_next)(tmp_path / "b"))
    with pytest.raises(ValueError, match="makes pixels of shape"):
        compare_pixels(config, tmp_path / "b", aspect_ratio="stretch")
    assert other.tiles != config.tiles
