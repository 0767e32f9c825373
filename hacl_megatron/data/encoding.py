"""Samples as token rows: LLaVA-1.5's and MiniGPT-4's templates, and the contrastive segments beside them.

    plain      <s> image* answer \\n                                          target: everything behind the image
    v1         <s> system USER: image* \\n question ASSISTANT: answer </s> USER: ...   target: answers with their </s>
    minigpt4   <s> ###Human: <Img>image*</Img> question ###Assistant: answer ###     target: answers with their ###

The first two follow llava/train/train.py (`preprocess_multimodal`, `preprocess_plain`, `preprocess_v1`),
llava/mm_utils.py (`tokenizer_image_token`) and llava/model/llava_arch.py (expansion of the image, truncation behind it)
token for token, also where that code is odd: a message's blanks are stripped only if it holds the image tag, an empty
answer loses its separator, and a dialogue whose rounds do not tokenize to the length of the whole loses all its labels.
The third follows minigpt4/models/minigpt_base.py and train_configs/minigpt4_stage2_finetune.yaml: every piece around
the image and every answer is tokenized on its own. MiniGPT-4's first stage has no prompt: its rows are `plain`'s.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hacl_megatron.config.flags import TemplateName
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.manifest import IMAGE_TAG, Sample
from hacl_megatron.data.tokenizer import Tokenizer

IMAGE = -1
"""Stands in token rows for a row that takes an image feature."""
IGNORE = -100
"""Label of a token that is not trained on."""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of LLaVA's `conv_vicuna_v1`."""
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
SEPARATOR = " "
ANSWER_MARK = f"{SEPARATOR}{ROLES['gpt']}: "


class UnusableSample(ValueError):
    """This sample cannot be used; its message is the reason for `bad_samples.jsonl`. The run goes on."""


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What besides the tokenizer decides how a sample becomes rows."""

    version: TemplateName
    """Conversation template (`--version`)."""
    model_max_length: int
    """Longest segment in rows, counted after the image is expanded (`--model-max-length`)."""
    visual_tokens: int
    """V: rows that one image takes."""
    image_context: Literal["image", "prompt"] = "image"
    """What precedes the image's EOS (`--contrastive-image-context`)."""

    @classmethod
    def of(cls, config: RunConfig) -> "EncodingSettings":
        """As a run of this configuration encodes."""
        return cls(
            version=config.data.version,
            model_max_length=config.data.model_max_length,
            visual_tokens=config.architecture.visual_tokens,
            image_context=config.objective.contrastive_image_context,
        )


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """The segments of one sample. Rows are int64 arrays of token ids, `IMAGE` where an image feature goes."""

    dialogue: np.ndarray
    """[L] rows of the conversation, BOS first."""
    labels: np.ndarray
    """[L]: the token at the same position where it is trained on, else `IGNORE` (no shift, as in LLaVA)."""
    has_image: bool
    """Whether the sample has an image, which the packer then expects among the pixels."""
    image_segment: np.ndarray | None
    """[image rows, EOS], behind the dialogue's prefix with `image_context="prompt"`; None without a pair."""
    caption_segment: np.ndarray | None
    """[BOS, caption, EOS]; None without a pair."""
    hallucinated_segments: tuple[np.ndarray, ...]
    """[BOS, hallucinated caption, EOS] each; none without a pair."""
    caption_key: int | None
    """`rows_key` of the caption segment; None without a pair."""
    hallucinated_keys: tuple[int, ...]
    """`rows_key` of each hallucinated segment."""
    truncated: bool
    """Whether the dialogue was cut at `model_max_length`."""
    tokenization_mismatch: bool
    """Whether LLaVA's mismatch rule took all labels away."""


