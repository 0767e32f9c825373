"""LLaVA-1.5's dialogue, which is Vicuna's.

    <s> system USER: image* \\n question ASSISTANT: answer </s>USER: ...          target: answers with their </s>

After llava/conversation.py (`conv_vicuna_v1`) and llava/train/train.py (`preprocess_v1`) token for token, also where
that code is odd: an empty answer loses its separator, and a dialogue whose rounds do not tokenize to the length of the
whole loses all its labels. What that code takes for granted of Vicuna's vocabulary is measured, and under a vocabulary
for which it does not hold a round that does not fit loses its own labels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.templates.template import IGNORE, MESSAGE, TURNS, Dialogue, Piece, Template, bos_piece

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
SEPARATOR = " "
ANSWER_MARK = f"{SEPARATOR}{ROLES['gpt']}: "


def prompt(dialogue: Dialogue, tokenizer: Tokenizer) -> str:
    """The text of a dialogue: LLaVA's `conv_vicuna_v1.get_prompt()` (llava/conversation.py, SeparatorStyle.TWO)."""
    text = (SYSTEM if dialogue.system is None else dialogue.system) + SEPARATOR
    for role, value in dialogue.rounds():
        end = SEPARATOR if role == "human" else tokenizer.eos_token
        # An empty message loses its separator, as in LLaVA.
        text += f"{ROLES[role]}: {value}{end}" if value else f"{ROLES[role]}:"
    return text


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """The prompt, cut at the image alone; `find_labels` finds the answers in its tokens."""
    return [*bos_piece(tokenizer), *dialogue.around_image(prompt(dialogue, tokenizer))]


def find_labels(ids: list[int], dialogue: Dialogue, tokenizer: Tokenizer, model_max_length: int) -> list[int] | None:
    """Targets are the answers, each with the EOS behind it.

    Rounds are tokenized once more on their own to find where answers begin, as LLaVA does, with its two corrections:
    a round's instruction ends in a space that belongs to the answer's first token, and a round behind `</s>` has no
    dummy space unless the tokenizer is `legacy`, so it is `Tokenizer.round_surplus` tokens shorter: 1 in Vicuna's
    vocabulary, which is all that LLaVA knows. Where the sum misses the dialogue's length all labels are ignored,
    unless it reaches `model_max_length`; where LLaVA's 1 is wrong, so that it gives no labels to agree with, only those
    of the rounds whose lengths do not fit between the EOS of the rows.
    """
    if tokenizer.bos_id is None:  # counted with a row in its place, which is taken away again
        labels = _labels([NO_BOS, *ids], dialogue, tokenizer, model_max_length + 1)
        return labels and labels[1:]
    return _labels(ids, dialogue, tokenizer, model_max_length)


NO_BOS = -2
"""Stands for the BOS of a tokenizer that has none."""


def _labels(ids: list[int], dialogue: Dialogue, tokenizer: Tokenizer, model_max_length: int) -> list[int] | None:
    """As `find_labels`, of rows that begin with BOS."""

    def length(text: str) -> int:
        return 1 + sum(len(piece.token_ids(tokenizer)) for piece in dialogue.around_image(text))

    def lengths(number: int, text: str) -> tuple[int, int] | None:
        """Tokens of a round with the EOS that ends it, and of its instruction; None without exactly one answer."""
        parts = text.split(ANSWER_MARK)
        if len(parts) != 2:
            return None
        # BOS of the round's own tokenization stands for the EOS that ends it.
        surplus = tokenizer.round_surplus if number > 0 else 0
        return length(text) - surplus, length(parts[0] + ANSWER_MARK) - 2 - surplus

    rounds = prompt(dialogue, tokenizer).split(tokenizer.eos_token)
    labels = list(ids)
    labels[0] = IGNORE
    begin = 1
    for number, text in enumerate(rounds):
        found = lengths(number, text)
        if found is None:  # behind the last EOS, or a round without exactly one answer
            break
        round_length, instruction_length = found
        end = min(begin + instruction_length, len(labels))
        labels[begin:end] = [IGNORE] * (end - begin)
        begin += round_length
    labels[begin:] = [IGNORE] * len(labels[begin:])
    # LLaVA counts what is not padding, and pads with <unk>; it cuts text-only dialogues before, others after this.
    counted = ids if dialogue.has_image else ids[:model_max_length]
    mismatch = begin < model_max_length and begin != sum(token != tokenizer.unk_id for token in counted)
    if not mismatch:
        return labels
    if tokenizer.legacy or tokenizer.round_surplus == 1:
        return None  # as LLaVA, which is right about this tokenizer
    return _labels_between_eos(ids, [lengths(number, text) for number, text in enumerate(rounds)], tokenizer.eos_id)


def _labels_between_eos(ids: list[int], rounds: list[tuple[int, int] | None], eos_id: int) -> list[int] | None:
    """Labels of the rounds that are as long as the rows between two EOS; None where there is none.

    Args:
        rounds: tokens of each round and of its instruction, the last behind the last EOS.
    """
    labels = [IGNORE] * len(ids)
    ends = [at + 1 for at, token in enumerate(ids) if token == eos_id]
    begins = [1, *ends]
    if len(ends) != len(rounds) - 1:  # an EOS that the text does not show
        return None
    for begin, end, found in zip(begins, ends, rounds, strict=False):
        if found is not None and found[0] == end - begin:
            labels[begin + found[1] : end] = ids[begin + found[1] : end]
    return labels if any(label != IGNORE for label in labels) else None


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- set system = '"""
    + SYSTEM.replace("'", "\\'")
    + """' -%}"""
    + TURNS
    + """
{{- system + ' ' -}}
{%- for message in turns -%}
    {%- set text = words(message) -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' + text + ' ' if text else 'USER:' -}}
    {%- else -%}
        {{- 'ASSISTANT: ' + text + eos_token if text else 'ASSISTANT:' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}"""
)
"""Another system prompt may stand in a first message; a first message of the assistant is dropped, as in training."""

V1 = Template(name="v1", title="LLaVA-1.5 v1", pieces=pieces, find_labels=find_labels, chat_template=CHAT_TEMPLATE)
