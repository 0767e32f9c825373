"""What one sample costs the replica that runs it, so that a step's samples can be dealt out evenly.

FLOPs as `flops.py` counts them and with what the plan (`plan.compute`) counts as repeated: of rows in the language
model and of views in the vision tower, in one unit, so that a picture of ten views weighs against a long dialogue.
Weights are for comparison alone: what grows with the number of micro-batches, padding, and the little attention that
context-parallel ranks run again are left out.
"""

from collections.abc import Callable

from hacl_megatron.assemble.parameters import layers_by_stage
from hacl_megatron.batch import PackPlan
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import Lora
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.encoding import EncodedSample
from hacl_megatron.data.packing import SampleShape, sample_shape
from hacl_megatron.training import flops
from hacl_megatron.training.flops import language_flops, lora_flops


def sample_cost(
    config: RunConfig, layout: Layout, *, forward_only: bool = False
) -> Callable[[EncodedSample, PackPlan], tuple[float, ...]] | None:
    """FLOPs of a sample, or, with a pipeline, (on its first stage, on the busiest of the others), over all tensor- and
    context-parallel ranks; None where no rank waits for another, so that nothing is to be evened out but memory.

    Args:
        forward_only: in validation and when a reference is scored.
    """
    if layout.dp * layout.pp == 1:
        return None
    count = config.architecture.language.num_layers
    layers = [number / count for number in layers_by_stage(config.parallel, count)]
    passes = 1 if forward_only else 2 if config.language_model_is_frozen else 3

    def cost(encoded: EncodedSample, plan: PackPlan) -> tuple[float, ...]:
        main = sample_shape(encoded, plan.main)
        of_layers, head = _of_layers(config, main, passes), _of_head(config, main, passes)
        if plan.ahead is not None:
            of_layers += _of_layers(config, sample_shape(encoded, plan.ahead), 1)
        shows_ahead = plan.ahead is not None and plan.ahead.images != "none"
        of_views = main.num_views * view_flops(config, forward_only=forward_only, again=shows_ahead)
        if len(layers) == 1:
            return (of_layers + head + of_views,)
        return of_layers * layers[0] + of_views, of_layers * max(layers[1:]) + head

    return cost


def view_flops(config: RunConfig, *, forward_only: bool = False, again: bool = False) -> float:
    """FLOPs of vision tower and connector over one view, over all tensor-parallel ranks.

    Args:
        again: whether it runs ahead and, what trains of it, in the main pass once more.
    """
    model = config.architecture
    tower, qformer = (
        not frozen and not forward_only for frozen in (config.model.freeze_ViT, config.model.freeze_qformer)
    )
    of_tower, of_connector = flops.view_flops(
        model, trained=tower, trains_qformer=qformer, again=again, recompute=tower and config.recomputes_tower
    )
    if not config.shares_images:  # each of the ranks that split the tower has the connector, and runs it on all views
        of_connector *= config.parallel.tensor_model_parallel_size
    return of_tower + of_connector


def row_flops(config: RunConfig) -> float:
    """FLOPs of one more row in the language model's layers, attention's scores and the last layer's savings apart."""
    language, passes = config.architecture.language, 2 if config.language_model_is_frozen else 3
    passes += config.recomputes_layers
    width = language.head_dim * (2 * language.num_query_groups + 2 * language.num_attention_heads)
    return 2.0 * passes * language.num_layers * language.hidden_size * (width + 3 * language.ffn_hidden_size)


def _of_layers(config: RunConfig, shape: SampleShape, passes: int) -> float:
    model, lengths = config.architecture, shape.lengths
    total = language_flops(model, lengths, 0, passes=passes)
    if passes > 1 and config.recomputes_layers:
        total += language_flops(model, lengths, 0, passes=1)
    if (lora := Lora.of(config.lora)) is not None:
        rows, read, count = sum(lengths.segments), sum(lengths.read), model.language.num_layers
        of_adapters = (count - 1) * lora_flops(model, lora, rows, rows) + lora_flops(model, lora, rows, read)
        total += of_adapters if passes > 1 else of_adapters / 3
    return total


def _of_head(config: RunConfig, shape: SampleShape, passes: int) -> float:
    language = config.architecture.language
    return 2.0 * shape.num_logits * language.hidden_size * language.vocab_size * passes
