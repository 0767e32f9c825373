"""`check_architecture` and the padded vocabulary; megatron-core itself says which pipeline splits exist."""

import itertools
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from hacl_megatron.config.checks.architecture import check_architecture, padded_vocab_size
from hacl_megatron.config.flags import DataFlags, ParallelFlags
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.config.tiles import TilesConfig

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


BLIP2 = replace(
    LLAVA_7B,
    vision=VisionConfig(
        num_layers=39, hidden_size=1408, ffn_hidden_size=6144, num_attention_heads=16, image_size=224, patch_size=14,
        backend="hf", hf={"model_type": "blip_2_vision_model", "hidden_act": "gelu"},
    ),
    image=ImageConfig(size=224),
    projector_type="qformer",
    vision_select_layer=-1,
    qformer=QFormerConfig(
        num_query_tokens=32, hidden_size=768, hf=transformers.Blip2QFormerConfig(encoder_hidden_size=1408).to_dict()
    ),
)  # fmt: skip


def check(model: ModelConfig = LLAVA_7B, tp: int = 1, pp: int = 1, length: int = 2048, **parallel) -> None:
    config = RunConfig(
        parallel=ParallelFlags(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **parallel),
        data=DataFlags(model_max_length=length),
        architecture=model,
    )
    layout = Layout(
        world_size=tp * pp, tp=tp, pp=pp, dp=1, micro_batch_size=1, global_batch_size=1, num_micro_batches=1
    )
    check_architecture(config, layout)


def check_fp8(model: ModelConfig, tp: int = 1, recipe: str = "delayed") -> None:
    fields = {"fp8": "hybrid", "fp8_recipe": recipe}
    layout = Layout(world_size=tp, tp=tp, pp=1, dp=1, micro_batch_size=1, global_batch_size=1, num_micro_batches=1)
    check_architecture(RunConfig(architecture=model, transformer=fields), layout)


def test_fp8_takes_multiples_of_16_on_every_rank():
    check_fp8(LLAVA_7B, tp=4)
    check_fp8(LLAVA_7B, recipe="mxfp8")
    odd = language(ffn_hidden_size=11024)  # 16 x 689
    check_fp8(odd)
    with pytest.raises(ValueError, match=r"ffn_hidden_size on a tensor-parallel rank is 5512, .* multiples of 16"):
        check_fp8(odd, tp=2)
    with pytest.raises(ValueError, match=r"ffn_hidden_size .* is 11024, .* multiples of 32"):
        check_fp8(odd, recipe="mxfp8")


def language(**fields) -> ModelConfig:
    return replace(LLAVA_7B, language=replace(LLAVA_7B.language, **fields))


def vision(**fields) -> ModelConfig:
    changed = replace(LLAVA_7B.vision, **fields)
    return replace(LLAVA_7B, vision=changed, image=ImageConfig(size=changed.image_size))


def dinov2(*, size: int = 224, ffn: int = 3072, shortest: int | None = 256, **changes) -> ModelConfig:
    """DINOv2 base with registers, of 518 pixels' positions; `changes` None: a field that its `hf` lacks."""
    hf = {"model_type": "dinov2_with_registers", "hidden_size": 768, "mlp_ratio": 4, "image_size": 518,
          "num_register_tokens": 4, **changes}  # fmt: skip
    vision = VisionConfig(
        num_layers=12, hidden_size=768, ffn_hidden_size=ffn, num_attention_heads=12, image_size=size, patch_size=14,
        backend="hf", hf={key: value for key, value in hf.items() if value is not None},
    )  # fmt: skip
    return replace(LLAVA_7B, vision=vision, image=ImageConfig(size=size, shortest_edge=shortest))


def siglip(**fields) -> ModelConfig:
    facts = dict(
        image_size=384, patch_size=14, hidden_size=1152, ffn_hidden_size=4304, activation="gelu_pytorch_tanh",
        backend="hf", hf={"model_type": "siglip_vision_model"},
    )  # fmt: skip
    return vision(**{**facts, **fields})


def qformer(**fields) -> ModelConfig:
    """BLIP-2 with another transformers configuration of its Q-Former."""
    return replace(BLIP2, qformer=replace(BLIP2.qformer, hf={**BLIP2.qformer.hf, **fields}))


def refused(**arguments) -> str:
    with pytest.raises(ValueError) as error:
        check(**arguments)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


def test_llava_fits_the_usual_layouts():
    for tp, pp in ((1, 1), (2, 2), (4, 1), (8, 4), (16, 2)):
        check(tp=tp, pp=pp)


