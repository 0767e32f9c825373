"""What a tokenizer makes of samples: how many rows their segments will take, and which of them will train nothing.

The numbers are those of `hacl_megatron.data.encoding.encode` with one row for each image and nothing cut.
"""

from collections.abc import Sequence

from hacl_megatron.data.encoding import EncodingSettings, UnusableSample, checked_dialogue, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.templates import find_template
from hacl_megatron.data.tokenizer import Tokenizer

TokenCounts = tuple[int | None, int | None, int | None]
"""Tokens of dialogue, all captions and all hallucinated captions; None where there is no such segment."""


def count_tokens(samples: Sequence[Sample], tokenizer: Tokenizer, version: str) -> list[TokenCounts]:
    """Token counts of each sample; a sample that cannot be used has none."""
    template = find_template(version)
    texts: list[str] = []
    plans: list[tuple[int, int, list[int]] | None] = []
    for sample in samples:
        try:
            pieces = template.pieces(checked_dialogue(sample), tokenizer)
            parts = [piece.content for piece in pieces if isinstance(piece.content, str)]
            pairs = [[pair.caption, *pair.hallucinated] for pair in sample.pairs]
            captions = [caption for pair in pairs for caption in pair]
            for text in (*parts, *captions):
                text.encode("utf-8")  # a lone surrogate would fail the whole batch
        except (UnusableSample, UnicodeError):
            plans.append(None)
            continue
        texts += [*parts, *captions]
        plans.append((len(parts), len(pieces) - len(parts), [*map(len, pairs)]))

    lengths = iter(tokenizer.count(texts))
    counts: list[TokenCounts] = []
    for plan in plans:
        if plan is None:
            counts.append((None, None, None))
            continue
        num_parts, others, of_pairs = plan
        # LLaVA pads with <unk> and takes padding out: a written "<unk>" is no row of the dialogue.
        dialogue = others + sum(total - unknown for total, unknown in _take(lengths, num_parts))
        pairs = [
            [total + 1 + (tokenizer.bos_id is not None) for total, _ in _take(lengths, number)] for number in of_pairs
        ]
        captions, wrong = sum(pair[0] for pair in pairs), sum(sum(pair[1:]) for pair in pairs)
        counts.append((dialogue, captions, wrong) if pairs else (dialogue, None, None))
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
                    fits = "image does" if len(sample.images) == 1 else "images do"
                    kind = f"its {fits} not fit into --model-max-length {settings.model_max_length}"
        kinds.append(kind)
    return kinds


def _take(lengths, count: int) -> list[tuple[int, int]]:
    return [next(lengths) for _ in range(count)]
