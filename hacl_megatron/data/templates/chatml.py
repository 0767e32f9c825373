"""ChatML with LLaVA-NeXT's targets, for Qwen and others that speak it.

    <|im_start|>system \\n You are a helpful assistant.<|im_end|> \\n
    <|im_start|>user \\n image* \\n question<|im_end|> \\n
    <|im_start|>assistant \\n answer<|im_end|> \\n                                   target: the whole of these turns

After LLaVA-NeXT's llava/train/train.py (`preprocess_qwen`) and its conversation `qwen_1_5`, token for token. Its
targets are, besides whole turns of the assistant, every `<|im_start|>`, `<|im_end|>` and newline of the others. Where
answers alone are to be trained on, `--version chat` does that with the tokenizer's own template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hacl_megatron.data.templates.template import MESSAGE, TURNS, Dialogue, Piece, Template

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer

SYSTEM = "You are a helpful assistant."
START, END = "<|im_start|>", "<|im_end|>"
ROLES = {"human": "user", "gpt": "assistant"}


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """Turn by turn, no BOS before them, as released."""
    system = SYSTEM if dialogue.system is None else dialogue.system
    found = [Piece(f"{START}system\n{system}{END}\n")]
    turns = dialogue.rounds()
    for number, (role, value) in enumerate(turns, start=1):
        header = f"{START}{ROLES[role]}\n"
        if role == "gpt" and not value and number == len(turns):
            found.append(Piece(header))
        else:
            found += dialogue.around_image(f"{header}{value}{END}\n", is_target=role == "gpt")
    return found


def trained_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Marks of turns, and the newline, of whoever speaks."""
    newline = tokenizer.encode("\n", bos=False)
    marks = (tokenizer.token_id(text) for text in (START, END))
    return frozenset(token for token in (*marks, *(newline if len(newline) == 1 else ())) if token is not None)


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- set system = '"""
    + SYSTEM
    + """' -%}"""
    + TURNS
    + """
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + words(message) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""
)

CHATML = Template(
    name="chatml",
    title="ChatML (LLaVA-NeXT qwen_1_5)",
    pieces=pieces,
    needed_tokens=(START, END),
    end_tokens=(END,),
    trained_tokens=trained_tokens,
    chat_template=CHAT_TEMPLATE,
)
