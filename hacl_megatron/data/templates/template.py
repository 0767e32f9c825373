"""What a conversation template consists of, and the list of all there are.

Dialogue ─Template.pieces─→ Piece, Piece, ... ─each tokenized on its own─→ ids, labels ─Template.find_labels─→ labels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from hacl_megatron.config.names import did_you_mean
from hacl_megatron.data.prepare.record_keys import IMAGE_TAG

if TYPE_CHECKING:  # it imports transformers, which the tools' --help should not wait for
    from hacl_megatron.data.tokenizer import Tokenizer

IMAGE = -1
"""Stands in token rows for a row that takes an image feature."""
IGNORE = -100
"""Label of a token that is not trained on."""


MESSAGE = """
{%- macro words(message) -%}
    {%- set found = namespace(text='', images=0) -%}
    {%- if message['content'] is string -%}
        {%- set found.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set found.images = found.images + 1 -%}
            {%- else -%}
                {%- set found.text = found.text + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set found.images = found.images + found.text.count('<image>') -%}
    {%- if found.images -%}
        {{- ('<image>\\n' * found.images + found.text.replace('<image>', '').strip()).strip() -}}
    {%- else -%}
        {{- found.text -}}
    {%- endif -%}
{%- endmacro -%}"""
"""Jinja: `words(message)` is the text of a message, its images at the front, as `encoding.checked_dialogue` has it."""


class UnusableSample(ValueError):
    """This sample cannot be used; its message is the reason for `bad_samples.jsonl`. The run goes on."""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A sample's conversation, checked (`hacl_megatron.data.encoding.checked_dialogue`)."""

    turns: Sequence[tuple[str, str]]
    """(`human` or `gpt`, text), at least one. The image's tag, if any, is at the front of its text, on its own line."""
    has_image: bool
    """Whether the sample has an image; without one, `<image>` is text."""

    def rounds(self) -> Sequence[tuple[str, str]]:
        """The turns from the first human one on, known to alternate. Raises UnusableSample where they do not."""
        turns = self.turns[1:] if self.turns[0][0] != "human" else self.turns
        if not turns:
            raise UnusableSample("the dialogue has no human turn")
        for number, (role, _) in enumerate(turns):
            if role != ("human", "gpt")[number % 2]:
                raise UnusableSample(f"human and gpt do not take turns: turn {number} is from {role!r}")
        return turns

    def around_image(self, text: str) -> list[Piece]:
        """LLaVA's `tokenizer_image_token`: the parts of `text` around `<image>`, `IMAGE` between them; no targets."""
        first, *others = text.split(IMAGE_TAG) if self.has_image else [text]
        return [Piece(first), *(piece for part in others for piece in (Piece(IMAGE), Piece(part)))]


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue."""

    content: str | int
    """A text, tokenized on its own, or the id of one token: `IMAGE` for the image, the tokenizer's BOS."""
    is_target: bool = False
    """Whether it is trained on."""

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Raises UnicodeError for a text with lone surrogates."""
        return [self.content] if isinstance(self.content, int) else tokenizer.encode(self.content, bos=False)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A conversation template."""

    name: str
    """As `--version` has it."""
    title: str
    """What tables of results call it."""
    pieces: Callable[[Dialogue, Tokenizer], list[Piece]]
    """The whole dialogue in its order. An empty last answer asks for the prompt that an answer follows. Raises
    UnusableSample where the dialogue does not fit."""
    find_labels: Callable[[list[int], Dialogue, Tokenizer, int], list[int] | None] | None = None
    """(ids, dialogue, tokenizer, `--model-max-length`) -> labels as many as ids, or None where none can be trusted and
    all are to be ignored: for a template that finds its targets in the tokens of the whole. None: the pieces say."""
    end: str | None = None
    """Text that ends an answer, and so its generation; no special token, which decoding leaves out. None: EOS does."""
    first_answer_is_caption: bool = False
    """Whether the first answer is the caption of the image-caption pair of every record that has no key `text`."""
    shows_untagged_image: bool = False
    """Whether it shows an image that no `<image>` tag of the dialogue stands for."""
    chat_template: str | None = None
    """The same dialogue as Jinja text for exports, as transformers renders it: `messages` of user and assistant, image
    parts as `<image>`, no BOS at the beginning, for tokenizers put it there. None: there is none."""
    question_template: str | None = None
    """Name of the template to ask a question in, where this one leaves questions out. None: this one."""

    def image_prefix(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of what precedes an image in the first question, its BOS included."""
        asked = Dialogue(turns=(("human", f"{IMAGE_TAG}\nWhat is it?"), ("gpt", "")), has_image=True)
        before = takewhile(lambda piece: piece.content != IMAGE, self.pieces(asked, tokenizer))
        return [token for piece in before for token in piece.token_ids(tokenizer)]


_TEMPLATES: dict[str, Template] = {}


def register(template: Template) -> None:
    """Makes a template known by its name."""
    assert template.name not in _TEMPLATES, template.name
    _TEMPLATES[template.name] = template


def template_names() -> tuple[str, ...]:
    """What `--version` may be."""
    return tuple(_TEMPLATES)


def find_template(name: str) -> Template:
    """The template of that name. Raises ValueError with the names there are."""
    if name not in _TEMPLATES:
        advice = did_you_mean(name, _TEMPLATES, "a template of one's own is a file in hacl_megatron/data/templates")
        raise ValueError(f"--version {name} is no conversation template, expected {', '.join(_TEMPLATES)}; {advice}")
    return _TEMPLATES[name]


def check_template(name: str) -> None:
    """Raises ValueError, in one line, where `--version` names no template: to be called before any work is done."""
    find_template(name)
