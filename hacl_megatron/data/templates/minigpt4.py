"""MiniGPT-4's dialogue.

    <s> ###Human: <Img>image*</Img> question ###Assistant: answer ### <s> ###Human: ...   target: answers with their ###

After minigpt4/models/minigpt_base.py and train_configs/minigpt4_stage2_finetune.yaml: every piece around the image and
every answer is tokenized on its own. MiniGPT-4's first stage has no prompt: its rows are `plain`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.prepare.records.keys import IMAGE_TAG
from hacl_megatron.data.templates.template import IMAGE, MESSAGE, Dialogue, Piece, Template, UnusableSample, bos_piece

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer

HUMAN, ASSISTANT, END = "###Human: ", " ###Assistant: ", "###"


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """Targets are the answers, each with the `###` that ends it (no EOS, as released).

    Later rounds begin with a BOS of their own, as in its `tokenize_conversation`. A single question without words gets
    no prompt, as in its first stage.
    """
    turns, has_image = dialogue.without_system("minigpt4").rounds(), dialogue.has_image
    bos = bos_piece(tokenizer)
    if has_image and len(turns) == 2 and turns[0][1] == IMAGE_TAG:
        if IMAGE_TAG in turns[1][1]:
            raise UnusableSample(f"the template takes the {IMAGE_TAG} tag in a question, found it in the answer")
        return [*bos, Piece(IMAGE), Piece(f"{turns[1][1]}\n", is_target=True)]
    found: list[Piece] = []
    for role, value in turns:
        if role == "gpt":
            if has_image and IMAGE_TAG in value:
                raise UnusableSample(f"the template takes the {IMAGE_TAG} tag in a question, found it in an answer")
            # Without an answer it is the prompt that an answer is to be generated for.
            found += [Piece(value + END, is_target=True)] if value else []
        elif has_image and value.startswith(IMAGE_TAG):
            question = value.removeprefix(IMAGE_TAG).strip()
            found += [*bos, Piece(f"{HUMAN}<Img>"), Piece(IMAGE), Piece(f"</Img> {question}{ASSISTANT}")]
        else:
            found += [*bos, Piece(f"{HUMAN}{value}{ASSISTANT}")]
    return found


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- set turns = messages -%}
{%- if turns and turns[0]['role'] == 'assistant' -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- set bare = turns | length in (1, 2) and words(turns[0]) == '<image>' -%}
{%- for message in turns -%}
    {%- set text = words(message) -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('user and assistant must take turns; this template has no system prompt') -}}
    {%- elif bare -%}
        {{- text if loop.first else text + '\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- text + '###' if text else '' -}}
    {%- else -%}
        {{- '' if loop.first else bos_token -}}
        {%- if text.startswith('<image>') -%}
            {{- '###Human: <Img><image></Img> ' + text.replace('<image>', '').strip() + ' ###Assistant: ' -}}
        {%- else -%}
            {{- '###Human: ' + text + ' ###Assistant: ' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}"""
)
"""The prompt of an answer is there without asking: a question ends with it."""

MINIGPT4 = Template(name="minigpt4", title="MiniGPT-4", pieces=pieces, end=END, chat_template=CHAT_TEMPLATE)
