"""Every parameter of one rank, by name and shape, without building the model.

The list equals `HaclModel.named_parameters()` of that rank, in its order (the tests hold it against the real model);
the order decides where a parameter stands in megatron-core's buffers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.architecture_checks import padded_vocab_size
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.lora import FUSED, SUFFIX, Lora, is_lora, split_of, target_shapes
from hacl_megatron.config.run import RunConfig
from hacl_megatron.model.connector import connector_depth
from hacl_megatron.training.plan.image_parts import hf_tower_shapes, qformer_shapes

PARTS = {
    "vision_tower": "vision tower", "connector": "connector", "language_model": "LLM", "lora": "LoRA", "heads": "heads"
}  # fmt: skip
"""Parts of the model (`part_of`), and what reports call them."""


def part_of(parameter: str) -> str:
    """The part that the parameter of this name belongs to: its first word, but for the LLM's adapters."""
    return "lora" if is_lora(parameter) else parameter.partition(".")[0]


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter of one rank."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    bytes_each: int
    shared: bool = False
    """An embedding that the first and the last pipeline stage both hold (tied): it gets a bucket of its own."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.bytes_each

    @property
    def part(self) -> str:
        return part_of(self.name)


def layers_by_stage(parallel: ParallelFlags, num_layers: int) -> list[int]:
    """LLaMA layers of each pipeline stage, uneven first and last stages included (checked already)."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    given = [layers for layers in (first, last) if layers is not None]
    others = stages - len(given)
    even = (num_layers - sum(given)) // others if others else 0
    layers = [even] * stages
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    assert sum(layers) == num_layers, (layers, num_layers)
    return layers


def stage_parameters(config: RunConfig, model: ModelConfig, stage: int) -> list[PlannedParameter]:
    """Parameters of every tensor-parallel rank of pipeline stage `stage`, in the model's order."""
    parallel, flags = config.parallel, config.model
    stages = parallel.pipeline_model_parallel_size
    is_first, is_last = stage == 0, stage == stages - 1
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if is_first:
        shapes += _prefixed("vision_tower.", _vision_tower(model, parallel.tensor_model_parallel_size))
        shapes += _prefixed("connector.", _connector(model))
    layers = layers_by_stage(parallel, model.language.num_layers)[stage]
    lora = Lora.of(config.lora)
    shapes += _prefixed("language_model.", _language_model(model, parallel, layers, is_first, is_last, lora))
    if is_last:
        shapes += _prefixed("heads.", _heads(model))
    frozen = {"vision_tower": flags.freeze_ViT, "language_model": config.language_model_is_frozen}
    rests = ("connector.query_tokens", "connector.qformer.") if flags.freeze_qformer else ()
    tied = model.language.tie_word_embeddings and stages > 1
    return [
        PlannedParameter(
            name=name,
            shape=shape,
            trained=not (frozen.get(part_of(name), False) or name.startswith(rests)),
            bytes_each=4 if not flags.bf16 or name == "heads.temperature" else 2,
            shared=tied and name.endswith(("word_embeddings.weight", "output_layer.weight")),
        )
        for name, shape in shapes
    ]


def whole_model(config: RunConfig, model: ModelConfig) -> list[PlannedParameter]:
    """The parameters of the undivided model, its vocabulary padded as this layout pads it."""
    parallel = config.parallel
    vocab = padded_vocab_size(model.language.vocab_size, parallel)
    alone = ParallelFlags(make_vocab_size_divisible_by=vocab)
    return stage_parameters(RunConfig(model=config.model, lora=config.lora, parallel=alone), model, 0)


def count_by_part(parameters: Iterable[PlannedParameter]) -> dict[str, tuple[int, int]]:
    """(trained, frozen) parameters of each part, in `PARTS`' order; parts that are not there are left out."""
    counts: dict[str, list[int]] = {}
    for parameter in parameters:
        counts.setdefault(parameter.part, [0, 0])[0 if parameter.trained else 1] += parameter.numel
    return {part: (counts[part][0], counts[part][1]) for part in PARTS if part in counts}


