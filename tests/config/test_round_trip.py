"""`to_yaml` writes the whole configuration, and `from_yaml` and `--config` give back the very same one."""

from dataclasses import replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from hacl_megatron.config.parser import COMMAND_LINE_ONLY, GROUPS, HINTS
from hacl_megatron.config.run import RunConfig, from_yaml, parse_run_config, to_yaml, with_architecture

LANGUAGE = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
            "vocab_size": 64}  # fmt: skip
VISION = {"num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
MODEL = ModelConfig(language=LanguageConfig(**LANGUAGE), vision=VisionConfig(**VISION), image=ImageConfig(size=28))

# Texts that YAML takes for something else, beside whatever hypothesis finds.
texts = st.text(max_size=12) | st.sampled_from(
    ["1e-3", "no", "null", "~", "2024-01-02", "1:30", "-x", "--lr", "", " a", "a: b", "#", "\x85", "a\nb"]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(1 - (1 << 63), (1 << 63) - 1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def values_of(hint: Any) -> st.SearchStrategy:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is list:
        return st.lists(values_of(get_args(hint)[0]), max_size=3)
    if NoneType in get_args(hint):
        return st.none() | values_of(next(argument for argument in get_args(hint) if argument is not NoneType))
    return {bool: st.booleans(), int: integers, float: floats, str: texts}[hint]


def groups(group: type) -> st.SearchStrategy:
    hints = {name: hint for name, hint in get_type_hints(group).items() if name not in COMMAND_LINE_ONLY}
    own = {"image_grid_pinpoints": st.none() | st.sampled_from(["next", "onevision", "28x56,56x28"])}
    return st.builds(group, **{name: own.get(name, values_of(hint)) for name, hint in hints.items()})


architectures = st.builds(
    replace, st.just(MODEL), extra=st.dictionaries(texts, plain, max_size=3),
    language=st.builds(replace, st.just(MODEL.language), norm_epsilon=floats, kv_channels=st.none() | st.integers(),
                       rope_scaling=st.none() | st.dictionaries(texts, plain, max_size=3)),
    image=st.builds(ImageConfig, size=st.integers(), mean=st.tuples(floats, floats, floats)),
    vision=st.sampled_from([MODEL.vision, MODEL.vision.on("hf")]),
    qformer=st.none() | st.builds(QFormerConfig, num_query_tokens=st.integers(), hidden_size=st.integers(),
                                  hf=st.dictionaries(texts, floats, max_size=1)),
    projector_type=texts, vision_select_layer=st.integers(),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    flag_groups=st.fixed_dictionaries({name: groups(group) for name, group in GROUPS.items()}),
    architecture=st.none() | architectures,
)
def test_round_trip_is_exact(flag_groups, architecture):
    config = RunConfig(**flag_groups)
    if architecture is not None:
        config.model.vision_backend = None  # else laid over the architecture, which may refuse it
        config = with_architecture(config, architecture)
    text = to_yaml(config)
    assert from_yaml(text) == config
    assert to_yaml(from_yaml(text)) == text


def test_round_trip_of_sections_through_a_file(tmp_path):
    config = RunConfig(
        transformer={"recompute_granularity": "full", "recompute_num_layers": 1, "init_method_std": 1e-3,
                     "recompute_modules": ["core_attn"], "fp8": None},
        ddp={"bucket_size": 40_000_000, "grad_reduce_in_fp32": False},
        optimizer_overrides={"exp_avg_dtype": "bf16", "use_precision_aware_optimizer": True},
    )  # fmt: skip
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse_run_config(["--config", str(path)]) == config


def test_the_text_is_complete_and_commented():
    text = to_yaml(RunConfig())
    keys = yaml.safe_load(text)
    assert set(keys) == {*HINTS, "model", "transformer", "ddp", "optimizer"} - set(COMMAND_LINE_ONLY)
    for group in GROUPS.values():
        assert f"# {group.__doc__}\n" in text


def test_an_action_is_no_part_of_the_run():
    """Else a printed configuration, used as --config, would print and stop again."""
    config = parse_run_config(["--print-config"])
    assert config.training.print_config
    assert from_yaml(to_yaml(config)).training.print_config is False


def test_model_section_from_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"language": LANGUAGE, "vision": VISION}}))
    assert parse_run_config(["--config", str(path)]).architecture == MODEL  # `image` follows the tower
    laid_over = parse_run_config(
        ["--config", str(path), "--mm-projector-type", "linear", "--mm-vision-select-layer", "-1"]
    )
    assert laid_over.architecture == replace(MODEL, projector_type="linear", vision_select_layer=-1)
    # 0 is a layer that was asked for (and is refused later), not a flag that was left out.
    assert parse_run_config(["--config", str(path), "--mm-vision-select-layer", "0"]).architecture == replace(
        MODEL, vision_select_layer=0
    )


