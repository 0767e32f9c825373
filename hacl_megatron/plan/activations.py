"""What autograd keeps of one micro-batch until its backward pass: the one place that knows, op by op.

Everything is bytes on one rank. e is the bytes of an activation (2 in bf16), T the rows of the main pack (what runs
ahead keeps nothing but its outputs), H, F the hidden and feed-forward width, d a head's, q and k the widths of all
query and key heads of this tensor-parallel rank. A LLaMA layer keeps, for each row (`trained` terms only where the LLM
trains: a frozen matrix product keeps nothing):

    norms, twice           input (eH; without a fused kernel in fp32, and trained the normalised rows too), 1/rms
    qkv product            trained: its input, eH
    norms of its heads     where the family has them: queries e q and keys (in the product's rows), 1/rms of each head
    rotary                 cosines and sines of queries and keys: 4ed; where attention rotates itself: ed
    attention              rotated queries and keys e(q + k), the values (in the product's rows e(q + 2k), of which they
                           are a view, unless the kernel copies them: ek), output eq, log-sum-exp
    output product         trained: its input (the attention's output itself, or the copy of it that SDPA needs)
    gate and up product    trained: its input, eH
    SwiGLU                 its input 2eF (without a fused kernel the activated gate too, eF)
    down product           trained: its input, eF
    LoRA                   of each target: that input, and the rank's e r (dropped inputs are not counted)

Sequence parallelism divides the norms and the inputs of the first product of each half by the tensor-parallel size. The
last layer runs on gathered rows, and behind keys and values for the read rows alone. Context parallelism divides the
rows and the views of images; of keys and values a rank keeps its own, as a copy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hacl_megatron.assemble.parameters import layers_by_stage
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks.architecture import padded_vocab_size
from hacl_megatron.config.families import language_family
from hacl_megatron.config.image_sharing import tower_ranks
from hacl_megatron.config.lora import Lora, split_of
from hacl_megatron.config.run import RunConfig
from hacl_megatron.model.hacl import VIEWS_AT_ONCE
from hacl_megatron.plan.context_share import fullest_share, gathered_bytes
from hacl_megatron.plan.image_parts import image_ranks, kept_by_connector, kept_by_tower
from hacl_megatron.plan.workload import MicroBatchShape, PackShape

FP32, INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What depends on the kernels that `platform` picks."""

    fused_norm: bool
    """The norm keeps its input as it is, not an fp32 copy."""
    fused_swiglu: bool
    """megatron-core's `bias_activation_fusion`, or the host's own."""
    packed_attention: bool
    """One kernel for all segments, whose output the next product takes as it is; else SDPA per segment and a copy."""
    copies_values: bool
    """Attention copies the values, so that the product of all three can be let go."""
    rotates_itself: bool
    """Attention rotates queries and keys, with one table of angles for all layers."""
    attends_again: bool = False
    """Attention gathers and runs once more backward: its output and what else its kernel would keep are not kept."""


GPU = Kernels(
    fused_norm=True, fused_swiglu=True, packed_attention=True, copies_values=False, rotates_itself=False
)  # fmt: skip


def cpu_kernels(config: RunConfig) -> Kernels:
    """`platform.cpu.kernels`' own kernels take fp32 alone, its attention no grouped queries."""
    own, language = not config.model.bf16, config.architecture.language
    attention = own and language.num_query_groups == language.num_attention_heads
    return Kernels(
        fused_norm=own, fused_swiglu=own, packed_attention=attention, copies_values=attention, rotates_itself=True
    )


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """megatron-core's activation recomputation (`transformer:` section)."""

    granularity: str | None = None
    """None, `selective` or `full`."""
    method: str = "uniform"
    num_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)

    @property
    def label(self) -> str:
        return self.granularity or "none"


