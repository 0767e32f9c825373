"""The one name table between this trainer's parameters and Hugging Face's tensors, in both directions.

Three kinds of names occur:

    ours        language_model.decoder.layers.3.self_attention.linear_qkv.weight     megatron-core's parameter names
    canonical   text.layers.3.self_attn.q_proj.weight                                one per Hugging Face tensor
    spelled     language_model.model.layers.3.self_attn.q_proj.weight                what a file says (`spellings`)

A `Rule` ties one of ours to its canonical sources and says how the tensor is cut over tensor-parallel ranks. They are
made of the rows that language families and vision towers state (`config.families`, `config.towers`). Layout of
the fused tensors, as megatron-core's SelfAttention and MLP read them:

    linear_qkv   rows by query group: [q heads of the group, k, v] of head_dim rows each; groups are dealt to the ranks
    linear_fc1   SwiGLU: a rank holds [its gate rows; its up rows], so unsharded [gate; up]
    vocabulary   rows padded with zeros to the same number on every rank

transformers' own modules, a vision tower of the backend hf and the Q-Former, are replicated under their own names:
`vision_tower.model.NAME` is `vision.NAME` (but for `TowerKind.file_names`), `connector.qformer.NAME` `qformer.NAME`.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hacl_megatron.checkpoint.hf.modules import Shapes, module_shapes, tower_shapes
from hacl_megatron.checkpoint.hf.spellings import NEWLINE, canonical_name, reason_to_ignore, spelled_name
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.families import language_family
from hacl_megatron.config.tensor_rows import Partition, Row, row
from hacl_megatron.config.towers import TowerKind

ReadRows = Callable[[str, slice, slice], Tensor]
"""(canonical name, rows of dim 0, columns of dim 1 if there is one) -> that part of the tensor."""

Attention = tuple[tuple[int, ...], int]
"""`Rule.blocks` and `Rule.head_dim` of a fused qkv."""

HEADS = (
    row("vision_projector.weight", "replicated", ("vision_projector.weight", "e h")),
    row("vision_projector.bias", "replicated", ("vision_projector.bias", "e")),
    row("text_projector.weight", "replicated", ("text_projector.weight", "e h")),
    row("text_projector.bias", "replicated", ("text_projector.bias", "e")),
    row("temperature", "replicated", ("temperature", "1")),
)

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""A layer's norms as Transformer Engine's fused layers and every distributed checkpoint call them -> our name."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one of our parameters, unsharded, relates to Hugging Face tensors."""

    ours: str
    partition: Partition
    sources: tuple[str, ...]
    """Canonical names, in the order in which the fused tensor takes them."""
    source_shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...] = ()
    """qkv only: heads per query group of each source, (q heads of a group, 1, 1)."""
    head_dim: int = 0
    """qkv only: rows of a head."""
    part: int = 0
    """Replicated only: which of `parts` equal runs of its source's rows it is."""
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our unsharded tensor, the vocabulary without padding."""
        if self.parts > 1:
            return (self.source_shapes[0][0] // self.parts, *self.source_shapes[0][1:])
        if self.partition == "class_token":
            return (1, 1, *self.source_shapes[0])
        return (sum(shape[0] for shape in self.source_shapes), *self.source_shapes[0][1:])

    def local_shape(self, tp_size: int, padded_vocab_size: int) -> tuple[int, ...]:
        """Of one tensor-parallel rank's shard; ValueError if `tp_size` does not divide it."""
        shape = list(self.shape)
        if self.partition == "vocab":
            shape[0] = padded_vocab_size
        if self.partition in ("replicated", "class_token"):
            return tuple(shape)
        dim = 1 if self.partition == "row" else 0
        parts = tp_size * (2 if self.partition == "gate_up" else 1)
        if shape[dim] % parts:
            raise ValueError(
                f"{self.ours} has {shape[dim]} {'columns' if dim else 'rows'}, which {tp_size} tensor-parallel ranks "
                "cannot share evenly; choose another --tensor-model-parallel-size"
            )
        shape[dim] //= tp_size
        return tuple(shape)

    def read_shard(self, read: ReadRows, *, tp_rank: int, tp_size: int, padded_vocab_size: int) -> Tensor:
        """This rank's part, reading nothing else. The vocabulary's padding rows are zero."""
        local = self.local_shape(tp_size, padded_vocab_size)
        every = slice(None)
        if self.partition == "class_token":
            return read(self.sources[0], every, every).reshape(local)
        if self.partition == "replicated":
            rows = slice(self.part * local[0], (self.part + 1) * local[0]) if self.parts > 1 else every
            return read(self.sources[0], rows, every)
        if self.partition == "row":
            return read(self.sources[0], every, slice(tp_rank * local[1], (tp_rank + 1) * local[1]))
        if self.partition == "gate_up":
            half = local[0] // 2
            rows = slice(tp_rank * half, (tp_rank + 1) * half)
            return torch.cat([read(source, rows, every) for source in self.sources])
        first, last = tp_rank * local[0], (tp_rank + 1) * local[0]
        if self.partition == "vocab":
            total = self.source_shapes[0][0]
            part = read(self.sources[0], slice(min(first, total), min(last, total)), every)
            missing = local[0] - part.shape[0]
            return part if not missing else torch.cat([part, part.new_zeros(missing, *local[1:])])
        if self.partition == "column":
            return read(self.sources[0], slice(first, last), every)
        return self._read_qkv(read, first, last)

    def _read_qkv(self, read: ReadRows, first: int, last: int) -> Tensor:
        """Rows [first, last) of the fused tensor. Each source is read once, over the groups that the rows touch.

        Borders may fall inside a group: with more ranks than groups megatron-core cuts the same rows evenly.
        """
        group_rows = sum(self.blocks) * self.head_dim
        groups = slice(first // group_rows, -(-last // group_rows))
        parts = []
        for source, heads in zip(self.sources, self.blocks, strict=True):
            rows = heads * self.head_dim
            part = read(source, slice(groups.start * rows, groups.stop * rows), slice(None))
            parts.append(part.reshape(groups.stop - groups.start, rows, *part.shape[1:]))
        fused = torch.cat(parts, dim=1).flatten(0, 1)
        offset = groups.start * group_rows
        return fused[first - offset : last - offset]

    def to_sources(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our unsharded tensor -> (canonical name, tensor) of each source, or what of it is here (`parts`).

        Vocabulary padding may still be there.
        """
        rows = self.shape[0]
        if self.partition == "vocab" and tensor.shape[0] > rows:
            tensor = tensor[:rows]
        assert tuple(tensor.shape) == self.shape, f"{self.ours}: found {tuple(tensor.shape)}, expected {self.shape}"
        if self.partition == "class_token":
            yield self.sources[0], tensor.reshape(-1)
        elif self.partition == "gate_up":
            yield from zip(self.sources, tensor.chunk(2), strict=True)
        elif self.partition == "qkv":
            group_rows = sum(self.blocks) * self.head_dim
            grouped = tensor.reshape(-1, group_rows, *tensor.shape[1:])
            parts = grouped.split([heads * self.head_dim for heads in self.blocks], dim=1)
            for source, part in zip(self.sources, parts, strict=True):
                yield source, part.flatten(0, 1)
        else:
            yield self.sources[0], tensor


class NameTable:
    """Every parameter of a model with these sizes, and every tensor that a Hugging Face folder of it has."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.rules: dict[str, Rule] = {rule.ours: rule for rule in _build_rules(config)}

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor that our parameters come from, heads included."""
        return {
            source: shape
            for rule in self.rules.values()
            for source, shape in zip(rule.sources, rule.source_shapes, strict=True)
        }

    @cached_property
    def carried(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the tensors that no part of ours uses but a Hugging Face folder must have.

        They are the vision layers behind the selected one, the tower's post-norm, SigLIP's pooling head, DINOv2's mask.
        """
        config, vision = self.config, self.config.vision
        if vision.backend == "hf":
            return {
                source: shape
                for rule in _tower_rules(vision.kind, tower_shapes(config)[1])
                for source, shape in zip(rule.sources, rule.source_shapes, strict=True)
            }
        kind, letters = vision.kind, vision.letters
        carried = {
            f"vision.{kind.layers}.{layer}.{source.name}": source.shape(letters)
            for layer in range(config.num_vision_layers_built, vision.num_layers)
            for _, _, sources in kind.megatron.layer
            for source in sources
        }
        return carried | {f"vision.{source.name}": source.shape(letters) for source in kind.megatron.unused}

    def canonical(self, spelled: str, *, tower_folder: bool = False) -> str | None:
        """Canonical form of a name in a file, or None; it need not be one that this model has.

        Args:
            tower_folder: the file is of a vision tower's own folder, where names have no `vision_tower.`.
        """
        return canonical_name(self.config, spelled, tower_folder=tower_folder)

    def spelled(self, canonical: str, layout: str) -> str:
        """How a folder of `layout` ("hf", "llava", "tower") or "minigpt4"'s file spells a canonical name."""
        return spelled_name(self.config, canonical, layout)

    def ignored_reason(self, spelled: str, canonical: str | None, *, tower_folder: bool = False) -> str | None:
        """Why a tensor of a file has no place in our model, or None if it should have one."""
        return reason_to_ignore(self.config, spelled, canonical, carried=self.carried, tower_folder=tower_folder)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The names most like `name`, for an error message; empty when none is."""
    return ", ".join(difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6))


# ------------------------------------------------------------------------------------------------------------- building


def _tower_rules(kind: TowerKind, shapes: Shapes) -> Iterator[Rule]:
    """Of parameters of transformers' own tower, by their names in its module."""
    for name, shape in shapes.items():
        _, source, part, parts = kind.file_name(name)
        yield Rule(
            ours=f"vision_tower.model.{name}",
            partition="replicated",
            sources=(f"vision.{source}",),
            source_shapes=((parts * shape[0], *shape[1:]),),
            part=part,
            parts=parts,
        )


def _build_rules(config: ModelConfig) -> Iterator[Rule]:
    language, vision = config.language, config.vision
    family, kind = language_family(language.family), vision.kind
    language_attention = ((language.num_attention_heads // language.num_query_groups, 1, 1), language.head_dim)
    vision_attention = ((1, 1, 1), vision.hidden_size // vision.num_attention_heads)

    def rules(
        rows: Iterable[Row], ours: str, theirs: str, letters: dict[str, int], attention: Attention = ((), 0)
    ) -> Iterator[Rule]:
        for name, partition, sources in rows:
            blocks, head_dim = attention if partition == "qkv" else ((), 0)
            yield Rule(
                ours=ours + name,
                partition=partition,
                sources=tuple(theirs + source.name for source in sources),
                source_shapes=tuple(source.shape(letters) for source in sources),
                blocks=blocks,
                head_dim=head_dim,
            )

    def replicated(ours: str, canonical: str, shape: tuple[int, ...]) -> Rule:
        return Rule(ours=ours, partition="replicated", sources=(canonical,), source_shapes=(shape,))

    if vision.backend == "hf":
        yield from _tower_rules(kind, tower_shapes(config)[0])
    else:
        yield from rules(kind.megatron.outside, "vision_tower.", "vision.", vision.letters)
        for i in range(config.num_vision_layers_built):
            prefixes = f"vision_tower.decoder.layers.{i}.", f"vision.{kind.layers}.{i}."
            yield from rules(kind.megatron.layer, *prefixes, vision.letters, vision_attention)

    width, numbered = vision.hidden_size, "connector.{}"
    if qformer := config.qformer:
        yield replicated(
            "connector.query_tokens", "qformer.query_tokens", (1, qformer.num_query_tokens, qformer.hidden_size)
        )
        for name, shape in module_shapes("Blip2QFormerModel", qformer.hf).items():
            yield replicated(f"connector.qformer.{name}", f"qformer.{name}", shape)
        width, numbered = qformer.hidden_size, "connector.projection"
    if config.tiles is not None:
        yield replicated("connector.image_newline", NEWLINE, (language.hidden_size,))
    for i in range(0, 2 * connector_depth(config.projector_type), 2):
        ours = numbered.format(i)
        yield replicated(f"{ours}.weight", f"projector.{i}.weight", (language.hidden_size, width))
        yield replicated(f"{ours}.bias", f"projector.{i}.bias", (language.hidden_size,))
        width = language.hidden_size

    embedding, final_norm, output = rules(family.outside, "language_model.", "text.", language.letters)
    yield embedding
    for i in range(language.num_layers):
        prefixes = f"language_model.decoder.layers.{i}.", f"text.layers.{i}."
        yield from rules(family.layer, *prefixes, language.letters, language_attention)
    yield final_norm
    if language.tie_word_embeddings:
        # A last pipeline stage keeps its own copy of a tied embedding under the output layer's name.
        output = Rule(
            ours=output.ours, partition="vocab", sources=embedding.sources, source_shapes=embedding.source_shapes
        )
    yield output
    yield from rules(HEADS, "heads.", "heads.", {"h": language.hidden_size, "e": config.projection_size, "1": 1})