def encode(sample: Sample, tokenizer: Tokenizer, settings: EncodingSettings) -> EncodedSample:
    """The token rows of a sample's up to four segments. Raises UnusableSample with the reason if there are none."""
    turns = _checked_turns(sample)
    try:
        ids, labels, mismatch = _TEMPLATES[settings.version](
            turns, tokenizer, has_image=sample.image is not None, model_max_length=settings.model_max_length
        )
        captions = [] if sample.caption is None else [sample.caption, *sample.hallucinated_captions]
        segments = [_caption_segment(caption, tokenizer, settings) for caption in captions]
    except UnicodeError as error:
        raise UnusableSample(f"text does not tokenize: {error}") from error
    rows, labels = _expand_image(ids, labels, tokenizer, settings)
    image_segment = None
    if sample.image is None:
        segments = []  # a caption needs an image to make a pair
    elif segments:
        image_segment = _image_segment(rows, tokenizer, settings)
    keys = [rows_key(segment) for segment in segments]
    limit = settings.model_max_length
    return EncodedSample(
        dialogue=rows[:limit],
        labels=labels[:limit],
        has_image=sample.image is not None,
        image_segment=image_segment,
        caption_segment=segments[0] if segments else None,
        hallucinated_segments=tuple(segments[1:]),
        caption_key=keys[0] if keys else None,
        hallucinated_keys=tuple(keys[1:]),
        truncated=len(rows) > limit,
        tokenization_mismatch=mismatch,
    )


def rows_key(rows: np.ndarray) -> int:
    """64-bit blake2b of token ids as a signed integer: equal rows, equal keys, on every machine."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _checked_turns(sample: Sample) -> list[tuple[str, str]]:
    """The turns, known to be strings with at most one image tag, as `preprocess_multimodal` leaves them.

    With an image, the tag is moved to the front of its message, on a line of its own. Without one, `<image>` is text.
    """
    if not sample.conversations:
        raise UnusableSample("the dialogue has no turns")
    for number, (role, value) in enumerate(sample.conversations):
        if not isinstance(value, str):
            raise UnusableSample(f"the value of turn {number} is no string but {type(value).__name__}")
        if not isinstance(role, str) or role not in ROLES:
            raise UnusableSample(f"turn {number} is from {role!r}, expected 'human' or 'gpt'")
    turns = list(sample.conversations)
    if sample.image is None:
        return turns
    num_tags = sum(value.count(IMAGE_TAG) for _, value in turns)
    if num_tags > 1:
        raise UnusableSample(f"{num_tags} {IMAGE_TAG} tags; several images a sample are not supported yet")
    for number, (role, value) in enumerate(turns):
        if IMAGE_TAG in value:
            turns[number] = (role, f"{IMAGE_TAG}\n{value.replace(IMAGE_TAG, '').strip()}".strip())
    return turns


Template = tuple[list[int], list[int], bool]
"""Token ids with one `IMAGE` per image, labels of the same length, whether the mismatch rule struck."""


def encode_plain(
    turns: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, has_image: bool, model_max_length: int
) -> Template:
    """LLaVA's `preprocess_plain`: image, answer, newline; the question is left out. Targets follow the image."""
    if not has_image:
        raise UnusableSample("the plain template needs an image; train on text-only samples with --version v1")
    if len(turns) != 2:
        raise UnusableSample(f"the plain template takes one question and one answer, found {len(turns)} turns")
    answer = turns[1][1]
    if IMAGE_TAG in answer:
        raise UnusableSample(f"the plain template takes the {IMAGE_TAG} tag in the question, found it in the answer")
    ids = encode_with_image(f"{IMAGE_TAG}{answer}\n", tokenizer)
    return ids, [IGNORE, IGNORE, *ids[2:]], False


