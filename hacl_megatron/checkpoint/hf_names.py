"""The one name table between this trainer's parameters and Hugging Face's tensors, in both directions.

Three kinds of names occur:

    ours        language_model.decoder.layers.3.self_attention.linear_qkv.weight     megatron-core's parameter names
    canonical   text.layers.3.self_attn.q_proj.weight                                one per Hugging Face tensor
    spelled     language_model.model.layers.3.self_attn.q_proj.weight                what a file says, by layout and age

A `Rule` ties one of ours to its canonical sources and says how the tensor is cut over tensor-parallel ranks. Layout of
the fused tensors, as megatron-core's SelfAttention and MLP read them:

    linear_qkv   rows by query group: [q heads of the group, k, v] of head_dim rows each; groups are dealt to the ranks
    linear_fc1   SwiGLU: a rank holds [its gate rows; its up rows], so unsharded [gate; up]
    vocabulary   rows padded with zeros to the same number on every rank
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hacl_megatron.config.architecture import ModelConfig

Partition = Literal["replicated", "class_token", "column", "row", "qkv", "gate_up", "vocab"]
"""How tensor parallelism cuts a parameter: not at all, on dim 0, on dim 1, or in one of the fused ways above."""

ReadRows = Callable[[str, slice, slice], Tensor]
"""(canonical name, rows of dim 0, columns of dim 1 if there is one) -> that part of the tensor."""

# Each row: our name, its partition, and its sources with their shapes in the symbols of `_sizes`.
LANGUAGE_LAYER = (
    ("input_layernorm.weight", "replicated", (("input_layernorm.weight", "h"),)),
    ("self_attention.linear_qkv.weight", "qkv", (
        ("self_attn.q_proj.weight", "q h"), ("self_attn.k_proj.weight", "kv h"), ("self_attn.v_proj.weight", "kv h"),
    )),
    ("self_attention.linear_proj.weight", "row", (("self_attn.o_proj.weight", "h q"),)),
    ("pre_mlp_layernorm.weight", "replicated", (("post_attention_layernorm.weight", "h"),)),
    ("mlp.linear_fc1.weight", "gate_up", (("mlp.gate_proj.weight", "f h"), ("mlp.up_proj.weight", "f h"))),
    ("mlp.linear_fc2.weight", "row", (("mlp.down_proj.weight", "h f"),)),
)  # fmt: skip
LANGUAGE = (
    ("embedding.word_embeddings.weight", "vocab", (("embed_tokens.weight", "v h"),)),
    ("decoder.final_layernorm.weight", "replicated", (("norm.weight", "h"),)),
    ("output_layer.weight", "vocab", (("lm_head.weight", "v h"),)),
)
VISION_LAYER = (
    ("input_layernorm.weight", "replicated", (("layer_norm1.weight", "h"),)),
    ("input_layernorm.bias", "replicated", (("layer_norm1.bias", "h"),)),
    ("self_attention.linear_qkv.weight", "qkv", (
        ("self_attn.q_proj.weight", "h h"), ("self_attn.k_proj.weight", "h h"), ("self_attn.v_proj.weight", "h h"),
    )),
    ("self_attention.linear_qkv.bias", "qkv", (
        ("self_attn.q_proj.bias", "h"), ("self_attn.k_proj.bias", "h"), ("self_attn.v_proj.bias", "h"),
    )),
    ("self_attention.linear_proj.weight", "row", (("self_attn.out_proj.weight", "h h"),)),
    ("self_attention.linear_proj.bias", "replicated", (("self_attn.out_proj.bias", "h"),)),
    ("pre_mlp_layernorm.weight", "replicated", (("layer_norm2.weight", "h"),)),
    ("pre_mlp_layernorm.bias", "replicated", (("layer_norm2.bias", "h"),)),
    ("mlp.linear_fc1.weight", "column", (("mlp.fc1.weight", "f h"),)),
    ("mlp.linear_fc1.bias", "column", (("mlp.fc1.bias", "f"),)),
    ("mlp.linear_fc2.weight", "row", (("mlp.fc2.weight", "h f"),)),
    ("mlp.linear_fc2.bias", "replicated", (("mlp.fc2.bias", "h"),)),
)  # fmt: skip
VISION = (
    ("class_token", "class_token", (("embeddings.class_embedding", "h"),)),
    ("conv1.weight", "replicated", (("embeddings.patch_embedding.weight", "h c p p"),)),
    ("position_embeddings.weight", "replicated", (("embeddings.position_embedding.weight", "n h"),)),
    ("ln_pre.weight", "replicated", (("pre_layrnorm.weight", "h"),)),  # transformers' own spelling
    ("ln_pre.bias", "replicated", (("pre_layrnorm.bias", "h"),)),
)
VISION_POST_NORM = (("post_layernorm.weight", "h"), ("post_layernorm.bias", "h"))
HEADS = (
    ("vision_projector.weight", "replicated", (("vision_projector.weight", "e h"),)),
    ("vision_projector.bias", "replicated", (("vision_projector.bias", "e"),)),
    ("text_projector.weight", "replicated", (("text_projector.weight", "e h"),)),
    ("text_projector.bias", "replicated", (("text_projector.bias", "e"),)),
    ("temperature", "replicated", (("temperature", "1"),)),
)

# Spelled -> canonical, first match wins. What each line is for:
READ_SPELLINGS = tuple((re.compile(pattern), canonical) for pattern, canonical in (
    # mm_projector.bin and the original layout; wrappers such as base_model.model. stand before it, as LLaVA tolerates
    (r"(?:[\w.]+\.)?mm_projector\.(weight|bias)", r"projector.0.\1"),
    (r"(?:[\w.]+\.)?mm_projector\.(\d+)\.(weight|bias)", r"projector.\1.\2"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)", r"projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)", r"projector.2.\1"),
    # the original layout nests two vision towers; transformers 5 dropped `vision_model.`
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
     r"((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", r"vision.\1"),
    (r"(?:language_model\.)?lm_head\.weight", r"text.lm_head.weight"),
    # transformers <= 4.51 and files of every version; 4.52's modules and 5's; a plain LLaMA and the original layout
    (r"(?:language_model\.model|model\.language_model(?:\.model)?|model)\.((?:embed_tokens|layers|norm)\..*)",
     r"text.\1"),
))  # fmt: skip
CLIP_SPELLING = re.compile(r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)")
"""A CLIP folder's own names: CLIPModel and 4.x's CLIPVisionModel have the prefix, 5.x's CLIPVisionModel has not."""
CLIP_OTHER_SIDE = re.compile(r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale")

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""A layer's norms as Transformer Engine's fused layers and every distributed checkpoint call them -> our name."""

WRITE_PREFIXES = {
    "hf": {"text.lm_head.": "language_model.lm_head.", "text.": "language_model.model.",
           "vision.": "vision_tower.vision_model.", "projector.0.": "multi_modal_projector.linear_1.",
           "projector.2.": "multi_modal_projector.linear_2.", "heads.": ""},
    "llava": {"text.lm_head.": "lm_head.", "text.": "model.",
              "vision.": "model.vision_tower.vision_tower.vision_model.", "projector.": "model.mm_projector.",
              "heads.": ""},
    "clip": {"vision.": "vision_model."},
}  # fmt: skip
"""Canonical -> spelled. `hf` is what the hub's checkpoints say and what transformers 4.x and 5.x both load."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our unsharded tensor, the vocabulary without padding."""
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
            return read(self.sources[0], every, every)
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
        """Our unsharded tensor -> (canonical name, tensor) of each source. Vocabulary padding may still be there."""
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

        They are the vision layers behind the selected one and the tower's post-norm.
        """
        config, sizes = self.config, _sizes(self.config)["vision"]
        carried = {}
        for layer in range(config.num_vision_layers_built, config.vision.num_layers):
            for _, _, sources in VISION_LAYER:
                for name, shape in sources:
                    carried[f"vision.encoder.layers.{layer}.{name}"] = _shape(shape, sizes)
        return carried | {f"vision.{name}": _shape(shape, sizes) for name, shape in VISION_POST_NORM}

    def canonical(self, spelled: str, *, clip_folder: bool = False) -> str | None:
        """Canonical form of a name in a file, or None; it need not be one that this model has.

        Args:
            clip_folder: the file is a CLIP model's own, where the tower's names have no `vision_tower.`.
        """
        if clip_folder:
            match = CLIP_SPELLING.fullmatch(spelled)
            return f"vision.{match[1]}" if match else None
        for pattern, canonical in READ_SPELLINGS:
            if match := pattern.fullmatch(spelled):
                return match.expand(canonical)
        return None

    def spelled(self, canonical: str, layout: str) -> str:
        """How a folder of `layout` ("hf", "llava", "clip") spells a canonical name."""
        if layout == "llava" and self.config.projector_type == "linear" and canonical.startswith("projector."):
            return canonical.replace("projector.0.", "model.mm_projector.")
        for prefix, written in WRITE_PREFIXES[layout].items():
            if canonical.startswith(prefix):
                return written + canonical.removeprefix(prefix)
        raise KeyError(f"{canonical} has no name in the layout {layout}")

    def ignored_reason(self, spelled: str, canonical: str | None) -> str | None:
        """Why a tensor of a file has no place in our model, or None if it should have one."""
        if spelled.endswith("rotary_emb.inv_freq"):
            return "buffer: rotary frequencies are computed"
        if spelled.endswith("embeddings.position_ids"):
            return "buffer: positions are computed"
        if canonical == "text.lm_head.weight" and self.config.language.tie_word_embeddings:
            return "tied: the embedding serves as LM head"
        if canonical in self.carried:
            return f"carried: behind the selected vision layer {self.config.vision_select_layer}"
        if canonical is None and CLIP_OTHER_SIDE.fullmatch(spelled):
            return "CLIP's text side"
        return None


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The names most like `name`, for an error message; empty when none is."""
    return ", ".join(difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6))


