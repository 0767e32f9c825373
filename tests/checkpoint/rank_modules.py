"""Modules with the parameters of one rank's model, spelled out by hand: an oracle for names and shapes of the table.

The shapes are those of megatron-core's local layers under tensor and pipeline parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hacl_megatron.checkpoint.hf.import_weights import ImportReport, global_name, load_hf_weights
from hacl_megatron.checkpoint.hf.names import NameTable, Rule
from hacl_megatron.config.architecture import ModelConfig


def rank_shapes(
    config: ModelConfig, *, tp_size: int, layers: int, first_stage: bool, last_stage: bool, padded_vocab_size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(parameter name, shape) of one rank's model."""
    language, vision, tp = config.language, config.vision, tp_size
    h, f, head = language.hidden_size, language.ffn_hidden_size, language.head_dim
    if first_stage and config.tiles is not None:
        yield "connector.image_newline", (h,)
    if first_stage and vision.backend == "hf":
        yield from transformers_shapes(config)
        yield "language_model.embedding.word_embeddings.weight", (padded_vocab_size // tp, h)
    elif first_stage:
        v, vf, p = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
        yield "vision_tower.class_token", (1, 1, v)
        yield "vision_tower.conv1.weight", (v, 3, p, p)
        yield "vision_tower.position_embeddings.weight", (vision.num_patches + 1, v)
        yield "vision_tower.ln_pre.weight", (v,)
        yield "vision_tower.ln_pre.bias", (v,)
        for i in range(config.num_vision_layers_built):
            layer = f"vision_tower.decoder.layers.{i}."
            for norm in ("input_layernorm", "pre_mlp_layernorm"):
                yield f"{layer}{norm}.weight", (v,)
                yield f"{layer}{norm}.bias", (v,)
            yield f"{layer}self_attention.linear_qkv.weight", (3 * v // tp, v)
            yield f"{layer}self_attention.linear_qkv.bias", (3 * v // tp,)
            yield f"{layer}self_attention.linear_proj.weight", (v, v // tp)
            yield f"{layer}self_attention.linear_proj.bias", (v,)
            yield f"{layer}mlp.linear_fc1.weight", (vf // tp, v)
            yield f"{layer}mlp.linear_fc1.bias", (vf // tp,)
            yield f"{layer}mlp.linear_fc2.weight", (v, vf // tp)
            yield f"{layer}mlp.linear_fc2.bias", (v,)
        depth = {"linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}[config.projector_type]
        for i in range(depth):
            yield f"connector.{2 * i}.weight", (h, v if i == 0 else h)
            yield f"connector.{2 * i}.bias", (h,)
        yield "language_model.embedding.word_embeddings.weight", (padded_vocab_size // tp, h)
    for i in range(layers):
        layer = f"language_model.decoder.layers.{i}."
        rows = (language.num_attention_heads + 2 * language.num_query_groups) * head
        yield f"{layer}input_layernorm.weight", (h,)
        yield f"{layer}self_attention.linear_qkv.weight", (rows // tp, h)
        if language.family == "qwen2":
            yield f"{layer}self_attention.linear_qkv.bias", (rows // tp,)
        if language.family == "qwen3":
            yield f"{layer}self_attention.q_layernorm.weight", (head,)
            yield f"{layer}self_attention.k_layernorm.weight", (head,)
        yield f"{layer}self_attention.linear_proj.weight", (h, language.num_attention_heads * head // tp)
        yield f"{layer}pre_mlp_layernorm.weight", (h,)
        yield f"{layer}mlp.linear_fc1.weight", (2 * f // tp, h)
        yield f"{layer}mlp.linear_fc2.weight", (h, f // tp)
    if last_stage:
        yield "language_model.decoder.final_layernorm.weight", (h,)
        if not language.tie_word_embeddings or not first_stage:
            yield "language_model.output_layer.weight", (padded_vocab_size // tp, h)
        for head_name in ("vision_projector", "text_projector"):
            yield f"heads.{head_name}.weight", (h // 4, h)
            yield f"heads.{head_name}.bias", (h // 4,)
        yield "heads.temperature", (1,)


def transformers_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(parameter name, shape) of transformers' own tower, as far as it is built, and of the connector behind it."""
    vision, qformer, h = config.vision, config.qformer, config.language.hidden_size
    tower = {
        "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
        "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig),
        "blip_2_vision_model": (Blip2VisionModel, Blip2VisionConfig),
        "dinov2": (Dinov2Model, Dinov2Config),
        "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
    }  # fmt: skip
    model, sizes = tower[vision.hf["model_type"]]
    module = model(sizes(**vision.hf))
    if vision.hf["model_type"].startswith("dinov2"):
        module.encoder.layer = module.encoder.layer[: vision.num_layers + 1 + config.vision_select_layer]
        del module.layernorm, module.embeddings.mask_token
    elif vision.hf["model_type"] != "blip_2_vision_model":
        module.encoder.layers = module.encoder.layers[: vision.num_layers + 1 + config.vision_select_layer]
        del module.post_layernorm
        if hasattr(module, "head"):
            del module.head
    yield from ((f"vision_tower.model.{name}", tuple(value.shape)) for name, value in module.named_parameters())
    width = vision.hidden_size
    if qformer is None:
        yield "connector.0.weight", (h, width)
        yield "connector.0.bias", (h,)
        yield "connector.2.weight", (h, h)
        yield "connector.2.bias", (h,)
        return
    yield "connector.query_tokens", (1, qformer.num_query_tokens, qformer.hidden_size)
    module = Blip2QFormerModel(Blip2QFormerConfig(**qformer.hf))
    yield from ((f"connector.qformer.{name}", tuple(value.shape)) for name, value in module.named_parameters())
    yield "connector.projection.weight", (h, qformer.hidden_size)
    yield "connector.projection.bias", (h,)


def module_of(shapes: Iterator[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> nn.Module:
    """A module tree with these parameters, all NaN, so that whatever is not filled shows."""
    root = nn.Module()
    for name, shape in shapes:
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.register_parameter(leaf, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))
    return root


def merge_shards(rule: Rule, shards: list[Tensor]) -> Tensor:
    """The unsharded tensor from those of all tensor-parallel ranks, in rank order; the inverse of `Rule.read_shard`.

    The vocabulary keeps its padding. Replicated parameters must be equal on all ranks.
    """
    if rule.partition in ("replicated", "class_token"):
        assert all(torch.equal(shard, shards[0]) for shard in shards), f"{rule.ours} differs between ranks"
        return shards[0]
    if rule.partition == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, dim=1 if rule.partition == "row" else 0)


@dataclass
class ImportedModel:
    """All ranks of a TP x PP layout after an import."""

    modules: dict[tuple[int, int], nn.Module]
    """(stage, tensor-parallel rank) -> that rank's model."""
    reports: dict[tuple[int, int], ImportReport]
    merged: dict[str, Tensor]
    """Our global name -> unsharded tensor."""

    def provider(self, name: str) -> Tensor:
        return self.merged[name]


def import_everywhere(
    folder: Path,
    config: ModelConfig,
    *,
    tp_size: int = 1,
    stages: int = 1,
    padded_vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> ImportedModel:
    """`load_hf_weights` on every rank of a TP x PP layout, and the merged parameters."""
    rows = config.language.vocab_size
    padded = padded_vocab_size or -(-rows // (8 * tp_size)) * 8 * tp_size
    layers = config.language.num_layers // stages
    modules, reports, merged, rules = {}, {}, {}, NameTable(config).rules
    for stage in range(stages):
        for rank in range(tp_size):
            shapes = rank_shapes(
                config, tp_size=tp_size, layers=layers, first_stage=stage == 0, last_stage=stage == stages - 1,
                padded_vocab_size=padded,
            )  # fmt: skip
            modules[stage, rank] = module_of(shapes, dtype)
            reports[stage, rank] = load_hf_weights(
                modules[stage, rank], folder, config, tp_rank=rank, tp_size=tp_size, layer_offset=stage * layers,
                padded_vocab_size=padded, **options,
            )  # fmt: skip
        ranks = [dict(modules[stage, rank].named_parameters()) for rank in range(tp_size)]
        for name in ranks[0]:
            whole = global_name(name, stage * layers)
            if torch.isnan(ranks[0][name]).all():
                continue  # fresh; NaN equals nothing, merge_shards would refuse it
            merged[whole] = merge_shards(rules[whole], [rank[name].data for rank in ranks])
    return ImportedModel(modules=modules, reports=reports, merged=merged)
