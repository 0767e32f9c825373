"""FLOPs of adapters, counted product by product."""

from types import SimpleNamespace

from hacl_megatron.config.architecture import LanguageConfig
from hacl_megatron.config.lora import Lora
from hacl_megatron.training.flops import lora_flops
from hacl_megatron.training.optimizer.schedule import _quotient


def test_adapters_of_keys_and_values_see_all_rows_and_the_others_those_that_go_on() -> None:
    """Each product with A [rank, in] and B [out, rank] is 2 x rows x its size, and goes forward once and back twice."""
    language = LanguageConfig(
        num_layers=1, hidden_size=8, ffn_hidden_size=20, num_attention_heads=2, num_query_groups=1, vocab_size=10
    )
    lora = Lora(rank=3, alpha=1.0, dropout=0.0, targets=("q_proj", "k_proj"))
    counted = lora_flops(SimpleNamespace(language=language), lora, rows=100, asking=10)
    query, key = (8 + 8) * 3 * 10, (8 + 4) * 3 * 100
    assert counted == 3 * 2 * (query + key)


def test_what_divides_whole_is_an_int() -> None:
    assert isinstance(_quotient(6, 3), int) and _quotient(7, 2) == 3.5 and _quotient(0, 3) == 0
