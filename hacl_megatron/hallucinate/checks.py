"""Whether a language model's answer is a hallucinated caption: a reason to refuse it, or none."""

import re

from hacl_megatron.data.prepare.json_text import is_text
from hacl_megatron.hallucinate.lexicon import CONTEXT, lexicon

_REFUSAL = re.compile(
    r"^(i['’]?m (sorry|unable|not able)|i am (sorry|unable|not able)|sorry\b|i (can(no|['’])t|cannot|won['’]t)\b|"
    r"as an? (ai|language model)|unfortunately,? i\b|i (do not|don['’]t) have)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:the )?(?:new |false |hallucinated |rewritten |modified |incorrect )?(?:caption|output|answer): *",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SHORTEST, LONGEST = 0.5, 2.0
"""An answer's length in words as a share of the caption's."""


def cleaned(answer: str) -> str:
    """An answer without the wrapping that models add unasked: a label, quotes around the whole."""
    text = _LABEL.sub("", answer.strip(), count=1).strip()
    for first, last in ('""', "“”", "''", "``"):
        if len(text) > 1 and text[0] == first and text[-1] == last and first not in text[1:-1]:
            text = text[1:-1].strip()
    return text


def fault_of(answer: str, caption: str, others: list[str]) -> str | None:
    """Why a cleaned answer is no hallucinated caption of `caption`; None if it is. `others`: those accepted before."""
    if not answer:
        return "empty"
    if not is_text(answer):
        return "no Unicode text (it holds half of a surrogate pair)"
    if "\n" in answer or "\r" in answer:
        return "more than one line"
    if _REFUSAL.match(answer):
        return "a refusal"
    words, original = _words(answer), _words(caption)
    if not words:
        return "no words"
    if words == original:
        return "equal to the caption"
    if any(words == _words(other) for other in others):
        return "equal to another of this caption"
    share = len(words) / max(1, len(original))
    if not SHORTEST <= share <= LONGEST:
        return f"length {share:.2f} of the caption's (allowed: {SHORTEST} to {LONGEST:g})"
    new, old = set(words) - set(original) - CONTEXT["empty"], set(original) - set(words) - CONTEXT["empty"]
    if not new and not old:
        return "no content word differs" if sorted(words) != sorted(original) else "the same words in another order"
    if not new:
        return "only leaves words out"
    words_of = lexicon()
    if len(new) == len(old) and all(any(words_of.same_meaning(one, other) for other in old) for one in new):
        return "only synonyms differ"
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
