"""Every parameter of one rank, by name and shape, without building the model.

The list equals `HaclModel.named_parameters()` of that rank, in its order (the tests hold it against the real model);
the order decides where a parameter stands in megatron-core's buffers.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hacl_megatron.checkpoint.hf.names import NameTable, Rule
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.architecture import padded_vocab_size
from hacl_megatron.config.flags import ParallelFlags
from hacl_megatron.config.image_sharing import tower_ranks
from hacl_megatron.config.lora import FUSED, SUFFIX, Lora, is_lora, split_of, target_shapes
from hacl_megatron.config.run import RunConfig

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


def stage_parameters(config: RunConfig, stage: int) -> list[PlannedParameter]:
    """Parameters of every tensor-parallel rank of pipeline stage `stage`, in the model's order."""
    parallel, flags, model = config.parallel, config.model, config.architecture
    stages, tp = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    vocab = padded_vocab_size(model.language.vocab_size, parallel)
    of_tower = tower_ranks(model, parallel)
    shapes = [
        (name, rule.local_shape(of_tower if name.startswith("vision_tower.") else tp, vocab))
        for name, rule in _rules_of_stage(parallel, model, stage)
    ]
    if (lora := Lora.of(config.lora)) is not None:
        shapes = list(_with_adapters(shapes, model, lora, tp))
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


def whole_model(config: RunConfig) -> list[PlannedParameter]:
    """The parameters of the undivided model, its vocabulary padded as this layout pads it."""
    vocab = padded_vocab_size(config.architecture.language.vocab_size, config.parallel)
    alone = ParallelFlags(make_vocab_size_divisible_by=vocab)
    return stage_parameters(replace(config, parallel=alone), 0)


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


Shapes = Iterable[tuple[str, tuple[int, ...]]]

# The name table has Hugging Face's order. Modules come in megatron-core's: of each layer and part, these first.
_FIRST = (
    "class_token", "ln_pre.", "conv1.", "position_embeddings.",
    "input_layernorm.", "self_attention.linear_proj.", "self_attention.", "pre_mlp_layernorm.", "mlp.",
    "temperature",
)  # fmt: skip
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")


def _rules_of_stage(parallel: ParallelFlags, model: ModelConfig, stage: int) -> Iterator[tuple[str, Rule]]:
    """(name on this stage, rule) of each parameter, in the model's order."""
    layers = layers_by_stage(parallel, model.language.num_layers)
    first_layer, is_first, is_last = sum(layers[:stage]), stage == 0, stage == len(layers) - 1
    on_first = ("vision_tower.", "connector.", "language_model.embedding.")
    on_last = ("language_model.decoder.final_layernorm.", "language_model.output_layer.", "heads.")
    for name, rule, layer, rest in _rules_in_order(model):
        if layer is not None:
            if 0 <= layer - first_layer < layers[stage]:
                yield f"language_model.decoder.layers.{layer - first_layer}.{rest}", rule
        elif name == "language_model.output_layer.weight" and is_first and model.language.tie_word_embeddings:
            continue  # the embedding itself
        elif (is_first and name.startswith(on_first)) or (is_last and name.startswith(on_last)):
            yield name, rule


@functools.lru_cache(maxsize=4)
def _rules_in_order(model: ModelConfig) -> list[tuple[str, Rule, int | None, str]]:
    """(name, rule, LLM layer, what follows it in the name) of the whole model; kept, for a planner asks again."""
    rows = []
    for name, rule in sorted(NameTable(model).rules.items(), key=lambda item: _place(item[0])):
        layer = _LAYER.match(name)
        rows.append((name, rule, int(layer[1]), name[layer.end() :]) if layer else (name, rule, None, name))
    return rows


_PARTS_IN_ORDER = (
    "vision_tower.", "connector.", "language_model.embedding.", "language_model.decoder.layers.",
    "language_model.decoder.", "language_model.", "heads.",
)  # fmt: skip


def _place(name: str) -> tuple[int, int, int]:
    """Sorts names into the order in which the model's modules stand; what is equal keeps the table's order."""
    part = next(index for index, prefix in enumerate(_PARTS_IN_ORDER) if name.startswith(prefix))
    layer = re.search(r"\.decoder\.layers\.(\d+)\.", name)
    rest = name[layer.end() :] if layer else name.partition(".")[2]
    first = next((index for index, prefix in enumerate(_FIRST) if rest.startswith(prefix)), len(_FIRST))
    return part, int(layer[1]) if layer else -1, first


def _with_adapters(shapes: Shapes, model: ModelConfig, lora: Lora, tp: int) -> Shapes:
    """The same with the adapters behind the last linear layer of attention and MLP each, where modules have them."""
    of_targets = target_shapes(model.language)
    linears = {part: [name for name in FUSED if name.startswith(part)] for part in ("self_attention", "mlp")}
    shapes = list(shapes)
    for index, (name, shape) in enumerate(shapes):
        yield name, shape
        behind = shapes[index + 1][0] if index + 1 < len(shapes) else ""
        for part, names in linears.items():
            layer, found, _ = name.partition(f".{part}.")
            if not (found and name.startswith("language_model.")) or behind.startswith(f"{layer}.{part}."):
                continue
            for linear in names:
                for target in FUSED[linear]:
                    if target in lora.targets:
                        rows, columns = of_targets[target]
                        by_rows = split_of(target) == "column"
                        adapter = f"{layer}.{linear}{SUFFIX}.{target}"
                        yield f"{adapter}_A", (lora.rank, columns if by_rows else columns // tp)
                        yield f"{adapter}_B", (rows // tp if by_rows else rows, lora.rank)
