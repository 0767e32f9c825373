"""`check_architecture` and the padded vocabulary; megatron-core itself says which pipeline splits exist."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from hacl_megatron.config.checks import Layout, check_architecture, padded_vocab_size
from hacl_megatron.config.flags import DataFlags, ParallelFlags
from hacl_megatron.config.run import RunConfig

LLAVA_7B = ModelConfig(
    language=LanguageConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
        vocab_size=32000, max_position_embeddings=4096,
    ),
    vision=VisionConfig(
        num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, image_size=336, patch_size=14
    ),
    image=ImageConfig(size=336),
)  # fmt: skip


def check(model: ModelConfig = LLAVA_7B, tp: int = 1, pp: int = 1, length: int = 2048, **parallel) -> None:
    config = RunConfig(
        parallel=ParallelFlags(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **parallel),
        data=DataFlags(model_max_length=length),
    )
    layout = Layout(
        world_size=tp * pp, tp=tp, pp=pp, dp=1, micro_batch_size=1, global_batch_size=1, num_micro_batches=1
    )
    check_architecture(config, model, layout)


def language(**fields) -> ModelConfig:
    return replace(LLAVA_7B, language=replace(LLAVA_7B.language, **fields))


def vision(**fields) -> ModelConfig:
    changed = replace(LLAVA_7B.vision, **fields)
    return replace(LLAVA_7B, vision=changed, image=ImageConfig(size=changed.image_size))


def refused(**arguments) -> str:
    with pytest.raises(ValueError) as error:
        check(**arguments)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


def test_llava_fits_the_usual_layouts():
    for tp, pp in ((1, 1), (2, 2), (4, 1), (8, 4), (16, 2)):
        check(tp=tp, pp=pp)


CASES = {
    "heads over ranks": (
        {"model": language(num_attention_heads=40, num_query_groups=40, hidden_size=5120), "tp": 16},
        "num_attention_heads 40 cannot be shared by 16",
        {"model": language(num_attention_heads=40, num_query_groups=40, hidden_size=5120), "tp": 8},
    ),
    "query groups over ranks": (
        {"model": language(num_query_groups=8), "tp": 16}, "num_query_groups 8 cannot be shared by 16",
        {"model": language(num_query_groups=8), "tp": 8},
    ),
    "feed-forward over ranks": (
        {"model": language(ffn_hidden_size=11006), "tp": 4}, "language model's ffn_hidden_size 11006",
        {"model": language(ffn_hidden_size=11006), "tp": 2},
    ),
    "tower's heads over ranks": (
        {"tp": 32}, "vision tower's num_attention_heads 16 cannot be shared by 32", {"tp": 16},
    ),
    "tower's feed-forward over ranks": (
        {"model": vision(ffn_hidden_size=4098), "tp": 4}, "vision tower's ffn_hidden_size 4098",
        {"model": vision(ffn_hidden_size=4098), "tp": 2},
    ),
    "heads and groups": (
        {"model": language(num_query_groups=5)}, "cannot share 5 query groups", {"model": language(num_query_groups=4)},
    ),
    "head width": (
        {"model": language(hidden_size=4104)}, "language model's hidden_size 4104",
        {"model": language(hidden_size=4104, kv_channels=128)},
    ),
    "odd head width": (
        {"model": language(kv_channels=127)}, "heads are 127 wide", {"model": language(kv_channels=126)},
    ),
    "tower's head width": (
        {"model": vision(hidden_size=1000)}, "vision tower's hidden_size 1000", {"model": vision(hidden_size=1008)},
    ),
    "contrastive width": (
        {"model": language(hidden_size=4098, kv_channels=128)}, "a quarter as wide",
        {"model": language(hidden_size=4100, kv_channels=128)},
    ),
    "layers over stages": ({"pp": 5}, "32 layers cannot be shared by 5", {"pp": 4}),
    "first stage": (
        {"pp": 4, "decoder_first_pipeline_num_layers": 4}, "leave 28 to the other 3",
        {"pp": 4, "decoder_first_pipeline_num_layers": 5},
    ),
    "both ends": (
        {"pp": 2, "decoder_first_pipeline_num_layers": 15, "decoder_last_pipeline_num_layers": 16}, "leave 1",
        {"pp": 2, "decoder_first_pipeline_num_layers": 15, "decoder_last_pipeline_num_layers": 17},
    ),
    "patches": (
        {"model": vision(image_size=330)}, "image_size 330 is no multiple of its patch_size 14",
        {"model": vision(image_size=322)},
    ),
    "image size": (
        {"model": replace(LLAVA_7B, image=ImageConfig(size=224))}, "resized to 224, but the vision tower takes 336",
        {"model": vision(image_size=224)},
    ),
    "selected layer, from the end": (
        {"model": replace(LLAVA_7B, vision_select_layer=-25)}, "expected 1..24 or -24..-1",
        {"model": replace(LLAVA_7B, vision_select_layer=-24)},
    ),
    "selected layer, from the start": (
        {"model": replace(LLAVA_7B, vision_select_layer=25)}, "--mm-vision-select-layer 25",
        {"model": replace(LLAVA_7B, vision_select_layer=24)},
    ),
    "selected embedding": (
        {"model": replace(LLAVA_7B, vision_select_layer=0)}, "--mm-vision-select-layer 0",
        {"model": replace(LLAVA_7B, vision_select_layer=1)},
    ),
    "activation": ({"model": vision(activation="relu")}, "'relu'", {"model": vision(activation="gelu")}),
    "rope": (
        {"model": language(rope_scaling={"rope_type": "yarn"})}, "yarn",
        {"model": language(rope_scaling={"rope_type": "llama3", "factor": 8.0})},
    ),
    "room for text": ({"length": 576}, "no room for text beside the 576 tokens", {"length": 577}),
    "positions": ({"length": 4097}, "beyond the 4096 positions", {"length": 4096}),
    "empty part": ({"model": language(vocab_size=0)}, "language.vocab_size is 0", {"model": language(vocab_size=1)}),
    "empty tower": ({"model": vision(patch_size=0)}, "vision.patch_size is 0", {"model": vision(patch_size=28)}),
    "no epsilon": (
        {"model": language(norm_epsilon=float("nan"))}, "language.norm_epsilon is nan",
        {"model": language(norm_epsilon=1e-6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_architecture(name):
    wrong, expected, right = CASES[name]
    assert expected in refused(**wrong)
    check(**right)


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp12x_gelu"])
def test_projectors(projector):
    check(replace(LLAVA_7B, projector_type=projector))


@pytest.mark.parametrize("projector", ["", "mlp2x", "mlp0x_gelu", "mlpx_gelu", "mlp2x_gelu ", "MLP2x_gelu", "identity"])
def test_wrong_projectors(projector):
    assert repr(projector) in refused(model=replace(LLAVA_7B, projector_type=projector))


def megatron_can_split(layers: int, stages: int, first: int | None, last: int | None) -> bool:
    """Whether megatron-core builds every layer exactly once with at least one on every stage."""
    try:
        config = TransformerConfig(
            num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_model_parallel_size=stages,
            pipeline_dtype=torch.float32, num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )  # fmt: skip
        built = [get_num_layers_to_build(config, pp_rank=stage) for stage in range(stages)]
    except (ValueError, AssertionError):
        return False
    return min(built) > 0 and sum(built) == layers


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pipeline_splits_are_those_of_megatron_core():
    verdicts = []
    for layers, stages, first, last in itertools.product(range(1, 9), range(1, 5), (None, 1, 2, 3, 9), (None, 1, 2, 4)):
        if stages == 1 and (first or last):
            continue  # refused by check_flags: it means nothing
        try:
            check(
                language(num_layers=layers), pp=stages,
                decoder_first_pipeline_num_layers=first, decoder_last_pipeline_num_layers=last,
            )  # fmt: skip
            ours = True
        except ValueError as error:
            assert "layers" in str(error)
            ours = False
        assert ours == megatron_can_split(layers, stages, first, last), (layers, stages, first, last)
        verdicts.append(ours)
    assert 50 < sum(verdicts) < len(verdicts) - 50


def test_padded_vocabulary_keeps_its_size_over_layouts():
    """Checkpoints are cut anew at another tensor-parallel size: the tables must not grow or shrink."""
    for vocab, padded in ((32000, 32000), (32064, 32128), (128256, 128256), (1, 128)):
        for tp in (1, 2, 4, 8, 16):
            assert padded_vocab_size(vocab, ParallelFlags(tensor_model_parallel_size=tp)) == padded
    assert padded_vocab_size(32000, ParallelFlags(tensor_model_parallel_size=3)) == 32256


@given(vocab=st.integers(1, 300_000), tp=st.integers(1, 64), by=st.integers(1, 512))
def test_padded_vocabulary_is_the_smallest_that_divides(vocab, tp, by):
    padded = padded_vocab_size(vocab, ParallelFlags(tensor_model_parallel_size=tp, make_vocab_size_divisible_by=by))
    assert padded == next(rows for rows in range(vocab, vocab + tp * by) if rows % tp == 0 and rows % by == 0)
