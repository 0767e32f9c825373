"""Mistral's and LLaMA 2's dialogue, as LLaVA-NeXT has it for Mistral.

    <s>[INST] image* \\n question [/INST] answer </s>[INST] ...                 target: answers with their </s>

After LLaVA-NeXT's llava/conversation.py (`mistral_instruct`) and llava/train/train.py (`preprocess_llama_2`), but that
a dialogue whose rounds do not tokenize to the length of the whole keeps its labels: where an answer begins is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.templates.template import MESSAGE, Dialogue, Piece, Template, bos_piece, cut_at_image

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """The prompt, cut at the image alone: a SentencePiece tokenizer reads what stands behind a cut differently."""
    text, targets = "", []
    turns = dialogue.rounds()
    for number, (role, value) in enumerate(turns):
        if role == "human":
            system = f"<<SYS>>\n{dialogue.system}\n<</SYS>>\n\n" if number == 0 and dialogue.system else ""
            text += f"[INST] {system}{value} [/INST]"
        elif value or number + 1 < len(turns):
            begin, text = len(text), f"{text} {value} {tokenizer.eos_token}"
            targets.append((begin, len(text)))
    return [*bos_piece(tokenizer), *cut_at_image(text, targets, dialogue)]


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- set turns = messages -%}
{%- set system = namespace(text='') -%}
{%- if turns and turns[0]['role'] == 'system' -%}
    {%- if words(turns[0]) -%}
        {%- set system.text = '<<SYS>>\\n' + words(turns[0]) + '\\n<</SYS>>\\n\\n' -%}
    {%- endif -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- if turns and turns[0]['role'] == 'assistant' -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- elif message['role'] == 'user' -%}
        {{- '[INST] ' + (system.text if loop.first else '') + words(message) + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + words(message) + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
)
"""The prompt of an answer is there without asking: a question ends with it."""

MISTRAL = Template(
    name="mistral", title="Mistral (LLaVA-NeXT mistral_instruct)", pieces=pieces, chat_template=CHAT_TEMPLATE
)
