"""LLaVA's template of stage 1: the image is the whole prompt, its caption the answer.

    <s> image* answer \\n          target: everything behind the image

After llava/train/train.py (`preprocess_plain`). MiniGPT-4's first stage has the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.prepare.record_keys import IMAGE_TAG
from hacl_megatron.data.templates.template import IMAGE, Dialogue, Piece, Template, UnusableSample

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """Image, answer, newline; the question is left out."""
    if not dialogue.has_image:
        raise UnusableSample("the plain template needs an image; train on text-only samples with --version v1")
    if (number := len(dialogue.turns)) != 2:
        raise UnusableSample(f"the plain template takes one question and one answer, found {number} turns")
    answer = dialogue.turns[1][1]
    if IMAGE_TAG in answer:
        raise UnusableSample(f"the plain template takes the {IMAGE_TAG} tag in the question, found it in the answer")
    return [Piece(tokenizer.bos_id), Piece(IMAGE), Piece(f"{answer}\n", is_target=True)]


PLAIN = Template(
    name="plain",
    title="LLaVA-1.5 plain",
    pieces=pieces,
    first_answer_is_caption=True,
    shows_untagged_image=True,
    question_template="v1",
)