def partition_of(ours: str) -> Partition:
    """How tensor parallelism cuts one of our parameters, from its name alone."""
    prefix, _, rest = ours.partition(".")
    if prefix in ("language_model", "vision_tower"):
        if layer := re.fullmatch(r"decoder\.layers\.\d+\.(.*)", rest):
            rows, rest = (LANGUAGE_LAYER if prefix == "language_model" else VISION_LAYER), layer[1]
        else:
            rows = LANGUAGE if prefix == "language_model" else VISION
        for name, partition, _ in rows:
            if name == rest:
                return partition
    elif prefix in ("connector", "heads"):
        return "replicated"
    raise KeyError(f"{ours} is no parameter of this model")


def merge_shards(name: str, shards: list[Tensor]) -> Tensor:
    """The unsharded tensor from those of all tensor-parallel ranks, in rank order; the inverse of `Rule.read_shard`.

    The vocabulary keeps its padding. Replicated parameters must be equal on all ranks.
    """
    partition = partition_of(name)
    if partition in ("replicated", "class_token"):
        assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between tensor-parallel ranks"
        return shards[0]
    if partition == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, dim=1 if partition == "row" else 0)


# ------------------------------------------------------------------------------------------------------------- building


def _sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    language, vision = config.language, config.vision
    return {
        "language": {
            "h": language.hidden_size,
            "q": language.num_attention_heads * language.head_dim,
            "kv": language.num_query_groups * language.head_dim,
            "f": language.ffn_hidden_size,
            "v": language.vocab_size,
        },
        "vision": {
            "h": vision.hidden_size,
            "f": vision.ffn_hidden_size,
            "p": vision.patch_size,
            "c": 3,
            "n": vision.num_patches + 1,
        },
        "heads": {"h": language.hidden_size, "e": config.projection_size, "1": 1},
    }


