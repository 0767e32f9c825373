"""Preference records as TRL's, RLAIF-V's and LLaMA-Factory's users have them: a dialogue, and answers rejected for it.

    {"question": "What is it?", "image": "1.jpg", "chosen": "A cat.", "rejected": "A dog."}
        → turns (human, "<image>\\nWhat is it?"), (gpt, "A cat.")          rejected ("A dog.",)

    question | prompt | conversations   a string; messages; missing where the answers hold the whole conversation
    chosen                              a string; a message; messages, of which the last is the answer
    rejected                            the same, or a list of such
    image | images | image_path         a file name, or a list of them

A message is TRL's {"role", "content"}, whose content is a string or parts {"type": "image"} and {"type": "text"}, or
LLaVA's {"from", "value"}. What only some records of a file have, others may have as null or NaN.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hacl_megatron.data.prepare.findings import Findings
from hacl_megatron.data.prepare.records.images import IMAGE_KEYS, read_images
from hacl_megatron.data.prepare.records.keys import ANSWER_KEYS, CHOSEN_KEY, IMAGE_TAG, REJECTED_KEY, meant_by
from hacl_megatron.data.prepare.records.values import Wrong, value_of

PROMPT_KEYS = ("question", "prompt", "conversations")
PREFERENCE_IMAGE_KEYS = (*IMAGE_KEYS, "image_path")
"""RLAIF-V's last."""
ROLES = {"user": "human", "assistant": "gpt"}
"""OpenAI's names of those who speak, and LLaVA's."""

Turns = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Preference:
    """What a preference record says."""

    images: tuple[str, ...]
    """Image names relative to the image folder; empty for a text-only record."""
    turns: tuple[tuple[str, str], ...]
    """(from, value), in LLaVA's roles; the last is the chosen answer."""
    rejected: tuple[str, ...]
    """What may stand in its place, without surrounding blanks; empty ones are left out."""


def is_preference(record: dict[str, Any]) -> bool:
    """Whether a decoded record is one, or was meant to be."""
    return any(isinstance(record.get(key), str | list | dict) for key in ANSWER_KEYS)


def messages_in(record: dict[str, Any]) -> Iterator[Any]:
    """Every message of a decoded record, unchecked."""
    for key in (*PROMPT_KEYS, *ANSWER_KEYS):
        value = record.get(key)
        for item in value if isinstance(value, list) else [value]:
            yield from item if isinstance(item, list) else [item]


def read_preference(record: dict[str, Any], where: str, wrong: Wrong, name: str, findings: Findings) -> Preference:
    """A preference record's images and turns, and the answers that may stand in the place of the last turn.

    A prompt that mentions no image begins with all of them, as TRL has it. What is read in another way than it is
    written is counted in `findings` under the record's `name`. Raises ValueError where there is no prompt, no answer,
    or more than one message of the answers differs.
    """
    for key, other in ((CHOSEN_KEY, REJECTED_KEY), (REJECTED_KEY, CHOSEN_KEY)):
        if value_of(record, key) is None:
            raise ValueError(
                f"{where}: key {other!r} and no {key!r}{_did_you_mean(record, key)}; a preference record has both: add "
                f"it, or leave {other!r} out"
            )
    chosen = _conversation(record[CHOSEN_KEY], CHOSEN_KEY, wrong)
    rejected = _rejected(record[REJECTED_KEY], wrong)
    prompt = _prompt(record, where, wrong)
    whole = len(chosen) > 1 and chosen[0][0] != "gpt"
    if whole:
        if prompt is not None and _text(prompt) not in (_text(chosen[:-1]), _text(chosen[-2:-1])):
            findings.count(f"the prompt is not read: {CHOSEN_KEY!r} holds the whole conversation, with another", name)
        prompt = chosen[:-1]
    elif prompt is None:
        raise ValueError(
            f"{where}: found neither 'question' nor 'prompt' beside {CHOSEN_KEY!r} (found "
            f"{', '.join(map(repr, record))}){_did_you_mean(record, *PROMPT_KEYS)}; expected one, or lists of messages "
            "that begin with it: add it or remove the record"
        )
    if prompt[-1][0] != "human":
        raise ValueError(
            f"{where}: the prompt is {_roles(prompt)}; expected a user's message as its last, before {CHOSEN_KEY!r}"
        )
    for key, turns in ((CHOSEN_KEY, chosen), *((REJECTED_KEY, turns) for turns in rejected)):
        if turns[:-1] not in ([], prompt) or turns[-1][0] != "gpt":
            raise ValueError(
                f"{where}: key {key!r} holds {_roles(turns)} where the prompt is {_roles(prompt)}; expected one answer "
                f"behind it, the only message in which {CHOSEN_KEY!r} and {REJECTED_KEY!r} differ: cut the "
                "conversation at the first difference, or remove the record"
            )
    texts = [turns[-1][1].strip() for turns in rejected]
    if not all(texts):
        findings.count("a rejected answer is empty: it is left out", name)
    images = read_images(record, PREFERENCE_IMAGE_KEYS, wrong, name, findings)
    turns = [*_with_images(prompt, len(images)), ("gpt", chosen[-1][1].strip())]
    return Preference(images, tuple(turns), tuple(text for text in texts if text))


