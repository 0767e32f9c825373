"""LLaVA's template of stage 1: the image is the whole prompt, its caption the answer.

    <s> image* answer \\n          target: everything behind the image

After llava/train/train.py (`preprocess_plain`). MiniGPT-4's first stage has the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.prepare.records.keys import IMAGE_TAG
from hacl_megatron.data.templates.template import IMAGE, MESSAGE, Dialogue, Piece, Template, UnusableSample, bos_piece

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """Image, answer, newline; the question is left out."""
    dialogue.without_system("plain")
    if not dialogue.has_image:
        raise UnusableSample("the plain template needs an image; train on text-only samples with --version v1")
    if (number := len(dialogue.turns)) != 2:
        raise UnusableSample(f"the plain template takes one question and one answer, found {number} turns")
    answer = dialogue.turns[1][1]
    if IMAGE_TAG in answer:
        raise UnusableSample(f"the plain template takes the {IMAGE_TAG} tag in the question, found it in the answer")
    return [*bos_piece(tokenizer), Piece(IMAGE), Piece(f"{answer}\n", is_target=True)]


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- for message in messages -%}
    {%- if message['role'] == 'system' or loop.index > 2 -%}
        {{- raise_exception('the plain template takes one image and one answer') -}}
    {%- elif message['role'] == 'user' -%}
        {%- set shown = words(message) -%}
        {%- if '<image>' not in shown -%}{{- raise_exception('the plain template needs an image') -}}{%- endif -%}
        {{- '<image>' -}}
    {%- else -%}
        {{- words(message) + '\n' -}}
    {%- endif -%}
{%- endfor -%}"""
)
"""Image, answer, newline; what the user says beside the image is left out, as in training."""

PLAIN = Template(
    name="plain",
    title="LLaVA-1.5 plain",
    pieces=pieces,
    first_answer_is_caption=True,
    shows_untagged_image=True,
    question_template="v1",
    chat_template=CHAT_TEMPLATE,
)
