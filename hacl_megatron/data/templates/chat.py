"""The tokenizer's own chat template, a text in Jinja, rendered as transformers renders it, in its sandbox.

    dialogue → messages ─Tokenizer.render→ text ─cut at <image>→ pieces          target: what the assistant says

Targets are what the template marks by `{% generation %}`; in one without such marks, of each answer what rendering the
dialogue up to it adds to the prompt for it, with the token that ends the turn and without blanks behind that, which no
model is asked for. The rows are those of `apply_chat_template`, but that an image stands at its tag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hacl_megatron.data.prepare.records.keys import IMAGE_TAG
from hacl_megatron.data.templates.template import MESSAGE, Dialogue, Piece, Template, UnusableSample, cut_at_image

if TYPE_CHECKING:
    from hacl_megatron.data.tokenizer import Tokenizer

Message = dict[str, Any]
Stretch = tuple[int, int]
"""[begin, end) of a text's characters."""
DAY = "26 Jul 2024"
"""What Llama 3.1's template calls today where it cannot know: rows must be the same when a run goes on another day."""
ASKED, ANSWERED = "\ue000asked\ue000", "\ue000answered\ue000"
"""Stand for a question and an answer whose place in the rendered text is looked for."""
PROBE = Dialogue(turns=(("human", f"{IMAGE_TAG}\n{ASKED}"), ("gpt", ANSWERED)), has_image=True)


