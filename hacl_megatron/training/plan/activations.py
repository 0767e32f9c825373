"""What autograd keeps of one micro-batch until its backward pass: the one place that knows, op by op.

Everything is bytes on one rank. e is the bytes of an activation (2 in bf16), T the rows that autograd follows, H, F the
hidden and feed-forward width, q and k the widths of all query and key heads of this tensor-parallel rank. A LLaMA layer
keeps, for each row (`trained` terms only where the LLM trains: a frozen matrix product keeps nothing):

    norms, twice           input (eH; without a fused kernel in fp32, and trained the normalised rows too), 1/rms
    qkv product            trained: its input, eH
    rotary                 cosines and sines of queries and keys: 4 e head_dim
    attention              the product's rows e(q + 2k), rotated queries and keys e(q + k), output eq, log-sum-exp
    output product         trained: its input (the attention's output itself, or the copy of it that SDPA needs)
    gate and up product    trained: its input, eH
    SwiGLU                 its input 2eF (without a fused kernel another 2eF)
    down product           trained: its input, eF

Sequence parallelism divides the norms and the inputs of the first product of each half by the tensor-parallel size.
"""

import math
from dataclasses import dataclass

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.checks import padded_vocab_size
from hacl_megatron.config.run import RunConfig
from hacl_megatron.model.connector import connector_depth
from hacl_megatron.training.plan.parameters import layers_by_stage
from hacl_megatron.training.plan.workload import STEP, PackShape, StepRules

FP32, INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What depends on the kernels that `platform` picks."""

    fused_norm: bool
    """The norm keeps its input as it is, not an fp32 copy."""
    fused_swiglu: bool
    """megatron-core's `bias_activation_fusion`."""
    packed_attention: bool
    """One varlen kernel, whose output the next product takes as it is; else SDPA per segment and a copy."""


GPU = Kernels(fused_norm=True, fused_swiglu=True, packed_attention=True)
CPU = Kernels(fused_norm=False, fused_swiglu=False, packed_attention=False)


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
    config: RunConfig,
    model: ModelConfig,
    pack: PackShape,
    stage: int,
    *,
    kernels: Kernels = GPU,
    rules: StepRules = STEP,
) -> ActivationBytes:
    """Activations of one micro-batch on every rank of pipeline stage `stage`."""
    stages, tp = config.parallel.pipeline_model_parallel_size, config.parallel.tensor_model_parallel_size
    shard = tp if config.parallel.sequence_parallel else 1
    e = 2 if config.model.bf16 else 4
    trained = not config.model.freeze_LM
    language, rows = model.language, pack.autograd_rows
    recompute = recompute_of(config)
    layers = layers_by_stage(config.parallel, language.num_layers)[stage]
    is_first, is_last = stage == 0, stage == stages - 1

    def layer(query_rows: float, recompute: Recompute = recompute) -> float:
        return llama_layer(
            model, rows, query_rows, bytes_each=e, tp=tp, shard=shard, trained=trained, kernels=kernels,
            recompute=recompute,
        )  # fmt: skip

    full = layer(rows, Recompute())
    if recompute.granularity == "full":
        checkpoint = rows / shard * language.hidden_size * e
        if recompute.method == "block":
            recomputed = min(recompute.num_layers, layers)
            checkpoints, whole, at_once = recomputed, layers - recomputed, min(1, recomputed)
        else:
            at_once = min(recompute.num_layers, layers)
            checkpoints, whole = math.ceil(layers / recompute.num_layers), 0
        kept = checkpoints * checkpoint + whole * full + FP32 * rows * language.head_dim
        again = at_once * full
    else:
        read = rules.last_layer_read_rows_only and is_last
        kept = (layers - 1) * layer(rows) + layer(min(pack.read_rows, rows) if read else rows)
        again = full - layer(rows)
    working = again + rows * e * (3 * language.ffn_hidden_size / tp + 2 * language.hidden_size)
    logits = logits_peak = 0.0
    if is_first:
        kept += _front(config, model, pack, e)
        if recompute.granularity == "full" or kernels.fused_norm or e == FP32:
            # The first layer's input is kept as it is, and under sequence parallelism it is a view of all rows.
            kept += rows * (1 - 1 / shard) * language.hidden_size * e
        vision = model.vision
        working = max(working, pack.images * (vision.num_patches + 1) * e * (4 * vision.ffn_hidden_size / tp))
    if is_last:
        kept += rows / shard * _norm(language.hidden_size, e, trained, kernels)
        kept += INT64 * (pack.target_rows + pack.eos_rows)
        kept += pack.target_rows * (e * language.hidden_size * trained + INT64 + 1)
        kept += pack.eos_rows * (e * language.hidden_size + FP32 * (model.projection_size + 3))
        columns = pack.target_rows * padded_vocab_size(language.vocab_size, config.parallel) / tp
        logits, logits_peak = FP32 * columns, 2 * e * columns
    return ActivationBytes(kept=kept, logits=logits, logits_peak=logits_peak, working=working)