def tiled(*pinpoints: tuple[int, int], max_tiles: int | None = None) -> ModelConfig:
    return replace(LLAVA_7B, tiles=TilesConfig(pinpoints=pinpoints, max_tiles=max_tiles))


def test_tiles_have_no_other_aspect_ratio():
    """Catches a flag that the decoder would ignore without a word. What the checkpoint itself was trained with, and the
    default, which nobody may have given, pass."""
    own = replace(tiled((336, 672)), extra={"image_aspect_ratio": "stretch"})
    layout = Layout(world_size=1, tp=1, pp=1, dp=1, micro_batch_size=1, global_batch_size=1, num_micro_batches=1)
    for model, aspect_ratio in ((LLAVA_7B, "square"), (tiled((336, 672)), "pad"), (own, "stretch"), (own, "pad")):
        check_architecture(RunConfig(data=DataFlags(image_aspect_ratio=aspect_ratio), architecture=model), layout)
    for model, aspect_ratio in ((tiled((336, 672)), "stretch"), (own, "square")):
        with pytest.raises(ValueError, match=f"--image-aspect-ratio is {aspect_ratio}, but the model cuts.*leave the"):
            check_architecture(RunConfig(data=DataFlags(image_aspect_ratio=aspect_ratio), architecture=model), layout)


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
        {"tp": 32, "vision_parallel": "split"}, "that divides 16, or --vision-parallel share", {"tp": 32},
    ),
    "a tower of transformers over ranks": (
        {"model": BLIP2, "tp": 2, "vision_parallel": "split"}, "--vision-parallel is split, but towers of transformers",
        {"model": BLIP2, "tp": 2, "vision_parallel": "share"},
    ),
    "tower's feed-forward over ranks": (
        {"model": vision(ffn_hidden_size=4098), "tp": 4, "vision_parallel": "split"},
        "vision tower's ffn_hidden_size 4098", {"model": vision(ffn_hidden_size=4098), "tp": 4},
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
        {"model": language(rope_scaling={"rope_type": "longrope", "factor": 8.0})}, "longrope",
        {"model": language(rope_scaling={"rope_type": "linear", "factor": 8.0})},
    ),
    "rope's numbers": (
        {"model": language(rope_scaling={"rope_type": "yarn", "factor": 4.0})}, "lacks original_max_position",
        {"model": language(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})},
    ),
    "sliding window": (
        {"model": language(sliding_window=2047)}, "beyond the language model's sliding window of 2047 tokens",
        {"model": language(sliding_window=2048)},
    ),
    "room for text": ({"length": 576}, "no room for text beside the 576 tokens", {"length": 577}),
    "positions": ({"length": 4097}, "beyond the 4096 positions", {"length": 4096}),
    "empty part": ({"model": language(vocab_size=0)}, "language.vocab_size is 0", {"model": language(vocab_size=1)}),
    "empty tower": ({"model": vision(patch_size=0)}, "vision.patch_size is 0", {"model": vision(patch_size=28)}),
    "unknown family": (
        {"model": language(family="lama")}, "language.family is 'lama'; expected one of llama",
        {"model": language(family="llama")},
    ),
    "unknown tower": (
        {"model": siglip(hf={"model_type": "vit_mae"})}, "'vit_mae'", {"model": siglip()},
    ),
    "gated or not": ({"model": dinov2(use_swiglu_ffn=True)}, "ffn_hidden_size is 3072, but by vision.hf 2048",
                     {"model": dinov2(use_swiglu_ffn=True, ffn=2048)}),
    "no ratio": ({"model": dinov2(mlp_ratio=None)}, "ffn_hidden_size is 3072, but by vision.hf None",
                 {"model": dinov2()}),
    "no registers": ({"model": dinov2(num_register_tokens=None)}, "vision.hf.num_register_tokens is missing",
                     {"model": dinov2(num_register_tokens=1)}),
    "crop beyond": ({"model": dinov2(shortest=200)}, "resized to 200 and cropped to 224",
                    {"model": dinov2(shortest=None)}),
    "tower without its configuration": ({"model": siglip(hf=None)}, "backend is hf", {"model": siglip()}),
    "megatron's tower of another kind": ({"model": siglip(backend="megatron")}, "not empty", {"model": siglip()}),
    "selected layer of BLIP-2": (
        {"model": replace(BLIP2, vision_select_layer=-2)}, "blip_2_vision_model hands on its last", {"model": BLIP2},
    ),
    "no Q-Former": ({"model": replace(BLIP2, qformer=None)}, "holds no Q-Former", {"model": BLIP2}),
    "Q-Former unused": (
        {"model": replace(BLIP2, projector_type="linear")}, "holds a Q-Former",
        {"model": replace(BLIP2, projector_type="linear", qformer=None)},
    ),
    "Q-Former of another tower": (
        {"model": qformer(encoder_hidden_size=1024)}, "features 1024 wide, but the vision tower's are 1408",
        {"model": BLIP2},
    ),
    "Q-Former of other sizes": ({"model": qformer(hidden_size=512)}, "hf.hidden_size is 512", {"model": BLIP2}),
    "half a Q-Former": ({"model": qformer(num_hidden_layers=None)}, "num_hidden_layers is None", {"model": BLIP2}),
    "tower of other sizes": (
        {"model": siglip(hf={"model_type": "siglip_vision_model", "hidden_size": 768})}, "hf.hidden_size is 768",
        {"model": siglip(hf={"model_type": "siglip_vision_model", "hidden_size": 1152})},
    ),
    "room for text behind query tokens": (
        {"model": BLIP2, "length": 32}, "beside the 32 tokens", {"model": BLIP2, "length": 33},
    ),
    "tiles and query tokens": (
        {"model": replace(BLIP2, tiles=TilesConfig(pinpoints=((224, 448),)))}, "its connector is a Q-Former",
        {"model": tiled((336, 672))},
    ),
    "tiles and registers": (
        {"model": replace(dinov2(num_register_tokens=4, shortest=None), tiles=TilesConfig(pinpoints=((224, 448),)))},
        "260 features of a view, of which 256 are patches",
        {"model": replace(dinov2(num_register_tokens=0, shortest=None), tiles=TilesConfig(pinpoints=((224, 448),)))},
    ),
    "no tiles": ({"model": tiled()}, "tiles.pinpoints hold 0 sizes", {"model": tiled((336, 336))}),
    "a grid that the tower does not divide": (
        {"model": tiled((336, 672), (336, 670))},
        "336 x 670 pixels, a grid that the tower does not divide; expected multiples of its 336 pixels",
        {"model": tiled((336, 672), (1008, 336))},
    ),
    "a grid of nothing": ({"model": tiled((0, 672))}, "0 x 672 pixels", {"model": tiled((336, 672))}),
    "a grid beyond": ({"model": tiled((336, 336 * 49))}, "at most 16,384", {"model": tiled((336, 336 * 48))}),
    "pooled to nothing": (
        {"model": tiled((336, 672), max_tiles=0)}, "tiles.max_tiles is 0", {"model": tiled((336, 672), max_tiles=1)},
    ),
    "cropped tiles": (
        {"model": replace(tiled((336, 672)), image=ImageConfig(size=336, shortest_edge=400))}, "tiles are not cropped",
        {"model": replace(LLAVA_7B, image=ImageConfig(size=336, shortest_edge=400))},
    ),
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