def encode_v1(
    turns: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, has_image: bool, model_max_length: int
) -> Template:
    """LLaVA's `preprocess_v1`: Vicuna's dialogue; targets are the answers, each with the EOS behind it.

    Rounds are tokenized once more on their own to find where answers begin, as LLaVA does, with its two corrections:
    a round's instruction ends in a space that belongs to the answer's first token, and a round behind `</s>` has no
    dummy space unless the tokenizer is `legacy`, so it is taken to be one token shorter (true of Vicuna's vocabulary,
    where "▁USER" is two pieces and "USER" is one). Where the sum misses the dialogue's length all labels are ignored,
    unless it reaches `model_max_length`.
    """
    turns = _rounds(turns)
    prompt = v1_prompt(turns, tokenizer.eos_token)

    def tokenize(text: str) -> list[int]:
        return encode_with_image(text, tokenizer) if has_image else tokenizer.encode(text, bos=True)

    ids = tokenize(prompt)
    labels = list(ids)
    labels[0] = IGNORE
    begin = 1
    for number, text in enumerate(prompt.split(tokenizer.eos_token)):
        parts = text.split(ANSWER_MARK)
        if len(parts) != 2:  # behind the last EOS, or a round without exactly one answer
            break
        # BOS of the round's own tokenization stands for the EOS that ends it.
        round_length = len(tokenize(text))
        instruction_length = len(tokenize(parts[0] + ANSWER_MARK)) - 2
        if number > 0 and not tokenizer.legacy:
            round_length -= 1
            instruction_length -= 1
        end = min(begin + instruction_length, len(labels))
        labels[begin:end] = [IGNORE] * (end - begin)
        begin += round_length
    labels[begin:] = [IGNORE] * len(labels[begin:])
    # LLaVA counts what is not padding, and pads with <unk>; it cuts text-only dialogues before, others after this.
    counted = ids if has_image else ids[:model_max_length]
    mismatch = begin < model_max_length and begin != sum(token != tokenizer.unk_id for token in counted)
    return ids, [IGNORE] * len(ids) if mismatch else labels, mismatch


def encode_minigpt4(
    turns: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, has_image: bool, model_max_length: int
) -> Template:
    """MiniGPT-4's dialogue; targets are the answers, each with the `###` that ends it (no EOS, as released).

    Later rounds begin with a BOS of their own, as in its `tokenize_conversation`. A single question without words gets
    no prompt, as in its first stage.
    """
    ids, labels = [tokenizer.bos_id], [IGNORE]
    for text, is_answer in minigpt4_pieces(turns, has_image=has_image):
        new = [IMAGE] if text == IMAGE_TAG and has_image else tokenizer.encode(text, bos=False)
        if text.startswith(_HUMAN) and not is_answer and len(ids) > 1:
            new = [tokenizer.bos_id, *new]
        ids += new
        labels += new if is_answer else [IGNORE] * len(new)
    return ids, labels, False


_HUMAN, _ASSISTANT, MINIGPT4_END = "###Human: ", " ###Assistant: ", "###"


def minigpt4_pieces(turns: Sequence[tuple[str, str]], *, has_image: bool) -> list[tuple[str, bool]]:
    """The texts that `encode_minigpt4` tokenizes each on its own, `IMAGE_TAG` among them, and whether they are targets.

    Raises UnusableSample for a dialogue that does not fit the template.
    """
    turns = _rounds(turns)
    if has_image and len(turns) == 2 and turns[0][1] == IMAGE_TAG:
        if IMAGE_TAG in turns[1][1]:
            raise UnusableSample(f"the template takes the {IMAGE_TAG} tag in a question, found it in the answer")
        return [(IMAGE_TAG, False), (f"{turns[1][1]}\n", True)]
    pieces: list[tuple[str, bool]] = []
    for role, value in turns:
        if role == "gpt":
            if has_image and IMAGE_TAG in value:
                raise UnusableSample(f"the template takes the {IMAGE_TAG} tag in a question, found it in an answer")
            # Without an answer it is the prompt that an answer is to be generated for.
            pieces += [(value + MINIGPT4_END, True)] if value else []
        elif has_image and value.startswith(IMAGE_TAG):
            question = value.removeprefix(IMAGE_TAG).strip()
            pieces += [(f"{_HUMAN}<Img>", False), (IMAGE_TAG, False), (f"</Img> {question}{_ASSISTANT}", False)]
        else:
            pieces.append((f"{_HUMAN}{value}{_ASSISTANT}", False))
    return pieces


