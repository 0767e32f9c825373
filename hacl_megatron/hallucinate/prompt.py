"""What the language model is asked: HACL's request (section 3.2 of the paper) in this project's words, with examples.

The paper has GPT-4 write a caption that disagrees with its image by adding things that are not there or by giving wrong
attributes and relations. Here one kind of error is asked for at a time, so that several captions of one image differ.
"""

VERSION = "1"
"""Part of an answer's key: answers to an earlier wording are not taken for answers to this one."""

_INSTRUCTIONS = (
    "You write training data that teaches vision-language models not to hallucinate. You are given a correct caption "
    "of an image you cannot see. Rewrite it into a caption that sounds just as natural but is false for that image. "
    "Rules: contradict what the caption says or add things it gives no reason to expect; never use a synonym or a "
    "more general word, which would still be true; keep its style, its language and about its length; change one to "
    "three details and keep the rest word for word; answer with the new caption alone, on one line, without quotes, "
    "labels or remarks."
)

FOCUSES = (
    ("object", "Add or exchange objects: name something that is not in the image."),
    ("attribute", "Make attributes or counts wrong: colour, size, material, age, number."),
    ("relation", "Make a relation wrong: who does what, an action, where things are."),
)
"""Kinds of error, asked for in turn: the m-th caption of an image gets the m-th."""

_EXAMPLES = (
    (0, "A woman is cutting a pizza on a wooden table.", "A woman is cutting a birthday cake on a wooden table."),
    (0, "vintage red bicycle leaning against a wall", "vintage red bicycle and a cello leaning against a wall"),
    (1, "Two brown dogs sleep on a grey couch.", "Five white dogs sleep on a grey couch."),
    (1, "small glass bottle on black background", "large wooden bottle on yellow background"),
    (2, "A man riding a horse in front of a barn.", "A man washing a horse behind a barn."),
    (2, "a cat sits under the table and looks at a bird", "a cat sits on the table and runs from a bird"),
)


def messages(caption: str, number: int) -> list[dict[str, str]]:
    """The chat for hallucinated caption `number` (from 0) of an image; the caption stands on one line."""
    focus = number % len(FOCUSES)
    chat = [{"role": "system", "content": f"{_INSTRUCTIONS} {FOCUSES[focus][1]}"}]
    for kind, original, falsified in _EXAMPLES:
        if kind == focus:
            chat += [{"role": "user", "content": original}, {"role": "assistant", "content": falsified}]
    return [*chat, {"role": "user", "content": " ".join(caption.split())}]
