"""What a conversation template consists of, and the list of all there are.

Dialogue ─Template.pieces─→ Piece, Piece, ... ─each tokenized on its own─→ ids, labels ─Template.find_labels─→ labels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from hacl_megatron.config.names import did_you_mean
from hacl_megatron.data.prepare.records.keys import IMAGE_TAG

if TYPE_CHECKING:  # it imports transformers, which the tools' --help should not wait for
    from hacl_megatron.data.tokenizer import Tokenizer

IMAGE = -1
"""Stands in token rows for a row that takes an image feature."""
IGNORE = -100
"""Label of a token that is not trained on."""


MESSAGE = """
{%- macro words(message) -%}
    {%- set found = namespace(text='', texts=0) -%}
    {%- if message['content'] is string -%}
        {%- set found.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set found.text = found.text + ('<image>' if found.texts else '<image>\\n') -%}
            {%- else -%}
                {%- set found.text = found.text + part['text'] -%}
                {%- set found.texts = found.texts + 1 -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if found.text.count('<image>') == 1 -%}
        {{- ('<image>\\n' + found.text.replace('<image>', '').strip()).strip() -}}
    {%- else -%}
        {{- found.text -}}
    {%- endif -%}
{%- endmacro -%}"""
"""Jinja: `words(message)` is the text of a message as `prepare.preference_json.text_of_parts` and then
`encoding.checked_dialogue` have it: an only image is at the front, several stay where they are."""
TURNS = """
{%- set turns = messages -%}
{%- if turns and turns[0]['role'] == 'system' -%}
    {%- set system = words(turns[0]) -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}
{%- if turns and turns[0]['role'] == 'assistant' -%}
    {%- set turns = turns[1:] -%}
{%- endif -%}"""
"""Jinja behind it and `system`: `turns` from the first question on, and the dialogue's own `system` if it has one."""


def with_blank_behind_images(chat_template: str) -> str:
    """A template that renders a blank between each image and the text behind it, for `Tokenizer.eats_dummy_space`.

    In training the text behind an image is tokenized on its own.
    """
    return f"""{{%- set rendered -%}}{chat_template}{{%- endset -%}}
{{%- for text in rendered.split('{IMAGE_TAG}') -%}}
    {{{{- ('' if loop.first else '{IMAGE_TAG} ' if text else '{IMAGE_TAG}') + text -}}}}
{{%- endfor -%}}"""


class UnusableSample(ValueError):
    """This sample cannot be used; its message is the reason for `bad_samples.jsonl`. The run goes on."""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A sample's conversation, checked (`hacl_megatron.data.encoding.checked_dialogue`)."""

    turns: Sequence[tuple[str, str]]
    """(`human` or `gpt`, text), at least one. A text's only tag is at its front, on its own line."""
    has_image: bool
    """Whether the sample has images; without one, `<image>` is text."""
    system: str | None = None
    """What a first turn of `system` says, in the place of the template's own; None: there is none."""

    def rounds(self) -> Sequence[tuple[str, str]]:
        """The turns from the first human one on, known to alternate. Raises UnusableSample where they do not."""
        turns = self.turns[1:] if self.turns[0][0] != "human" else self.turns
        if not turns:
            raise UnusableSample("the dialogue has no human turn")
        for number, (role, _) in enumerate(turns):
            if role != ("human", "gpt")[number % 2]:
                raise UnusableSample(f"human and gpt do not take turns: turn {number} is from {role!r}")
        return turns

    def around_image(self, text: str, *, is_target: bool = False) -> list[Piece]:
        """LLaVA's `tokenizer_image_token`: the parts of `text` around `<image>`, `IMAGE` between them, no target."""
        first, *others = text.split(IMAGE_TAG) if self.has_image else [text]
        parts = (piece for part in others for piece in (Piece(IMAGE), Piece(part, is_target)))
        return [Piece(first, is_target), *parts]

    def without_system(self, name: str) -> Dialogue:
        """Itself. Raises UnusableSample where it has a system prompt, for which the template `name` has no place."""
        if self.system is not None:
            raise UnusableSample(f"it has a system prompt, and --version {name} has no place for one")
        return self


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue."""

    content: str | int
    """A text, tokenized on its own, or the id of one token: `IMAGE` for the image, the tokenizer's BOS."""
    is_target: bool = False
    """Whether it is trained on."""
    targets: tuple[tuple[int, int], ...] = ()
    """Stretches of the text, [begin, end) of its characters, whose tokens are trained on, where not all of it is: for
    texts that must not be cut there, since the tokens around the cut would be others."""

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Raises UnicodeError for a text with lone surrogates."""
        return [self.content] if isinstance(self.content, int) else tokenizer.encode(self.content, bos=False)

    def rows(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """(token ids, labels) of it; see `token_ids`."""
        ids = self.token_ids(tokenizer)
        if not self.targets:
            return ids, ids if self.is_target else [IGNORE] * len(ids)
        trained = tokenizer.tokens_within(self.content, self.targets)
        return ids, [token if is_target else IGNORE for token, is_target in zip(ids, trained, strict=True)]


def bos_piece(tokenizer: Tokenizer) -> list[Piece]:
    """BOS; nothing for a tokenizer that has none, as Qwen's."""
    return [] if tokenizer.bos_id is None else [Piece(tokenizer.bos_id)]