def recompute_of(config: RunConfig) -> Recompute:
    fields = config.transformer
    if (granularity := fields.get("recompute_granularity")) is None:
        return Recompute()
    return Recompute(
        granularity=granularity,
        method=fields.get("recompute_method") or "uniform",
        num_layers=fields.get("recompute_num_layers") or 1,
        modules=tuple(fields.get("recompute_modules") or ("core_attn",)),
    )


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Of one micro-batch on one rank."""

    kept: float
    """What autograd keeps from the forward to the backward pass, without the two below."""
    logits: float
    """The softmax over the vocabulary that the loss keeps (last stage)."""
    logits_peak: float
    """What comes on top while the loss runs: logits and their gradient."""
    working: float
    """What one layer's backward pass needs on top while it runs, a recomputed layer's activations included."""


def stage_activations(
    config: RunConfig, micro_batch: MicroBatchShape, stage: int, *, kernels: Kernels = GPU
) -> ActivationBytes:
    """Activations of one micro-batch on every rank of pipeline stage `stage`."""
    model, ranks = config.architecture, config.parallel.context_parallel_size
    pack = fullest_share(micro_batch.main, ranks)
    if ranks > 1:
        kernels = replace(kernels, copies_values=True, attends_again=True)
    stages, tp = config.parallel.pipeline_model_parallel_size, config.parallel.tensor_model_parallel_size
    shard = tp if config.parallel.sequence_parallel else 1
    e = 2 if config.model.bf16 else 4
    trained, lora = not config.language_model_is_frozen, Lora.of(config.lora)
    language, rows = model.language, pack.rows
    recompute = recompute_of(config)
    layers = layers_by_stage(config.parallel, language.num_layers)[stage]
    is_first, is_last = stage == 0, stage == stages - 1

    def layer(index: int, recompute: Recompute = recompute) -> float:
        last = is_last and index == layers - 1
        return llama_layer(
            model, pack, bytes_each=e, tp=tp, shard=1 if last else shard, trained=trained, kernels=kernels,
            recompute=recompute, reads=last, lora=lora,
        )  # fmt: skip

    whole = [layer(index, Recompute()) for index in range(layers)]
    keeps_angles = True
    if recompute.granularity == "full":
        checkpoint = rows / shard * language.hidden_size * e
        if recompute.method == "block":
            recomputed = min(recompute.num_layers, layers)
            kept = recomputed * checkpoint + sum(whole[recomputed:])
            again = max(whole[:recomputed], default=0.0)
            keeps_angles = recomputed < layers
        else:
            together = min(recompute.num_layers, layers)
            kept = math.ceil(layers / together) * checkpoint
            keeps_angles = False
            again = max(sum(whole[start : start + together]) for start in range(0, layers, together))
        if not kernels.rotates_itself:
            kept += FP32 * rows * language.head_dim
    else:
        kept = sum(layer(index) for index in range(layers))
        again = max(all_of_it - layer(index) for index, all_of_it in enumerate(whole))
    if kernels.rotates_itself and e == FP32 and keeps_angles:
        kept += FP32 * rows * language.head_dim  # the layers' table of angles
    working = again + rows * e * (3 * language.ffn_hidden_size / tp + 2 * language.hidden_size)
    if ranks > 1:  # a layer's gathered keys and values backward, and all gradients of them
        row = 2 * e * language.head_dim * language.num_query_groups / tp
        gathered, seen = gathered_bytes(micro_batch.main, ranks, row)
        working += gathered + 2 * seen
        working += rows * (e * language.head_dim + FP32) * language.num_attention_heads / tp  # its output once more
    logits = logits_peak = 0.0
    if is_first:
        front, of_tower = _front(config, pack, e)
        kept += front
        if recompute.granularity == "full" or kernels.fused_norm or e == FP32:
            # The first layer's input is kept as it is, and under sequence parallelism it is a view of all rows.
            kept += rows * (1 - 1 / shard) * language.hidden_size * e
        vision = model.vision
        ffn = vision.ffn_hidden_size / tower_ranks(model, config.parallel)
        at_once = _own_images(config, pack)
        if model.tiles is not None and config.model.freeze_ViT:
            at_once = min(at_once, VIEWS_AT_ONCE)
        working = max(working, of_tower + at_once * vision.sequence_length * e * 4 * ffn)
    if is_last:
        kept += pack.read_rows * _norm(language.hidden_size, e, trained, kernels)
        kept += INT64 * (pack.target_rows + micro_batch.eos_rows)
        kept += pack.target_rows * (e * language.hidden_size * trained + INT64 + 1)
        kept += micro_batch.eos_rows * (e * language.hidden_size + FP32 * (model.projection_size + 3))
        columns = pack.target_rows * padded_vocab_size(language.vocab_size, config.parallel) / tp
        logits, logits_peak = FP32 * columns, 2 * e * columns
    return ActivationBytes(kept=kept, logits=logits, logits_peak=logits_peak, working=working)


def llama_layer(
    model: ModelConfig,
    pack: PackShape,
    *,
    bytes_each: int,
    tp: int,
    shard: int,
    trained: bool,
    kernels: Kernels,
    recompute: Recompute,
    reads: bool,
    lora: Lora | None = None,
) -> float:
    """Bytes that one layer keeps of a pack; `reads`: it is the last, which goes on with the read rows alone."""
    adapted = frozenset(lora.targets if lora is not None else ())
    language, e = model.language, bytes_each
    hidden, ffn, head = language.hidden_size, language.ffn_hidden_size / tp, language.head_dim
    query = head * language.num_attention_heads / tp
    key = head * language.num_query_groups / tp
    rows, asking = pack.rows, pack.read_rows if reads else pack.rows
    norm = _norm(hidden, e, trained, kernels) / shard
    product_input = e * hidden / shard
    for_query, for_pairs = ((trained or bool(adapted & names)) for names in ({"q_proj"}, {"k_proj", "v_proj"}))
    for_ffn = trained or bool(adapted & {"gate_proj", "up_proj"})
    selected = recompute.modules if recompute.granularity == "selective" else ()

    kept = rows * norm + asking * norm
    if reads or "layernorm" not in selected:
        kept += rows * product_input * (for_pairs or (for_query and not reads))
    if "layernorm" not in selected:
        kept += asking * product_input * for_ffn
    if reads:
        kept += asking * product_input * for_query  # the read rows of that input, copied
        if language.num_query_groups > tp:
            kept += e * hidden * (query + 2 * key)  # the product's weight, cut into queries' and the others' rows

    again = "core_attn" in selected and not reads
    projected = rows * e * (2 * key if reads else query + 2 * key)
    if again and kernels.rotates_itself:
        kept += projected
        if tp < language.num_query_groups < language.num_attention_heads:
            kept += rows * e * query  # queries of several groups are not a view of the product
    else:
        kept += rows * e * key if kernels.copies_values else projected
        kept += e * (asking * query + rows * key)  # rotated
        kept += _angles(rows, asking, e * head, kernels, reads, e)
    if language_family(language.family).norms_queries_and_keys:
        kept += _head_norms(model, rows, asking, e, tp, trained, kernels, reads=reads, again=again)
    if not again and not kernels.attends_again:
        kept += asking * (e * query + FP32 * language.num_attention_heads / tp)
        kept += e * sum(part.rows * query + part.context_rows * 2 * key for part in pack.branches)
        if not kernels.packed_attention:
            kept += e * sum(part.rows * part.context for part in pack.branches if part.length > 1)
        if reads and not kernels.packed_attention:
            kept += e * sum(
                part.count * part.read * part.length for part in pack.segments if 1 < part.read < part.length
            )
    copies_output = again or kernels.attends_again or pack.branches or not kernels.packed_attention
    if (trained or "o_proj" in adapted) and copies_output:
        kept += asking * e * query  # the output product's input, where it is not the kernel's output itself

    mlp = (2 if kernels.fused_swiglu else 3) * e * ffn + e * ffn * (trained or "down_proj" in adapted)
    if "mlp" in selected:
        mlp = product_input * (not for_ffn)  # the checkpoint keeps the MLP's input, which else only training does
    return kept + asking * mlp + _of_lora(lora, rows, asking, e, shard, again=selected)


def _of_lora(lora: Lora | None, rows: float, asking: float, e: int, shard: int, *, again: Sequence[str]) -> float:
    """What the adapters keep beside their inputs, which are counted where the frozen product has them: A x."""
    if lora is None:
        return 0.0
    kept = 0.0
    for target in lora.targets:
        if "mlp" not in again or target in ("q_proj", "k_proj", "v_proj", "o_proj"):
            low = e * lora.rank / (shard if split_of(target) == "row" else 1)
            kept += low * (rows if target in ("k_proj", "v_proj") else asking)
    return kept


def _angles(rows: float, asking: float, width: float, kernels: Kernels, reads: bool, e: int) -> float:
    """Bytes of cosines and sines; `width`: bytes of one row of a head."""
    if not kernels.rotates_itself:
        return 2 * width * (rows + asking)
    # In fp32 the layers share one table.
    return width * ((e < FP32) * rows + reads * asking)


def _norm(hidden: int, e: int, trained: bool, kernels: Kernels) -> float:
    """Bytes a row that an RMSNorm keeps."""
    if kernels.fused_norm:
        return e * hidden + FP32
    return FP32 * hidden * (1 + trained) + FP32


def _head_norms(
    model: ModelConfig, rows: float, asking: float, e: int, tp: int, trained: bool, kernels: Kernels,
    *, reads: bool, again: bool,
) -> float:  # fmt: skip
    """Bytes that norms of queries and keys keep beside what the layer keeps without them."""
    language = model.language
    head, heads, groups = language.head_dim, language.num_attention_heads / tp, language.num_query_groups / tp
    query, key = e * head * heads, e * head * groups
    grouped, checkpointed = heads > groups > 1, again and kernels.rotates_itself
    # A checkpoint around attention keeps what it is given: no part of the product any more, but the norms' output.
    kept = asking * query + rows * key if checkpointed else 0.0
    if not kernels.fused_norm:
        kept -= rows * query * (checkpointed and grouped)  # a copy in the norm's input
        return kept + (asking * heads + rows * groups) * _norm(head, e, trained, kernels)
    kept += FP32 * (asking * heads + rows * groups)
    # The norms' inputs are views of the product, but for queries of several groups and read rows.
    kept += asking * query * ((grouped or reads) and not checkpointed)
    return kept + rows * (2 * key + query * (not reads)) * (kernels.copies_values and not checkpointed)


def _front(config: RunConfig, pack: PackShape, e: int) -> tuple[float, float]:
    """Vision tower, connector and the laying-in of image features, on the first stage; and a tower layer run again."""
    model, again = config.architecture, 0.0
    images = _own_images(config, pack)
    kept = images * kept_by_connector(config.model, model, e)
    kept += pack.image_rows * (e * model.language.hidden_size + 2 * INT64)
    if not config.language_model_is_frozen:
        kept += pack.rows * INT64
    if not config.model.freeze_ViT:
        ranks = tower_ranks(model, config.parallel)
        of_tower, again = kept_by_tower(model, e, ranks, recompute=config.recomputes_tower)
        kept += images * of_tower
        if e == FP32:  # of the pixels, which are all on every rank, its own are a view
            kept += (pack.images - images) * 3 * model.vision.image_size**2 * e
    return kept, images * again


def _own_images(config: RunConfig, pack: PackShape) -> float:
    """Views that the tensor-parallel rank with most of them runs."""
    ranks = image_ranks(config)
    return math.ceil(pack.images / ranks) if ranks > 1 else pack.images