def messages_of(dialogue: Dialogue, *, in_parts: bool) -> list[Message]:
    """As transformers has them, the text of each as one string or as parts, images where their tags are."""
    turns = [] if dialogue.system is None else [("system", dialogue.system)]
    found: list[Message] = []
    for role, text in [*turns, *dialogue.rounds()]:
        content: str | list[dict[str, str]] = text
        if in_parts:
            texts = text.split(IMAGE_TAG) if dialogue.has_image else [text]
            if len(texts) == 2:  # an only image is in front, on a line of its own
                texts = ["", texts[1].strip()]
            content = [{"type": "text", "text": texts[0]}] if texts[0] or len(texts) == 1 else []
            for words in texts[1:]:
                content += [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
        found.append({"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content})
    return found


class OwnTemplate:
    """A tokenizer's chat template, and what is found out about it by rendering.

    Raises:
        ValueError: there is none, it fails, it leaves out texts or images, or nothing ends its answers.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        source = tokenizer.chat_template
        self._variables = {"date_string": DAY} if "date_string" in source else {}
        if "strftime_now" in source and not self._variables:
            raise ValueError(
                "the tokenizer's chat template writes the day on which it is rendered (strftime_now), so that a run "
                "would see other texts when it goes on another day; expected one that takes it from date_string, or "
                "has none: change it, or give another --version"
            )
        faults = []
        for in_parts in (False, True):
            try:
                text, marked = self.render(messages_of(PROBE, in_parts=in_parts))
            except UnusableSample as error:
                faults.append(str(error))
                continue
            if ASKED in text and ANSWERED in text and text.count(IMAGE_TAG) == 1:
                break
            faults.append(f"makes {text[:80]!r} of a question with an image and its answer")
        else:
            raise ValueError(
                f"the tokenizer's chat template {faults[0]}; expected the question with its {IMAGE_TAG}, and the "
                "answer: mend it, or give another --version"
            )
        self.in_parts = in_parts
        """Whether a message's content must be a list of parts, as multimodal models' templates have it."""
        self.marks_answers = bool(marked)
        self.end_tokens = self._find_end(text.partition(ANSWERED)[2])

    def render(self, messages: list[Message], *, asks: bool = False) -> tuple[str, list[Stretch]]:
        """(text, what the template marks of it); `asks`: with the prompt of an answer. Raises UnusableSample."""
        if not messages:
            return "", []
        try:
            return self._tokenizer.render(messages, add_generation_prompt=asks, **self._variables)
        except Exception as error:  # a template may call for anything, and refuse by an exception of its own
            reason = " ".join(str(error).split())[:200]
            raise UnusableSample(f"refuses it ({type(error).__name__}: {reason})") from None

    def answers(self, messages: list[Message], text: str) -> list[Stretch]:
        """Where in `text`, the rendered messages, each answer stands, from behind its prompt to the end of its turn."""
        found = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.render(messages[:number], asks=True)[0]
                until = self.render(messages[: number + 1])[0]
                if text.startswith(until) and until.startswith(prompt):
                    begin, end = len(prompt), len(until)
                else:
                    begin, end = self._answer_by_its_words(messages, number, text, prompt)
                turn = text[begin:end].rstrip()
                found.append((begin, begin + len(turn) if turn.endswith(self.end_tokens) else end))
        return found

    def _answer_by_its_words(self, messages: list[Message], number: int, text: str, prompt: str) -> Stretch:
        """Of a template that shows an answer differently when others follow it, as those that leave out thoughts do."""
        before, _, behind = self._around(messages, number)
        last = len(text) - len(behind)
        if not (text.startswith(before) and text.endswith(behind) and len(before) <= last):
            raise UnusableSample(f"shows message {number} such that it cannot be found in the whole")
        alone = self._around(messages[: number + 1], number)[2]
        ended = next((at for at, both in enumerate(zip(behind, alone, strict=False)) if both[0] != both[1]), len(alone))
        begin = len(prompt) if text.startswith(prompt) and len(prompt) <= len(before) else len(before)
        return begin, last + min(ended, len(behind))

    def _around(self, messages: list[Message], number: int) -> tuple[str, str, str]:
        """The rendered messages before and behind the words of one of them."""
        words = [{"type": "text", "text": ANSWERED}] if self.in_parts else ANSWERED
        changed = [*messages[:number], {**messages[number], "content": words}, *messages[number + 1 :]]
        return self.render(changed)[0].partition(ANSWERED)

    def _find_end(self, behind: str) -> tuple[str, ...]:
        """The special token that stands first in what is `behind` an answer."""
        backend = self._tokenizer.backend
        special = {*backend.get_added_vocab(), self._tokenizer.eos_token}
        for token in backend.convert_ids_to_tokens(self._tokenizer.encode(behind, bos=False)):
            if token in special:
                return (token,)
        raise ValueError(
            f"the tokenizer's chat template ends an answer by {behind!r}, in which there is no special token, so that "
            "generation would not know where to stop; expected one, such as EOS: mend it, or give another --version"
        )


def own_template(tokenizer: Tokenizer) -> OwnTemplate:
    """The tokenizer's; looked into once. Raises ValueError; see `OwnTemplate`."""
    if "chat" not in tokenizer.found:
        tokenizer.found["chat"] = OwnTemplate(tokenizer)
    return tokenizer.found["chat"]


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """The rendered text, cut at the image alone, BOS being there where the template writes it."""
    own = own_template(tokenizer)
    messages = messages_of(dialogue, in_parts=own.in_parts)
    asks = dialogue.rounds()[-1] == ("gpt", "")
    if asks:
        messages.pop()
    tagged = sum(value.count(IMAGE_TAG) for _, value in dialogue.rounds()) if dialogue.has_image else 0
    try:
        text, targets = own.render(messages, asks=asks)
        if not own.marks_answers:
            targets = own.answers(messages, text)
    except UnusableSample as error:
        raise UnusableSample(f"the tokenizer's chat template {error}") from None
    if tagged and (found := text.count(IMAGE_TAG)) != tagged:
        raise UnusableSample(f"the tokenizer's chat template shows {found} {IMAGE_TAG} of the dialogue's {tagged}")
    return cut_at_image(text, targets, dialogue)


CHAT_TEMPLATE = (
    MESSAGE
    + """
{%- if date_string is not defined -%}{%- set date_string = '"""
    + DAY
    + """' -%}{%- endif -%}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] -%}
        {%- set flat.messages = flat.messages + [dict(message, content=words(message))] -%}
    {%- else -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""
)
"""Makes texts of a message's parts, for the tokenizer's template behind it."""

CHAT = Template(
    name="chat", title="the tokenizer's own", pieces=pieces, renders=own_template, chat_template=CHAT_TEMPLATE
)