def test_a_tower_of_transformers_is_replicated():
    """So that neither its heads nor its feed-forward width must divide."""
    check(siglip(num_attention_heads=9, hidden_size=1152), tp=4)
    check(BLIP2, tp=32)


@pytest.mark.parametrize(
    ("model", "inside", "features", "visual"),
    [(LLAVA_7B, 577, 576, 576), (siglip(), 729, 729, 729), (dinov2(), 261, 260, 260), (BLIP2, 257, 257, 32)],
)
def test_rows_of_an_image(model, inside, features, visual):
    """The published models' counts: LLaVA-1.5's, LLaVA-OneVision's SigLIP so400m/384, BLIP-2's."""
    assert (model.vision.sequence_length, model.vision.num_features, model.visual_tokens) == (inside, features, visual)


def test_clip_on_either_backend():
    for activation in ("quick_gelu", "gelu"):
        tower = replace(LLAVA_7B.vision, activation=activation, norm_epsilon=1e-6)
        moved = tower.on("hf")
        config = transformers.CLIPVisionConfig.from_dict(moved.hf)
        assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1024, 4096, 24)
        assert (config.num_attention_heads, config.image_size, config.patch_size) == (16, 336, 14)
        assert (config.hidden_act, config.layer_norm_eps) == (activation, 1e-6)
        assert moved.on("hf") is moved and moved.on("megatron") == tower
    with pytest.raises(ValueError, match="siglip_vision_model; megatron-core has CLIP's alone"):
        siglip().vision.on("megatron")
