"""What a tokenizer makes of samples: how many rows their segments will take, and which of them will train nothing.

The numbers are those of `hacl_megatron.data.encoding.encode` with one row for an image and nothing cut.
"""

from collections.abc import Sequence

from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, checked_dialogue, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.templates import find_template
from hacl_megatron.data.tokenizer import Tokenizer

TokenCounts = tuple[int | None, int | None, int | None]
"""Tokens of dialogue, caption and all hallucinated captions; None where there is no such segment."""


def count_tokens(samples: Sequence[Sample], tokenizer: Tokenizer, version: str) -> list[TokenCounts]:
    """Token counts of each sample; a sample that cannot be used has none."""
    template = find_template(version)
    texts: list[str] = []
    plans: list[tuple[int, int, int] | None] = []
    for sample in samples:
        try:
            pieces = template.pieces(checked_dialogue(sample), tokenizer)
            parts = [piece.content for piece in pieces if isinstance(piece.content, str)]
            captions = [sample.caption, *sample.hallucinated_captions] if sample.image and sample.caption else []
            for text in (*parts, *captions):
                text.encode("utf-8")  # a lone surrogate would fail the whole batch
        except (UnusableSample, UnicodeError):
            plans.append(None)
            continue
        texts += [*parts, *captions]
        plans.append((len(parts), len(pieces) - len(parts), len(captions)))

    lengths = iter(tokenizer.count(texts))
    counts: list[TokenCounts] = []
    for plan in plans:
        if plan is None:
            counts.append((None, None, None))
            continue
        num_parts, others, num_captions = plan
        # LLaVA pads with <unk> and takes padding out: a written "<unk>" is no row of the dialogue.
        dialogue = others + sum(total - unknown for total, unknown in _take(lengths, num_parts))
        captions = [total + 1 + (tokenizer.bos_id is not None) for total, _ in _take(lengths, num_captions)]
        counts.append((dialogue, captions[0], sum(captions[1:])) if captions else (dialogue, None, None))
    return counts


def untrained_kinds(
    samples: Sequence[Sample], counts: Sequence[TokenCounts], tokenizer: Tokenizer, settings: EncodingSettings
) -> list[str | None]:
    """Why each sample will train nothing, as a run of these settings says; None for one that will, or is unusable.

    Args:
        counts: of the samples, by `count_tokens`.
    """
    finds_labels = find_template(settings.version).find_labels is not None
    kinds: list[str | None] = []
    for sample, (dialogue, caption, _) in zip(samples, counts, strict=True):
        kind = None
        if dialogue is not None and caption is None:
            rows = dialogue + len(sample.images) * (settings.image_layout.visual_tokens - 1)
            if finds_labels or rows > settings.model_max_length:
                try:
                    kind = encode(sample, tokenizer, settings).untrained
                except UnusableSample:
                    kind = f"its image does not fit into --model-max-length {settings.model_max_length}"
        kinds.append(kind)
    return kinds


def _take(lengths, count: int) -> list[tuple[int, int]]:
    return [next(lengths) for _ in range(count)]
