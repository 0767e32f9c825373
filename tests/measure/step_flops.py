"""Arithmetic that a step needs, for `measure_step.py`: matrix products alone, 2 per multiply-add.

One convention for both sides. Forward once; the gradient of an input once where something before it trains; the
gradient of a weight once where it trains. Attention is causal: half of the square, and twice the forward in the
backward pass (what a fused kernel computes again is its own affair, as any recomputation). Norms, activations, rotary
embeddings, softmax and the contrastive similarities are not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.connectors import connector_depth

FEATURES = ("text without autograd", "last layer for read rows", "shared prefix")
"""What this package's step leaves out: the backward pass of texts where the LLM is frozen; queries, output and MLP of
the last layer on rows that nothing reads; the image a second time with the `prompt` context."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Rows that go through the LLM together or alike; padding counts as rows."""

    rows: int
    """Rows of each sequence that are computed."""
    read: int
    """Rows of each whose last hidden state is used."""
    has_image: bool
    """Whether a gradient goes back through it even if the LLM is frozen."""
    prefix: int = 0
    """Rows that each attends to beside its own and that another sequence computes."""
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The samples of a micro-batch in tokens; all have an image behind `image_begin` rows of the dialogue."""

    dialogues: Sequence[int]
    targets: Sequence[int]
    """Target rows of each dialogue."""
    captions: Sequence[int]
    """Rows of the caption segments, BOS and EOS included."""
    hallucinated: Sequence[int]
    image_begin: int
    visual: int


def plain_flops(model: ModelConfig, lengths: Lengths, *, prompt: bool, trained: bool) -> dict[str, float]:
    """FLOPs of `tests/reference_hacl.py` by part: padded passes, every row through every layer and the LM head."""
    images = len(lengths.dialogues)
    image_rows = lengths.visual + 1 + (lengths.image_begin if prompt else 0)
    longest = max(lengths.dialogues)
    passes = [
        Sequences(rows=longest, read=longest, has_image=True, count=images),
        Sequences(rows=image_rows, read=image_rows, has_image=True, count=images),
    ]
    for texts in (lengths.captions, lengths.hallucinated):
        if texts:
            passes.append(Sequences(rows=max(texts), read=max(texts), has_image=False, count=len(texts)))
    return {
        **_vision_flops(model, images, model.vision.num_layers),
        **_language_flops(model, passes, trained=trained, text_backward=trained, only_read=False),
        "LM head": _lm_head_flops(model, images * longest, trained),
        "heads": _heads_flops(model, images, len(lengths.captions) + len(lengths.hallucinated), trained),
    }


def package_flops(
    model: ModelConfig, lengths: Lengths, *, prompt: bool, trained: bool, without: Iterable[str] = ()
) -> dict[str, float]:
    """FLOPs that this package's step needs, by part, `without` some of `FEATURES`."""
    left_out = set(without)
    assert left_out <= set(FEATURES), left_out
    images = len(lengths.dialogues)
    dialogues = [
        Sequences(rows=rows, read=targets, has_image=True)
        for rows, targets in zip(lengths.dialogues, lengths.targets, strict=True)
    ]
    before = lengths.image_begin if prompt else 0
    if prompt and "shared prefix" not in left_out:
        ends = Sequences(rows=1, read=1, has_image=True, prefix=before + lengths.visual, count=images)
    else:
        ends = Sequences(rows=before + lengths.visual + 1, read=1, has_image=True, count=images)
    texts = [Sequences(rows=rows, read=1, has_image=False) for rows in (*lengths.captions, *lengths.hallucinated)]
    return {
        **_vision_flops(model, images, model.num_vision_layers_built),
        **_language_flops(
            model,
            [*dialogues, ends, *texts],
            trained=trained,
            text_backward=trained or "text without autograd" in left_out,
            only_read="last layer for read rows" not in left_out,
        ),
        "LM head": _lm_head_flops(model, sum(lengths.targets), trained),
        "heads": _heads_flops(model, images, len(texts), trained or "text without autograd" in left_out),
    }


def _vision_flops(model: ModelConfig, images: int, layers: int) -> dict[str, float]:
    vision, hidden = model.vision, model.language.hidden_size
    rows = vision.num_patches + 1
    layer = 2 * rows * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size)
    attention = 4 * rows * rows * vision.hidden_size
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
    first = 2 * vision.num_patches * vision.hidden_size * hidden
    others = 2 * vision.num_patches * hidden * hidden * (connector_depth(model.projector_type) - 1)
    return {
        "vision matrices": float(images * (layers * layer + patches)),
        "vision attention": float(images * layers * attention),
        "connector": float(images * (2 * first + 3 * others)),  # nothing before it trains
    }


def _language_flops(
    model: ModelConfig, passes: Iterable[Sequences], *, trained: bool, text_backward: bool, only_read: bool
) -> dict[str, float]:
    language = model.language
    width = language.head_dim * language.num_attention_heads
    keys_values = language.hidden_size * language.head_dim * 2 * language.num_query_groups
    rest = 2 * language.hidden_size * width + 3 * language.hidden_size * language.ffn_hidden_size
    linear, attention = 0.0, 0.0
    for part in passes:
        backward = part.has_image or text_backward
        rows = part.rows * language.num_layers
        read = part.read if only_read else part.rows
        last = 2 * (part.rows * keys_values + read * rest)
        all_but_last = 2 * (rows - part.rows) * (keys_values + rest)
        linear += part.count * (all_but_last + last) * (1 + backward + trained)
        square = part.rows * (part.rows / 2 + part.prefix)
        last_square = part.read * (part.rows + part.prefix) if only_read else square
        pairs = (language.num_layers - 1) * square + min(last_square, square)
        attention += part.count * 4 * pairs * width * (1 + 2 * backward)
    return {"LLM matrices": float(linear), "LLM attention": float(attention)}


def _heads_flops(model: ModelConfig, images: int, texts: int, trained: bool) -> float:
    head = 2.0 * model.language.hidden_size * model.projection_size
    return head * (3 * images + (3 if trained else 2) * texts)


def _lm_head_flops(model: ModelConfig, rows: int, trained: bool) -> float:
    return 2.0 * rows * model.language.hidden_size * model.language.vocab_size * (3 if trained else 2)