def llama_layer(
    model: ModelConfig,
    rows: float,
    query_rows: float,
    *,
    bytes_each: int,
    tp: int,
    shard: int,
    trained: bool,
    kernels: Kernels,
    recompute: Recompute,
) -> float:
    """Bytes that one layer keeps of `rows` rows, of which `query_rows` go on behind the keys and values."""
    language, e = model.language, bytes_each
    hidden, ffn = language.hidden_size, language.ffn_hidden_size / tp
    query = language.head_dim * language.num_attention_heads / tp
    key = language.head_dim * language.num_query_groups / tp
    norm = _norm(hidden, e, trained, kernels) / shard
    selected = recompute.modules if recompute.granularity == "selective" else ()
    product_input = 0 if not trained or "layernorm" in selected else e * hidden / shard

    in_front = norm + product_input + 2 * e * language.head_dim + e * (query + 2 * key) + e * key
    behind = 2 * e * language.head_dim + e * query  # rotated queries
    attention_output = e * query + FP32 * language.num_attention_heads / tp
    if "core_attn" in selected:
        attention_output = e * query if trained and kernels.packed_attention else 0
    behind += attention_output
    if trained and not kernels.packed_attention:
        behind += e * query
    mlp = (2 if kernels.fused_swiglu else 4) * e * ffn + e * ffn * trained
    if "mlp" in selected:
        mlp = e * hidden / shard * (not trained)  # the checkpoint keeps the MLP's input, which else only training does
    return rows * in_front + query_rows * (behind + norm + product_input + mlp)


def _norm(hidden: int, e: int, trained: bool, kernels: Kernels) -> float:
    """Bytes a row that an RMSNorm keeps."""
    if kernels.fused_norm:
        return e * hidden + FP32
    return FP32 * hidden * (1 + trained) + FP32


def _front(config: RunConfig, model: ModelConfig, pack: PackShape, e: int) -> float:
    """Vision tower, connector and the laying-in of image features, on the first stage."""
    vision, hidden = model.vision, model.language.hidden_size
    patches = pack.images * vision.num_patches
    kept = e * patches * (vision.hidden_size + (connector_depth(model.projector_type) - 1) * 2 * hidden)
    kept += pack.image_rows * (e * hidden + 2 * INT64)
    if not config.model.freeze_LM:
        kept += pack.rows * INT64
    if not config.model.freeze_ViT:
        tp = config.parallel.tensor_model_parallel_size
        width, ffn = vision.hidden_size, vision.ffn_hidden_size / tp
        norm = e * width + 2 * FP32
        layer = 2 * norm + 2 * e * width + (4 * e * width + FP32 * vision.num_attention_heads) / tp + 3 * e * ffn
        kept += pack.images * (vision.num_patches + 1) * (norm + model.num_vision_layers_built * layer)
        kept += pack.images * 3 * vision.image_size**2 * e
    return kept
