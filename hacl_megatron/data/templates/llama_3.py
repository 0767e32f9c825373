"""Llama 3's dialogue with LLaVA-NeXT's targets.

    <|begin_of_text|><|start_header_id|>system<|end_header_id|> \\n\\n system<|eot_id|>
    <|start_header_id|>user<|end_header_id|> \\n\\n image* \\n question<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|> \\n\\n answer<|eot_id|>            target: the whole of these turns

After LLaVA-NeXT's llava/train/train.py (`preprocess_llama3`) and its conversation `llava_llama_3`, token for token. Its
targets are, besides whole turns of the assistant, every mark of a header and every `<|eot_id|>` of the others; the two
newlines behind a header are none, since that code looks for them under another spelling than the vocabulary's. Blanks
around a message are taken away, as Llama 3's own template does. Where answers alone are to be trained on, `--version
chat` does that with the tokenizer's own template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.templates.template import MESSAGE, TURNS, Dialogue, Piece, Template, bos_piece

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
START, HEADER_END, END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
ROLES = {"human": "user", "gpt": "assistant"}


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """Turn by turn."""
    system = SYSTEM if dialogue.system is None else dialogue.system
    found = [*bos_piece(tokenizer), Piece(f"{START}system{HEADER_END}\n\n{system.strip()}{END}")]
    turns = dialogue.rounds()
    for number, (role, value) in enumerate(turns, start=1):
        header = f"{START}{ROLES[role]}{HEADER_END}\n\n"
        if role == "gpt" and not value and number == len(turns):
            found.append(Piece(header))
        else:
            found += dialogue.around_image(f"{header}{value.strip()}{END}", is_target=role == "gpt")
    return found


def trained_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Marks of turns and headers, of whoever speaks."""
    marks = (tokenizer.token_id(text) for text in (START, HEADER_END, END))
    return frozenset(token for token in marks if token is not None)


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- set system = '"""
    + SYSTEM
    + """' -%}"""
    + TURNS
    + """
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system | trim + '<|eot_id|>' -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + words(message) | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""
)

LLAMA_3 = Template(
    name="llama_3",
    title="Llama 3 (LLaVA-NeXT llava_llama_3)",
    pieces=pieces,
    needed_tokens=(START, HEADER_END, END),
    end_tokens=(END,),
    trained_tokens=trained_tokens,
    chat_template=CHAT_TEMPLATE,
)
