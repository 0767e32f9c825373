"""How many rows a sample's segments will take, counted for thousands of samples at once.

The numbers are those of `hacl_megatron.data.encoding.encode` with one row for an image and nothing cut.
"""

from collections.abc import Sequence

from hacl_megatron.config.flags import TemplateName
from hacl_megatron.data.encoding import UnusableSample, _checked_turns, _rounds, minigpt4_pieces, v1_prompt
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.prepare.llava_json import IMAGE_TAG
from hacl_megatron.data.tokenizer import Tokenizer

TokenCounts = tuple[int | None, int | None, int | None]
"""Tokens of dialogue, caption and all hallucinated captions; None where there is no such segment."""


def count_tokens(samples: Sequence[Sample], tokenizer: Tokenizer, version: TemplateName) -> list[TokenCounts]:
    """Token counts of each sample; a sample that cannot be used has none."""
    texts: list[str] = []
    plans: list[tuple[int, int, int] | None] = []
    for sample in samples:
        try:
            parts, others = _dialogue_parts(sample, tokenizer.eos_token, version)
            captions = [sample.caption, *sample.hallucinated_captions] if sample.image and sample.caption else []
            for text in (*parts, *captions):
                text.encode("utf-8")  # a lone surrogate would fail the whole batch
        except (UnusableSample, UnicodeError):
            plans.append(None)
            continue
        texts += [*parts, *captions]
        plans.append((len(parts), others, len(captions)))

    lengths = iter(tokenizer.count(texts))
    counts: list[TokenCounts] = []
    for plan in plans:
        if plan is None:
            counts.append((None, None, None))
            continue
        num_parts, others, num_captions = plan
        # LLaVA pads with <unk> and takes padding out: a written "<unk>" is no row of the dialogue.
        dialogue = 1 + others + sum(total - unknown for total, unknown in _take(lengths, num_parts))
        captions = [total + 2 for total, _ in _take(lengths, num_captions)]
        counts.append((dialogue, captions[0], sum(captions[1:])) if captions else (dialogue, None, None))
    return counts


def _take(lengths, count: int) -> list[tuple[int, int]]:
    return [next(lengths) for _ in range(count)]


def _dialogue_parts(sample: Sample, eos_token: str, version: TemplateName) -> tuple[list[str], int]:
    """The texts around the image that `encoding.encode` tokenizes, and its rows beside them and the first BOS.

    Raises UnusableSample where it does.
    """
    turns = _checked_turns(sample)
    has_image = sample.image is not None
    if version == "plain":
        if not has_image or len(turns) != 2 or IMAGE_TAG in turns[1][1]:
            raise UnusableSample("not for the plain template")
        return [f"{turns[1][1]}\n"], 1
    if version == "minigpt4":
        pieces = minigpt4_pieces(turns, has_image=has_image)
        texts = [text for text, _ in pieces if not has_image or text != IMAGE_TAG]
        later_rounds = max(sum(role == "human" for role, _ in _rounds(turns)) - 1, 0)
        return texts, len(pieces) - len(texts) + later_rounds
    prompt = v1_prompt(_rounds(turns), eos_token)
    parts = prompt.split(IMAGE_TAG) if has_image else [prompt]
    return parts, len(parts) - 1
