"""Frequencies of rotary positions, and YaRN's factor, against transformers' own modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.families.rotary import attention_factor, read_rotary
from hacl_megatron.model.llama import rotary_inverse_frequencies
from tests.tiny import LLAMA3_ROPE_SCALING, tiny_llama_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3_ROPE_SCALING,
    "yarn": YARN,
    "yarn from its length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, not truncated": {**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 2},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn, own factor": {**YARN, "attention_factor": 1.25},
    "yarn, one turn": {**YARN, "beta_fast": 1, "beta_slow": 1},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    """Catches another blend, a factor that is applied twice or not at all, and keys that reading drops."""
    config = tiny_llama_config(rope_scaling=SCALINGS[name], head_dim=64)
    theirs = LlamaRotaryEmbedding(config)
    base, scaling = read_rotary(config.to_dict(), Path("config.json"))
    language = LanguageConfig(
        num_layers=1, hidden_size=48, ffn_hidden_size=8, num_attention_heads=6, num_query_groups=2, vocab_size=8,
        kv_channels=64, rotary_base=base, rope_scaling=scaling,
    )  # fmt: skip
    torch.testing.assert_close(rotary_inverse_frequencies(language), theirs.inv_freq, rtol=2e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    same = torch.allclose(rotary_inverse_frequencies(language), plain)
    assert same == (name in ("default", "dynamic")), "scalings of the test that change nothing would show nothing"
