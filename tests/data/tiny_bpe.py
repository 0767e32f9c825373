"""Byte-level BPE tokenizers as Qwen's and Llama 3's are: their kind, special tokens, and their chat templates' form.

The vocabulary is the bytes and a few words, so that token rows can be worked out by hand.
"""

import json
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

Kind = Literal["qwen", "llama_3"]
WORDS = (
    "system user assistant Ġa Ġred Ġcat cat red yes Ġyes What Ġis Ġit is it You Ġare Ġhelpful Ġassistant \n\n"
).replace("\n", "Ċ")
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama_3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's; Llama 3's takes up to three digits together."""

QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
THINKING = """{%- set last = namespace(user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.user %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
"""As Qwen3's: only the last answer has its thoughts, so no answer looks in the whole as it does when it is the last."""


def marked(template: str) -> str:
    """The same text, what the assistant says, with the token that ends it, between `{% generation %}` marks."""
    turns = (
        (
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
            ("'<|im_start|>' + message.role + '\\n'", "message.content + '<|im_end|>'", "'\\n'"),
        ),
        ("{{- message['content'] | trim + '<|eot_id|>' }}", ("''", "message['content'] | trim + '<|eot_id|>'", "''")),
    )
    for whole, (header, said, behind) in turns:
        template = template.replace(
            whole,
            f"{{{{- {header} }}}}{{%- if message.role == 'assistant' %}}{{% generation %}}{{{{- {said} }}}}"
            f"{{% endgeneration %}}{{%- else %}}{{{{- {said} }}}}{{%- endif %}}{{{{- {behind} }}}}",
        )
    assert "{% generation %}" in template
    return template


def write_bpe(folder: Path, kind: Kind, *, chat_template: str | None = None, image_at: int | None = None) -> str:
    """Writes tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja.

    `image_at`: id of a token `<image>` in the middle of the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary: dict[str, int] = {}

    def add(piece: str) -> None:
        if len(vocabulary) == image_at:
            vocabulary["<image>"] = len(vocabulary)
        vocabulary.setdefault(piece, len(vocabulary))

    merges: list[tuple[str, str]] = []
    for byte in sorted(ByteLevel.alphabet()):
        add(byte)
    for word in WORDS.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                add(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [*SPECIAL[kind], *([] if image_at is None else ["<image>"])]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if kind == "qwen":
        settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return str(folder)
