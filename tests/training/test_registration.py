"""A made-up language family and a made-up vision tower go all the way that LLaMA and SigLIP go, once registered.

Their classes are real to transformers, and differ from LLaMA's and SigLIP's where families do: names of tensors, biases
of q, k and v, keys of config.json, a class of towers without a wrapper around it. These tests fail when a new family or
tower needs a word in a second place beside its record.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import transformers
import yaml
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.import_weights import open_sources
from hacl_megatron.config.families import FAMILIES, LLAMA, register_family
from hacl_megatron.config.families.llama import write_llama
from hacl_megatron.config.run import parse_run_config, with_architecture
from hacl_megatron.config.tensor_rows import row
from hacl_megatron.config.towers import SIGLIP, TOWERS, register_tower
from hacl_megatron.config.towers.tower import SIZES
from hacl_megatron.train import run
from tests.checkpoint.hf.round_trip_files import all_tensors, assert_same, write_heads
from tests.checkpoint.hf.test_towers import save_with_siglip_processor
from tests.distributed import run_distributed
from tests.plan.example_plans import plan_of
from tests.plan.plan_cases import state_on_this_rank
from tests.tiny import image_token_id, tiny_llama_config, tiny_siglip_config
from tests.tiny_data import write_tiny_data
from tests.tool_runs import to_hf, to_megatron
from tests.training.runs import weights

SHRINK = "language_model.model.layers.0.mlp.shrink.weight"
RENAMED = {"num_key_value_heads": "num_kv_groups", "rms_norm_eps": "norm_eps"}


# --------------------------------------------------------------------------------------------------- a language family


class TellaConfig(LlamaConfig):
    model_type = "tella"
    attribute_map: ClassVar = RENAMED


class TellaMLP(LlamaMLP):
    """`down_proj` is called `shrink`."""

    def __init__(self, config: TellaConfig):
        super().__init__(config)
        self.shrink = self._modules.pop("down_proj")

    @property
    def down_proj(self) -> nn.Module:
        return self.shrink


class TellaAttention(LlamaAttention):
    """q, k and v have biases, the output has none."""

    def __init__(self, config: TellaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.o_proj = nn.Linear(self.o_proj.in_features, self.o_proj.out_features, bias=False)


class TellaModel(LlamaModel):
    """`norm` is called `last_norm`."""

    config_class = TellaConfig

    def __init__(self, config: TellaConfig):
        super().__init__(config)
        self.last_norm = self._modules.pop("norm")
        for index, layer in enumerate(self.layers):
            layer.mlp, layer.self_attn = TellaMLP(config), TellaAttention(config, index)

    @property
    def norm(self) -> nn.Module:
        return self.last_norm


class TellaForCausalLM(LlamaForCausalLM):
    config_class = TellaConfig

    def __init__(self, config: TellaConfig):
        super().__init__(config)
        self.model = TellaModel(config)


def write_tella(language: Any, tokens: Any) -> dict[str, Any]:
    values = {RENAMED.get(key, key): value for key, value in write_llama(language, tokens).items()}
    return {**values, "attention_bias": True}


TELLA = replace(
    LLAMA,
    name="tella",
    title="Tella",
    model_type="tella",
    architecture="TellaForCausalLM",
    llava_model_types=(),
    llava_architecture="",
    layer=(
        *LLAMA.layer[:2],
        row("self_attention.linear_qkv.bias", "qkv",
            ("self_attn.q_proj.bias", "q"), ("self_attn.k_proj.bias", "kv"), ("self_attn.v_proj.bias", "kv")),
        *LLAMA.layer[2:-1],
        row("mlp.linear_fc2.weight", "row", ("mlp.shrink.weight", "h f")),
    ),
    outside=(
        LLAMA.outside[0],
        row("decoder.final_layernorm.weight", "replicated", ("last_norm.weight", "h")),
        LLAMA.outside[2],
    ),
    transformer={**LLAMA.transformer, "add_qkv_bias": True},
    supported={**LLAMA.supported, "attention_bias": (True,)},
    write=write_tella,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- a tower


class PeekVisionConfig(SiglipVisionConfig):
    model_type = "peek_vision_model"
    attribute_map: ClassVar = {"num_hidden_layers": "depth"}


class PeekVisionModel(SiglipVisionModel):
    """`encoder` is called `trunk`, `post_layernorm` `after`."""

    config_class = PeekVisionConfig
    base_model_prefix = "peek"

    def __init__(self, config: PeekVisionConfig):
        super().__init__(config)
        self.trunk, self.after = self._modules.pop("encoder"), self._modules.pop("post_layernorm")

    @property
    def encoder(self) -> nn.Module:
        return self.trunk

    @property
    def post_layernorm(self) -> nn.Module:
        return self.after


PEEK = replace(
    SIGLIP,
    model_type="peek_vision_model",
    model_class="PeekVisionModel",
    origin="Peek",
    title="Peek's eye",
    part_of=(),
    layers="trunk.layers",
    unused=("after", "head"),
    sizes={**SIZES, "num_layers": "depth"},
    mean=(0.1, 0.2, 0.3),
    spellings=((r"(.*)", r"vision.\1"),),
    ignored=(),
    wrapper="",
)


@contextmanager
def registered() -> Iterator[None]:
    """Both are known, to transformers and here; here only as long as this lasts."""
    if TellaConfig.model_type not in transformers.CONFIG_MAPPING:
        for config in (TellaConfig, PeekVisionConfig):
            AutoConfig.register(config.model_type, config)
        AutoModel.register(TellaConfig, TellaModel)
        AutoModel.register(PeekVisionConfig, PeekVisionModel)
        AutoModelForCausalLM.register(TellaConfig, TellaForCausalLM)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(FAMILIES))
        stack.enter_context(mock.patch.dict(TOWERS))
        for module in (transformers, sys.modules["transformers"]):  # not one once a library has loaded it its own way
            stack.enter_context(mock.patch.object(module, "PeekVisionModel", PeekVisionModel, create=True))
        register_family(TELLA)
        register_tower(PEEK)
        yield


def tella_config() -> TellaConfig:
    values = tiny_llama_config().to_dict()
    values = {RENAMED.get(key, key): value for key, value in values.items() if key != "model_type"}
    return TellaConfig.from_dict({**values, "attention_bias": True})


def peek_config() -> PeekVisionConfig:
    values = tiny_siglip_config().to_dict()
    return PeekVisionConfig.from_dict({"depth" if k == "num_hidden_layers" else k: v for k, v in values.items()
                                       if k != "model_type"})  # fmt: skip


def write_tella_llava(folder: Path) -> Path:
    """A `LlavaForConditionalGeneration` of the two."""
    config = LlavaConfig(
        vision_config=peek_config(), text_config=tella_config(), image_token_index=image_token_id(),
        image_seq_length=36, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    assert isinstance(model.model.language_model, TellaModel) and isinstance(model.model.vision_tower, PeekVisionModel)
    save_with_siglip_processor(model, folder)
    write_heads(folder)
    return folder


def command(folder: Path, pretrained: Path, save: str, *flags: str) -> list[str]:
    data = write_tiny_data(folder / "data", n=8)
    common = {
        "pretrained-checkpoint": str(pretrained), "data-path": [str(data["finetune"])],
        "contrastive-data-path": [str(data["contrastive"])], "image-folder": str(data["images"]), "version": "v1",
        "image-aspect-ratio": "stretch", "global-batch-size": 4, "micro-batch-size": 4, "train-iters": 2, "lr": 1e-3,
        "model-max-length": 256, "max-bad-fraction": 1.0, "num-workers": 1, "make-vocab-size-divisible-by": 4,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(common))
    return ["--config", str(folder / "run.yaml"), "--save", str(folder / save), *flags]


# -------------------------------------------------------------------------------------------------------------- the way


def whole_way(folder: Path) -> None:
    """Convert, plan, train and export; every export computes what its checkpoint does."""
    with registered():
        source = write_tella_llava(folder / "source")
        text = yaml.safe_load((source / "config.json").read_text())["text_config"]
        assert "num_kv_groups" in text and "num_key_value_heads" not in text
        # Logits of both models are compared by --verify, on both ways.
        converted = to_megatron(source, folder / "converted", "--verify")
        back = to_hf(converted, folder / "back", "--dtype", "float32", "--verify")
        assert_same(all_tensors(back), all_tensors(source))
        config = read_model_config(back)
        assert config == read_model_config(source)
        assert (config.language.family, config.vision.kind.title) == ("tella", "Peek's eye")
        assert config.image.mean == (0.5, 0.5, 0.5), "of the processor, not the tower's own"

        start = with_architecture(parse_run_config(command(folder, converted, "unused")), config)
        padding = 2 * (332 - 331) * config.language.hidden_size  # of embedding and LM head
        written = sum(t.numel() for name, t in all_tensors(source).items() if name.startswith("language_model."))
        assert sum(plan_of(start, 1).parts["language_model"]) == written + padding

        run(command(folder, converted, "plain", "--freeze-ViT", "false"))
        run(command(folder, converted, "lora", "--lora-rank", "2"))
        before = weights(converted)
        for save, trained in (("plain", "self_attention.linear_qkv.bias"), ("lora", "mlp.linear_fc2_lora.down_proj_B")):
            after = weights(folder / save)
            name = next(name for name in after if name.endswith(trained))
            assert not torch.equal(after[name], before.get(name, torch.zeros_like(after[name]))), name
            to_hf(folder / save, folder / f"{save}-hf", "--dtype", "float32", "--verify")
            moved, still = (all_tensors(side)[SHRINK] for side in (folder / f"{save}-hf", source))
            assert not torch.equal(moved, still), "LoRA is merged where the matrix has another name"


def planned_and_built(folder: Path) -> dict[str, Any]:
    """Of this rank's parameters, as planned and as they are."""
    with registered():
        source = folder / "source"
        if torch.distributed.get_rank() == 0:
            write_tella_llava(source)
            command(folder, source, "unused")
        torch.distributed.barrier()
        flags = ["--tensor-model-parallel-size", "2", "--lora-rank", "2"]
        return state_on_this_rank([["--config", str(folder / "run.yaml"), *flags]])[0]