def _rounds(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns from the first human one on, known to alternate."""
    turns = list(turns[1:] if turns[0][0] != "human" else turns)
    if not turns:
        raise UnusableSample("the dialogue has no human turn")
    for number, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            raise UnusableSample(f"human and gpt do not take turns: turn {number} is from {role!r}")
    return turns


_TEMPLATES = {"plain": encode_plain, "v1": encode_v1, "minigpt4": encode_minigpt4}
PREFIXES = {"plain": "", "v1": f"{SYSTEM}{SEPARATOR}{ROLES['human']}: ", "minigpt4": f"{_HUMAN}<Img>"}
"""Template -> what stands between BOS and an image in the first question."""


def v1_prompt(turns: Sequence[tuple[str, str]], eos_token: str) -> str:
    """The text of a dialogue: LLaVA's `conv_vicuna_v1.get_prompt()` (llava/conversation.py, SeparatorStyle.TWO)."""
    text = SYSTEM + SEPARATOR
    for role, value in turns:
        # An empty message loses its separator, as in LLaVA.
        text += f"{ROLES[role]}: {value}{SEPARATOR if role == 'human' else eos_token}" if value else f"{ROLES[role]}:"
    return text


def encode_with_image(text: str, tokenizer: Tokenizer) -> list[int]:
    """LLaVA's `tokenizer_image_token`: the parts around `<image>` tokenized each on its own, `IMAGE` between them."""
    ids = [tokenizer.bos_id]
    for number, part in enumerate(text.split(IMAGE_TAG)):
        ids += [IMAGE] * (number > 0) + tokenizer.encode(part, bos=False)
    return ids


def _expand_image(
    ids: list[int], labels: list[int], tokenizer: Tokenizer, settings: EncodingSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels with V rows for the image; raises UnusableSample if they do not fit."""
    rows, row_labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    # A "<unk>" written in a text looks like padding to LLaVA, which takes padding out before it expands the image.
    if tokenizer.unk_id is not None:
        kept = rows != tokenizer.unk_id
        rows, row_labels = rows[kept], row_labels[kept]
    if IMAGE in ids:
        at = int(np.argmax(rows == IMAGE))
        end = at + settings.visual_tokens
        if end > settings.model_max_length:
            raise UnusableSample(
                f"the image's rows end at {end}, behind the longest length {settings.model_max_length}: raise "
                "--model-max-length"
            )
        counts = np.where(rows == IMAGE, settings.visual_tokens, 1)
        row_labels[at] = IGNORE
        rows, row_labels = np.repeat(rows, counts), np.repeat(row_labels, counts)
    return rows, row_labels


def _image_segment(dialogue: np.ndarray, tokenizer: Tokenizer, settings: EncodingSettings) -> np.ndarray:
    """[image rows, EOS], with `prompt` behind the very rows that precede the image in the dialogue."""
    prefix = np.empty(0, dtype=np.int64)
    if settings.image_context == "prompt":
        (image_rows,) = np.nonzero(dialogue == IMAGE)
        if len(image_rows):
            prefix = dialogue[: image_rows[0]]
        else:  # the conversation does not mention its image: what would precede it in the template
            prefix = np.asarray(tokenizer.encode(PREFIXES[settings.version], bos=True), dtype=np.int64)
    length = len(prefix) + settings.visual_tokens + 1
    if length > settings.model_max_length:
        raise UnusableSample(
            f"the image and its EOS take {length} rows, the longest length is {settings.model_max_length}: raise "
            "--model-max-length"
        )
    return np.concatenate([prefix, np.full(settings.visual_tokens, IMAGE), [tokenizer.eos_id]])


def _caption_segment(caption: str, tokenizer: Tokenizer, settings: EncodingSettings) -> np.ndarray:
    """[BOS, caption, EOS], the caption cut to the longest length."""
    ids = tokenizer.encode(caption, bos=True)[: settings.model_max_length - 1]
    return np.asarray([*ids, tokenizer.eos_id], dtype=np.int64)
