"""What stands in front of the LLM: what autograd keeps of an image there, and what tensor-parallel ranks send.

F is the features an image that the tower hands on, h its width, V the query tokens of a Q-Former, q its width, L its
layers and C those of them that attend to the image. A Q-Former keeps (a row a query, but for keys and values), where
anything up to its output trains:

    norms              their inputs, (2L + C) q, and mean and 1/std of each
    attention          queries, keys and values 3Lq, queries behind the image's Cq, its keys and values 2CFq, outputs
                       (L + C)q and log-sum-exps
    feed-forward       GELU's input, and trained its output: L ffn each
    products           trained: inputs (2L + C)q, and once the features, Fh
    projection         its input, q

A frozen one behind a trained tower has no gradient in the first layer's self-attention, whose queries are constants.
"""

from collections.abc import Iterable

from hacl_megatron.assemble.parameters import PlannedParameter
from hacl_megatron.config.architecture import ModelConfig, QFormerConfig
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.flags import ModelFlags
from hacl_megatron.config.run import RunConfig
from hacl_megatron.plan.workload import MicroBatchShape

FP32 = 4


def image_ranks(config: RunConfig) -> int:
    """Tensor-parallel ranks that share out the images of a pack."""
    return config.parallel.tensor_model_parallel_size if config.shares_images else 1


def sent_for_images(
    config: RunConfig, micro_batch: MicroBatchShape, parameters: Iterable[PlannedParameter], bytes_each: int
) -> tuple[float, float]:
    """Bytes that a tensor-parallel rank of the first stage sends for images: of a micro-batch, and once a step.

    A tower that is split sums what each layer's attention and MLP give, forward and, trained, backward; shared out, the
    connector's output is gathered forward, and in the end gradients of tower and connector are summed.
    """
    model, parallel = config.architecture, config.parallel
    ring = 1 - 1 / parallel.tensor_model_parallel_size
    images, trained = micro_batch.main.images / parallel.context_parallel_size, not config.model.freeze_ViT
    runs_ahead = micro_batch.ahead is not None and micro_batch.ahead.image_rows > 0
    if config.shares_images:
        gathered = images * model.visual_tokens * model.language.hidden_size * bytes_each
        summed = FP32 * sum(p.numel for p in parameters if p.trained and p.part in ("vision_tower", "connector"))
        return gathered * (1 + runs_ahead) * ring, 2 * summed * ring
    if model.vision.backend == "hf":
        return 0.0, 0.0
    rows = images * model.vision.sequence_length * model.vision.hidden_size * bytes_each
    passes = 1 + trained * (1 + runs_ahead) + config.recomputes_tower
    return model.num_vision_layers_built * 2 * passes * 2 * rows * ring, 0.0


def features_for_a_second_pass(flags: ModelFlags, model: ModelConfig) -> int:
    """Numbers an image that are kept between a pass ahead and the main one; 0 where the tower trains and runs twice."""
    if not flags.freeze_ViT:
        return 0
    if model.qformer is not None and flags.freeze_qformer:
        return model.qformer.num_query_tokens * model.qformer.hidden_size
    return model.vision.num_features * model.vision.hidden_size


def kept_by_connector(flags: ModelFlags, model: ModelConfig, bytes_each: int) -> float:
    """Bytes an image that autograd keeps between the tower's output and the LLM's input."""
    e, vision, qformer = bytes_each, model.vision, model.qformer
    features = e * vision.num_features * vision.hidden_size
    if qformer is None:
        hidden = model.language.hidden_size
        return features + e * vision.num_features * (connector_depth(model.projector_type) - 1) * 2 * hidden
    queries = qformer.num_query_tokens
    projected = e * queries * qformer.hidden_size
    if flags.freeze_ViT and flags.freeze_qformer:
        return projected
    return (
        projected
        + _kept_by_qformer(qformer, vision.num_features, e, trained=not flags.freeze_qformer)
        + (0 if flags.freeze_qformer else features)
    )


def _kept_by_qformer(qformer: QFormerConfig, num_features: int, e: int, *, trained: bool) -> float:
    width, facts = qformer.hidden_size, qformer.hf
    layers, ffn, heads = facts["num_hidden_layers"], facts["intermediate_size"], facts["num_attention_heads"]
    crossing = -(-layers // facts["cross_attention_frequency"])
    attending = layers if trained else layers - 1
    norms = attending + layers + crossing
    row = e * width * (norms + 4 * attending + 2 * crossing) + e * ffn * layers * (1 + trained)
    row += trained * e * width * (2 * layers + crossing)
    row += 2 * FP32 * (norms + trained) + FP32 * heads * (attending + crossing)
    return qformer.num_query_tokens * row + 2 * e * crossing * num_features * width


def kept_by_tower(model: ModelConfig, bytes_each: int, tp: int, *, recompute: bool) -> tuple[float, float]:
    """Bytes an image that autograd keeps of a trained tower, its output apart, and those of a layer that runs again.

    Args:
        tp: ranks that divide its matrices.
        recompute: of each layer nothing but its input is kept.
    """
    vision, e = model.vision, bytes_each
    activation = vision.activation
    if vision.hf is not None:
        activation = vision.hf.get(vision.kind.traits["activation"], "gelu")
    width, ffn = vision.hidden_size, vision.ffn_hidden_size / tp
    norm = e * width + 2 * FP32
    of_ffn = 3 if activation == "quick_gelu" or vision.hf is None else 2  # quick GELU keeps its sigmoid too
    if vision.is_gated:
        of_ffn = 4  # gate, its SiLU, what that is multiplied with, the product
    layer = 2 * norm + (2 + vision.kind.layer_scales) * e * width + of_ffn * e * ffn
    layer += (4 * e * width + FP32 * vision.num_attention_heads) / tp
    of_layers = model.num_vision_layers_built * (e * width if recompute else layer)
    rows = vision.sequence_length * (vision.kind.num_outer_norms * norm + of_layers)
    return rows + 3 * vision.image_size**2 * e, vision.sequence_length * layer * recompute
