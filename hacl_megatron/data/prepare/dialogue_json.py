"""The dialogue of a record, as LLaVA's, ShareGPT's and OpenAI's users write it.

conversations: [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
messages:      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ...]
    → (human, "<image>\\nWhat is it?"), (gpt, "A cat.")                     a first turn of `system` stays
"""

from typing import Any

from hacl_megatron.data.prepare.json_text import is_deep
from hacl_megatron.data.prepare.preference_json import ROLES, text_of_parts
from hacl_megatron.data.prepare.records.keys import ANSWER_KEYS, meant_by
from hacl_megatron.data.prepare.records.values import Wrong, value_of


def turns_of(record: dict[str, Any], where: str, wrong: Wrong) -> tuple[tuple[Any, Any], ...]:
    """(from, value) of a LLaVA record's turns."""
    key = key_of_turns(record)
    if key not in record:
        strange = {key: meant for key in record if (meant := meant_by(key)) in ANSWER_KEYS}
        hint = "".join(f"did you mean {meant!r} by {key[:40]!r}? " for key, meant in strange.items())
        raise ValueError(
            f"{where}: key 'conversations' is missing (found {', '.join(map(repr, record)) or 'none'}); {hint}expected "
            "a list of turns with 'from' and 'value', 'messages' with 'role' and 'content', or 'question', 'chosen' "
            "and 'rejected': is it a LLaVA file?"
        )
    conversations = record[key]
    if not isinstance(conversations, list):
        raise wrong(key, conversations, "a list of turns with 'from' and 'value', or 'role' and 'content'")
    turns = []
    for number, turn in enumerate(conversations):
        place = f"{key}[{number}]"
        names = ("role", "content") if isinstance(turn, dict) and "from" not in turn else ("from", "value")
        if not isinstance(turn, dict) or not all(name in turn for name in names):
            raise wrong(place, turn, "an object with 'from' and 'value', or 'role' and 'content'")
        role, said = (turn[name] for name in names)
        if names[0] == "role" and isinstance(said, list):
            said = text_of_parts(said, place, wrong)
        role = ROLES.get(role, role) if isinstance(role, str) else _shallow(role)
        turns.append((role, said if type(said) is str else _shallow(said)))
    return tuple(turns)


def key_of_turns(record: dict[str, Any]) -> str:
    """Under which key a decoded record has its dialogue: LLaVA's or ShareGPT's, else OpenAI's."""
    no_turns = value_of(record, "conversations") is None
    return "messages" if no_turns and value_of(record, "messages") is not None else "conversations"


def _shallow(value: Any) -> Any:
    """`value`; one that is nested so deep that whatever looks at it may run out of stack, empty.

    It is no string in any case, which is all that is said of it when the sample is drawn.
    """
    return type(value)() if is_deep(value) else value