def test_flags_over_a_model_with_a_q_former(tmp_path):
    qformer = {"num_query_tokens": 4, "hidden_size": 8, "hf": {"layer_norm_eps": 1e-12}}
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model": {"language": LANGUAGE, "vision": VISION, "projector_type": "qformer",
                                  "qformer": qformer}})
    )  # fmt: skip

    def read(*flags: str) -> ModelConfig:
        return parse_run_config(["--config", str(path), *flags]).architecture

    assert read().qformer == read("--mm-projector-type", "qformer").qformer == QFormerConfig(**qformer)
    assert read().visual_tokens == 4
    linear = read("--mm-projector-type", "linear")
    assert (linear.projector_type, linear.qformer, linear.visual_tokens) == ("linear", None, 4)
    moved = read("--vision-backend", "hf")
    assert moved.vision == MODEL.vision.on("hf") and read("--vision-backend", "megatron").vision == MODEL.vision
    assert from_yaml(to_yaml(RunConfig(architecture=moved))).architecture == moved


def without(values: dict, key: str) -> dict:
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"language": LANGUAGE}, ["field 'vision' is missing"]),
        (
            {"language": without(LANGUAGE, "hidden_size"), "vision": VISION},
            ["model.language", "'hidden_size' is missing"],
        ),
        ({"language": {**LANGUAGE, "hiden_size": 8}, "vision": VISION}, ["'hiden_size'", "did you mean hidden_size"]),
        ({"language": {**LANGUAGE, "num_layers": 2.0}, "vision": VISION}, ["num_layers", "2.0", "a whole number"]),
        ({"language": {**LANGUAGE, "num_layers": True}, "vision": VISION}, ["num_layers", "True", "a whole number"]),
        ({"language": LANGUAGE, "vision": {**VISION, "activation": 3}}, ["model.vision.activation", "text"]),
        ({"language": LANGUAGE, "vision": VISION, "image": {"size": 28, "mean": [1, 2]}}, ["image.mean", "2 values"]),
        ({"language": LANGUAGE, "vision": VISION, "heads": {}}, ["unknown field 'heads'"]),
        ({"language": [], "vision": VISION}, ["model.language", "mapping"]),
        ({"language": LANGUAGE, "vision": VISION, "qformer": {"hidden_size": 8, "hf": {}}}, ["'num_query_tokens' is"]),
        ({"language": LANGUAGE, "vision": {**VISION, "backend": "torch"}}, ["model.vision.backend", "megatron, hf"]),
        ("llava", ["'llava'", "mapping"]),
    ],
)
def test_wrong_model_sections(model, expected):
    with pytest.raises(ValueError) as error:
        from_yaml("seed: 1\n" + yaml.safe_dump({"model": model}), "run.yaml")
    for part in ["run.yaml, line 2", *expected]:
        assert part in str(error.value)


def test_numbers_of_a_record_keep_their_type():
    text = yaml.safe_dump({"model": {"language": {**LANGUAGE, "rotary_base": 500000}, "vision": VISION}})
    base = from_yaml(text.replace("500000", "5e5")).architecture.language.rotary_base
    assert base == from_yaml(text).architecture.language.rotary_base == 500000.0
    assert isinstance(from_yaml(text).architecture.language.rotary_base, float)