def cut_at_image(text: str, targets: Sequence[tuple[int, int]], dialogue: Dialogue) -> list[Piece]:
    """`text` as pieces around its image, `targets` being stretches of its characters that are trained on."""
    pieces, begin = [], 0
    for piece in dialogue.around_image(text):
        if piece.content == IMAGE:
            begin += len(IMAGE_TAG)
            pieces.append(piece)
            continue
        end = begin + len(piece.content)
        inside = [(max(first, begin) - begin, min(last, end) - begin) for first, last in targets]
        pieces.append(Piece(piece.content, targets=tuple((first, last) for first, last in inside if first < last)))
        begin = end
    return pieces


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
    needed_tokens: tuple[str, ...] = ()
    """Special tokens that it writes; a tokenizer without them is refused."""
    end_tokens: tuple[str, ...] = ()
    """Those of them that end an answer, and so its generation, as EOS does."""
    trained_tokens: Callable[[Tokenizer], frozenset[int]] | None = None
    """Ids that are trained on wherever they stand, but in the first row. None: there are none."""
    renders: Callable[[Tokenizer], Renderer] | None = None
    """For a template that the tokenizer itself brings. Raises ValueError where it brings none that can be used."""
    first_answer_is_caption: bool = False
    """Whether the first answer is the caption of the image-caption pair of every record that has no key `text`."""
    shows_untagged_image: bool = False
    """Whether it shows an image that no `<image>` tag of the dialogue stands for."""
    chat_template: str | None = None
    """The same dialogue as Jinja text for exports, as transformers renders it: `messages` of user and assistant, image
    parts as `<image>`, no BOS at the beginning, for tokenizers put it there. None: there is none. With `renders`, what
    goes in front of the tokenizer's own."""
    question_template: str | None = None
    """Name of the template to ask a question in, where this one leaves questions out. None: this one."""

    def image_prefix(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of what precedes an image in the first question, its BOS included."""
        asked = Dialogue(turns=(("human", f"{IMAGE_TAG}\nWhat is it?"), ("gpt", "")), has_image=True)
        before = takewhile(lambda piece: piece.content != IMAGE, self.pieces(asked, tokenizer))
        return [token for piece in before for token in piece.token_ids(tokenizer)]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError, in one line, for a tokenizer that it cannot be used with."""
        if missing := [token for token in self.needed_tokens if tokenizer.token_id(token) is None]:
            raise ValueError(
                f"--version {self.name} writes {' '.join(missing)}, which the tokenizer has no token for; expected one "
                "that has: give the --version that the language model was trained with, or another tokenizer"
            )
        if self.renders is not None:
            self.renders(tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the tokens that end a generated answer, EOS the first."""
        texts = self.end_tokens if self.renders is None else self.renders(tokenizer).end_tokens
        found = [tokenizer.eos_id, *(tokenizer.token_id(text) for text in texts)]
        return list(dict.fromkeys(token for token in found if token is not None))


class Renderer(Protocol):
    """A template that a tokenizer brings, and what was found out about it."""

    end_tokens: tuple[str, ...]
    """Special tokens that end an answer."""


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


def check_template(name: str, tokenizer: Tokenizer | None = None) -> None:
    """Raises ValueError, in one line, where `--version` names no template, or one that is not for the tokenizer.

    To be called before any work is done, and again as soon as the tokenizer is known.
    """
    template = find_template(name)
    if tokenizer is not None:
        template.check(tokenizer)