def test_a_registered_family_and_tower_go_the_whole_way(tmp_path: Path) -> None:
    """Fails when converting, training, planning or exporting knows families or towers beside their records."""
    run_distributed(whole_way, 1, tmp_path)


def test_planned_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    """Fails when planner or model builds a layer of the family by another list than its record."""
    for state in run_distributed(planned_and_built, 2, tmp_path):
        assert state["planned parameters"] == state["parameters"]
        assert state["planned"] == state["state"]
        assert any(name.endswith("linear_qkv.bias") for name, *_ in state["parameters"])


def test_a_family_beside_a_towers_own_folder(tmp_path: Path) -> None:
    """Two parts, each in the folder that transformers saves; afterwards neither is known any longer."""
    with registered():
        language, tower = TellaForCausalLM(tella_config()), PeekVisionModel(peek_config())
        language.save_pretrained(tmp_path / "tella")
        tower.save_pretrained(tmp_path / "peek")
        config = read_model_config(tmp_path / "tella", tmp_path / "peek")
        assert config.image.mean == (0.1, 0.2, 0.3) and config.extra["image_aspect_ratio"] == "stretch"
        sources = open_sources(tmp_path / "tella", config)
        expected = [name for name in sources.table.expected if name.startswith(("text.", "vision."))]
        assert all(name in sources.found for name in expected)
        name = "text.layers.3.mlp.shrink.weight"
        assert torch.equal(sources.read(name), language.model.layers[3].mlp.shrink.weight)
    assert "tella" not in FAMILIES and "peek_vision_model" not in TOWERS