def _with_images(prompt: Turns, num_images: int) -> Turns:
    """The prompt with the images in front of its first question, where it does not mention them."""
    if not num_images or any(IMAGE_TAG in text for _, text in prompt):
        return prompt
    first = next((number for number, (role, _) in enumerate(prompt) if role == "human"), None)
    tags = f"{IMAGE_TAG}\n" * num_images
    return [(role, tags + text if number == first else text) for number, (role, text) in enumerate(prompt)]


def _prompt(record: dict[str, Any], where: str, wrong: Wrong) -> Turns | None:
    """Of the keys that may hold it; None where there is none."""
    found: dict[str, Turns] = {}
    for key in PROMPT_KEYS:
        value = value_of(record, key)
        if value is not None:
            found[key] = [("human", value)] if isinstance(value, str) else _conversation(value, key, wrong)
    first = next(iter(found), None)
    for key, turns in found.items():
        if turns != found[first]:
            raise ValueError(f"{where}: found {first!r} and {key!r}, which differ; expected one prompt: remove one")
    return None if first is None else found[first]


def _rejected(value: Any, wrong: Wrong) -> list[Turns]:
    """Conversations or answers; a list of texts or of lists of messages is several."""
    is_several = isinstance(value, list) and (not value or not isinstance(value[0], dict))
    items = value if is_several else [value]
    if not items:
        raise wrong(REJECTED_KEY, value, "an answer, or a list of answers")
    return [_conversation(item, REJECTED_KEY, wrong) for item in items]


def _conversation(value: Any, key: str, wrong: Wrong) -> Turns:
    """(role, text) of each message; a string is an answer. Roles that LLaVA has no name for stay as they are."""
    if isinstance(value, str):
        return [("gpt", value)]
    messages = value if isinstance(value, list) else [value]
    if not messages:
        raise wrong(key, value, "a string or messages")
    turns = []
    for number, message in enumerate(messages):
        place = f"{key}[{number}]" if isinstance(value, list) else key
        names = ("role", "content") if isinstance(message, dict) and "role" in message else ("from", "value")
        if not isinstance(message, dict) or not all(isinstance(value_of(message, name), str | list) for name in names):
            raise wrong(place, message, "a string, or messages with 'role' and 'content'")
        role, content = (message[name] for name in names)
        if not isinstance(role, str):
            raise wrong(place, message, "a message whose 'role' is a string")
        text = content if isinstance(content, str) else text_of_parts(content, place, wrong)
        turns.append((ROLES.get(role, role), text))
    return turns


def text_of_parts(parts: Sequence[Any], place: str, wrong: Wrong) -> str:
    """A message's texts, one behind the other as chat templates have them, with its image in front.

    Of several images those behind a text stay there.
    """
    texts: list[str] = []
    places: list[int] = []  # of images: how many texts are in front
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and not any(part.get(key) for key in ("image", "path", "url")):
            places.append(len(texts))
        elif kind == "image":
            raise wrong(f"{place} part {number}", part, "an image part without a name, and the name under 'image'")
        else:
            raise wrong(f"{place} part {number}", part, '{"type": "image"} or {"type": "text", "text": ...}')
    if len(places) == 1:
        places = [0]
    pieces = [f"{IMAGE_TAG}\n" * places.count(0)]
    for number, text in enumerate(texts, start=1):
        pieces += [text, IMAGE_TAG * places.count(number)]
    return "".join(pieces)


def _text(turns: Turns) -> str:
    return "\n".join(text.replace(IMAGE_TAG, "").strip() for _, text in turns)


def _roles(turns: Turns) -> str:
    shown = (role if role in ROLES.values() else repr(role)[:20] for role, _ in turns)
    return ", ".join(shown) if len(turns) <= 6 else f"{len(turns)} messages"


def _did_you_mean(record: dict[str, Any], *keys: str) -> str:
    near = ((found, meant) for found in record if (meant := meant_by(found)) in keys)
    return next((f"; did you mean {meant!r} by {found[:40]!r}?" for found, meant in near), "")
