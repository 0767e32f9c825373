"""A small raw data set whose records have every oddity, and how the tests prepare it."""

from pathlib import Path

from hacl_megatron.data.prepare.run import PrepareSettings

ROOT = Path(__file__).parents[3]


def turns(question: str = "What is it?", answer: str = "a red cat") -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


RECORDS = [
    {"id": "1", "image": "a/1.jpg", "conversations": turns()},
    {"id": 2, "image": "a/2.png", "conversations": turns(), "text": " A cat.\n", "Hallucination caption": "A dog."},
    {"id": "3", "image": "b/3.jpg", "conversations": turns(), "Hallucination caption": ["A dog. ", "", "A <unk> cat"]},
    {"id": "4", "conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "yes"}]},
    {"image": "b/3.jpg", "conversations": turns("é 日本 😀", "<unk> a  cat"), "caption": ""},
    {"conversations": [{"from": "human", "value": "no answer"}], "text": ""},
    {"id": "\ud83d", "image": "c/\ud83d.jpg", "conversations": turns("\ud83d"), "text": "\ud83d"},
    {"id": "8", "image": "b/3.jpg", "conversations": [{"from": 1, "value": None}, {"from": "gpt", "value": [2]}]},
    {"id": "9", "image": "b/3.jpg", "conversations": []},
    {"id": "10", "image": "a/1.jpg", "conversations": [*turns(), *turns("US", "")[:1], *turns(answer="")[1:]]},
    {"id": "11", "image": "a/1.jpg", "conversations": [turns()[1], *turns("red </s> dog", "</s>")]},
    {"id": "12", "image": "a/1.jpg", "conversations": [*turns(), *turns()]},  # two tags: unusable
]  # fmt: skip


def settings(source: Path, **changes) -> PrepareSettings:
    options = {"inputs": [str(source / "a.json")], "output": str(source / "out"), "progress_bar": False}
    return PrepareSettings(**(options | changes))