def trained_and_frozen(parameters: Iterable[PlannedParameter]) -> str:
    """One line for the log: `trains connector 20,979,712, heads 8,390,657; frozen: vision tower 303,507,456, …`."""
    counts = count_by_part(parameters)
    kinds = [
        ", ".join(f"{PARTS[part]} {both[kind]:,}" for part, both in counts.items() if both[kind]) for kind in (0, 1)
    ]
    return f"trains {kinds[0]}" + (f"; frozen: {kinds[1]}" if kinds[1] else "")


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return ((prefix + name, shape) for name, shape in shapes)


def _vision_tower(model: ModelConfig, tp: int) -> Shapes:
    vision = model.vision
    if vision.backend == "hf":
        yield from hf_tower_shapes(model)
        return
    width, ffn = vision.hidden_size, vision.ffn_hidden_size // tp
    attention = width // tp  # heads of this rank, side by side
    yield "class_token", (1, 1, width)
    yield from _norm("ln_pre", width, bias=True)
    yield "conv1.weight", (width, 3, vision.patch_size, vision.patch_size)
    yield "position_embeddings.weight", (vision.num_patches + 1, width)
    for index in range(model.num_vision_layers_built):
        layer = f"decoder.layers.{index}"
        yield from _norm(f"{layer}.input_layernorm", width, bias=True)
        yield from _linear(f"{layer}.self_attention.linear_proj", width, attention, bias=True)
        yield from _linear(f"{layer}.self_attention.linear_qkv", 3 * attention, width, bias=True)
        yield from _norm(f"{layer}.pre_mlp_layernorm", width, bias=True)
        yield from _linear(f"{layer}.mlp.linear_fc1", ffn, width, bias=True)
        yield from _linear(f"{layer}.mlp.linear_fc2", width, ffn, bias=True)


def _connector(model: ModelConfig) -> Shapes:
    hidden = model.language.hidden_size
    if model.qformer is not None:
        yield from qformer_shapes(model)
        return
    for index in range(connector_depth(model.projector_type)):
        yield from _linear(f"{2 * index}", hidden, model.vision.hidden_size if index == 0 else hidden, bias=True)


def _language_model(
    model: ModelConfig, parallel: ParallelFlags, layers: int, is_first: bool, is_last: bool, lora: Lora | None
) -> Shapes:
    language, tp = model.language, parallel.tensor_model_parallel_size
    hidden, ffn = language.hidden_size, language.ffn_hidden_size // tp
    query = language.head_dim * language.num_attention_heads // tp
    key = language.head_dim * language.num_query_groups // tp
    vocab = padded_vocab_size(language.vocab_size, parallel) // tp
    if is_first:
        yield "embedding.word_embeddings.weight", (vocab, hidden)
    for index in range(layers):
        layer = f"decoder.layers.{index}"
        yield from _norm(f"{layer}.input_layernorm", hidden)
        yield from _linear(f"{layer}.self_attention.linear_proj", hidden, query)
        yield from _linear(f"{layer}.self_attention.linear_qkv", query + 2 * key, hidden)
        yield from _adapters(f"{layer}.", "self_attention", model, lora, tp)
        yield from _norm(f"{layer}.pre_mlp_layernorm", hidden)
        yield from _linear(f"{layer}.mlp.linear_fc1", 2 * ffn, hidden)
        yield from _linear(f"{layer}.mlp.linear_fc2", hidden, ffn)
        yield from _adapters(f"{layer}.", "mlp", model, lora, tp)
    if is_last:
        yield from _norm("decoder.final_layernorm", hidden)
        if not (is_first and language.tie_word_embeddings):
            yield "output_layer.weight", (vocab, hidden)


def _adapters(layer: str, part: str, model: ModelConfig, lora: Lora | None, tp: int) -> Shapes:
    if lora is None:
        return
    for linear, targets in FUSED.items():
        for target in targets if linear.startswith(part) else ():
            if target in lora.targets:
                rows, columns = target_shapes(model.language)[target]
                by_rows = split_of(target) == "column"
                yield f"{layer}{linear}{SUFFIX}.{target}_A", (lora.rank, columns if by_rows else columns // tp)
                yield f"{layer}{linear}{SUFFIX}.{target}_B", (rows // tp if by_rows else rows, lora.rank)


def _heads(model: ModelConfig) -> Shapes:
    yield "temperature", (1,)
    for name in ("vision_projector", "text_projector"):
        yield from _linear(name, model.projection_size, model.language.hidden_size, bias=True)


def _norm(name: str, width: int, *, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _linear(name: str, out_features: int, in_features: int, *, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)
