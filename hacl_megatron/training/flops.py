"""Arithmetic of one optimiser step, for the model-TFLOP/s tag.

Counts matrix products alone, 2 per multiply-add, as Megatron-LM does: forward once, the gradient of the input once
where anything before it trains, the gradient of the weight once where it trains. Only what a step needs is counted:
recomputation, and what gradient caching runs a second time, are not (model, not hardware, FLOPs).
"""

from collections.abc import Sequence

from hacl_megatron.batch import MicroBatch, PackedBatch, SegmentLengths
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.connectors import connector_depth
from hacl_megatron.config.lora import Lora, target_shapes


def step_flops(
    model: ModelConfig,
    micro_batches: Sequence[MicroBatch],
    *,
    trains_language_model: bool,
    trains_vision_tower: bool,
    trains_qformer: bool = False,
    lora: Lora | None = None,
) -> float:
    """FLOPs of one replica's micro-batches."""
    passes = 3 if trains_language_model else 2  # the connector before it trains always
    images = sum(batch.main.num_images for batch in micro_batches)
    total = vision_flops(model, images, trained=trains_vision_tower, trains_qformer=trains_qformer)
    for batch in micro_batches:
        total += language_flops(model, batch.main.lengths, _rows_with_logits(batch.main), passes=passes)
        if lora is not None:
            rows, read = sum(batch.main.lengths.segments), sum(batch.main.lengths.read)
            layers = model.language.num_layers
            total += (layers - 1) * lora_flops(model, lora, rows, rows) + lora_flops(model, lora, rows, read)
        if batch.ahead is not None and not batch.main.num_text_rows:
            total += language_flops(model, _text_lengths(batch.ahead), 0, passes=1)
    return total


def _rows_with_logits(batch: PackedBatch) -> int:
    return batch.num_targets + batch.rejected_rows.numel()


def _text_lengths(batch: PackedBatch) -> SegmentLengths:
    """Lengths of the captions and hallucinated captions: the last segments in front of the padding."""
    lengths = batch.lengths
    end = len(lengths.segments) - (batch.num_padding_rows > 0)
    begin = end - batch.caption_eos_rows.numel() - batch.hallucinated_eos_rows.numel()
    return SegmentLengths(
        segments=lengths.segments[begin:end], read=lengths.read[begin:end], branches=(), branch_sizes=()
    )


def language_flops(model: ModelConfig, lengths: SegmentLengths, num_targets: int, *, passes: int) -> float:
    """FLOPs of the LLaMA over one pack, with the LM head on `num_targets` rows.

    Args:
        passes: 1 forward alone, 2 with the gradients of inputs, 3 with those of weights too.
    """
    language = model.language
    head = language.head_dim
    key_value = 2 * language.hidden_size * head * language.num_query_groups
    per_read_row = language.hidden_size * (2 * head * language.num_attention_heads + 3 * language.ffn_hidden_size)
    rows, read_rows = sum(lengths.segments), sum(lengths.read)
    layers = language.num_layers
    linear = 2 * passes * (layers * rows * key_value + ((layers - 1) * rows + read_rows) * per_read_row)
    # Scores and values, 2 * 2 * width for each key that a query sees; backward costs twice the forward.
    seen_of_prefixes = sum(
        size * (length - size) for length, size in zip(lengths.branches, lengths.branch_sizes, strict=True)
    )
    seen = sum(length * (length + 1) / 2 for length in lengths.segments) + seen_of_prefixes
    seen_by_read = seen_of_prefixes + sum(
        read * (length - (read - 1) / 2) for length, read in zip(lengths.segments, lengths.read, strict=True)
    )
    width = head * language.num_attention_heads
    attention = 4 * width * ((layers - 1) * seen + seen_by_read) * (3 if passes > 1 else 1)
    lm_head = 2 * num_targets * language.hidden_size * language.vocab_size * passes
    return float(linear + attention + lm_head)


def lora_flops(model: ModelConfig, lora: Lora, rows: float, asking: float) -> float:
    """FLOPs of one layer's adapters over `rows`, of which `asking` go on behind keys and values; all three passes."""
    shapes = target_shapes(model.language)
    return sum(
        2 * 3 * (rows if target in ("k_proj", "v_proj") else asking) * lora.rank * sum(shapes[target])
        for target in lora.targets
    )


def vision_flops(model: ModelConfig, num_images: int, *, trained: bool, trains_qformer: bool = False) -> float:
    """FLOPs of the vision tower (`trained` or not) and connector over `num_images` images."""
    tower = tower_flops(model) * (3 if trained else 1)
    hidden = model.language.hidden_size
    if model.qformer is None:
        width, depth = model.vision.hidden_size, connector_depth(model.projector_type)
        connector = 2 * model.vision.num_features * (width * hidden + (depth - 1) * hidden * hidden) * 3
        return float(num_images * (tower + connector))
    queries, keys, attention = qformer_flops(model)
    before = trained or trains_qformer  # something in front of the projection, so that it has a gradient to hand on
    connector = queries * (1 + before + trains_qformer) + keys * (1 + trained + trains_qformer)
    connector += attention * (3 if before else 1)
    connector += 2 * model.qformer.num_query_tokens * model.qformer.hidden_size * hidden * (2 + before)
    return float(num_images * (tower + connector))


def view_flops(
    model: ModelConfig, *, trained: bool, trains_qformer: bool, again: bool = False, recompute: bool = False
) -> tuple[float, float]:
    """FLOPs of one view in the vision tower and in the connector.

    Args:
        again: whether it runs ahead and, what trains of it or stands behind that, in the main pass once more.
        recompute: whether backward runs the tower's layers once more.
    """
    tower = tower_flops(model) * (3 if trained else 1)
    connector = vision_flops(model, 1, trained=trained, trains_qformer=trains_qformer) - tower
    tower += recompute * (tower_flops(model) - _patch_flops(model))
    if again:
        tower += trained * tower_flops(model)
        connector += (trained or trains_qformer) * sum(qformer_flops(model))
    return tower, connector


def tower_flops(model: ModelConfig) -> float:
    """Forward pass of the vision tower over one image."""
    vision = model.vision
    rows = vision.sequence_length
    layer = 2 * rows * (4 * vision.hidden_size**2 + (2 + vision.is_gated) * vision.hidden_size * vision.ffn_hidden_size)
    attention = 4 * rows * rows * vision.hidden_size
    return float(model.num_vision_layers_built * (layer + attention)) + _patch_flops(model)


def _patch_flops(model: ModelConfig) -> float:
    """Of the patches' convolution."""
    vision = model.vision
    return 2.0 * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size


def qformer_flops(model: ModelConfig) -> tuple[float, float, float]:
    """Forward pass of a Q-Former over one image, 0 without one: products over queries, keys and values of the tower's
    features, and scores and values of attention."""
    if model.qformer is None:
        return 0.0, 0.0, 0.0
    facts, queries, width = model.qformer.hf, model.qformer.num_query_tokens, model.qformer.hidden_size
    layers, features = facts["num_hidden_layers"], model.vision.num_features
    crossing = -(-layers // facts["cross_attention_frequency"])  # the first layer and every so many behind it
    rows = 2 * queries * (layers * (4 * width**2 + 2 * width * facts["intermediate_size"]) + crossing * 2 * width**2)
    keys = 2 * features * crossing * 2 * model.vision.hidden_size * width
    return float(rows), float(keys), float(4 * queries * width * (layers * queries + crossing * features))