def _shape(symbols: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[symbol] for symbol in symbols.split())


def _build_rules(config: ModelConfig) -> Iterator[Rule]:
    language, vision, sizes = config.language, config.vision, _sizes(config)
    language_attention = ((language.num_attention_heads // language.num_query_groups, 1, 1), language.head_dim)
    vision_attention = ((1, 1, 1), vision.hidden_size // vision.num_attention_heads)

    def rules(rows, ours: str, theirs: str, part: str, attention=((), 0)) -> Iterator[Rule]:
        for name, partition, sources in rows:
            blocks, head_dim = attention if partition == "qkv" else ((), 0)
            yield Rule(
                ours=ours + name,
                partition=partition,
                sources=tuple(theirs + source for source, _ in sources),
                source_shapes=tuple(_shape(shape, sizes[part]) for _, shape in sources),
                blocks=blocks,
                head_dim=head_dim,
            )

    yield from rules(VISION, "vision_tower.", "vision.", "vision")
    for i in range(config.num_vision_layers_built):
        prefixes = f"vision_tower.decoder.layers.{i}.", f"vision.encoder.layers.{i}."
        yield from rules(VISION_LAYER, *prefixes, "vision", vision_attention)

    for i in range(0, 2 * connector_depth(config.projector_type), 2):
        width = vision.hidden_size if i == 0 else language.hidden_size
        for name, shape in (("weight", (language.hidden_size, width)), ("bias", (language.hidden_size,))):
            yield Rule(
                ours=f"connector.{i}.{name}",
                partition="replicated",
                sources=(f"projector.{i}.{name}",),
                source_shapes=(shape,),
            )

    embedding, final_norm, output = rules(LANGUAGE, "language_model.", "text.", "language")
    yield embedding
    for i in range(language.num_layers):
        prefixes = f"language_model.decoder.layers.{i}.", f"text.layers.{i}."
        yield from rules(LANGUAGE_LAYER, *prefixes, "language", language_attention)
    yield final_norm
    if language.tie_word_embeddings:
        # A last pipeline stage keeps its own copy of a tied embedding under the output layer's name.
        output = Rule(
            ours=output.ours, partition="vocab", sources=embedding.sources, source_shapes=embedding.source_shapes
        )
    yield output
    yield from rules(HEADS, "heads.", "heads.", "heads")


def connector_depth(projector_type: str) -> int:
    """Linear layers of a connector: `linear` has one, `mlpNx_gelu` N."""
    if projector_type == "linear":
        return 1
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type):
        return int(match[1])
    raise ValueError(f"connector {projector_type!r} is unknown; expected linear or mlpNx_gelu")
