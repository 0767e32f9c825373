"""A tiny LLaMA learns the drawn sentences, and to say what it was told before, in captions and in dialogues."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import REQUESTS, Facts, seen_from_the_other
from fitting import batches, fit
from scenes import ATTRIBUTES, IMAGE_SIZE, PATCH_SIZE, Aspect, patch_labels
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaTokenizerFast

SIZES = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
READ, CAPTIONED, ASKED = 20, 28, 20
"""Rows of each kind in a step: documents, captions behind notes, questions behind notes."""
WITH_SYSTEM = 4
"""Every so many steps the dialogues have their whole beginning."""
FACT_WEIGHT, LATER_WEIGHT = 3.0, 8.0
"""Of a word that says what is there, and of one behind a relation; other words weigh 1."""


def llama_config(tokenizer: LlamaTokenizerFast, sizes: Mapping[str, int] = SIZES) -> LlamaConfig:
    """A LLaMA of tiny sizes, with rows beyond the tokenizer, as in LLaVA-1.5's own checkpoints."""
    return LlamaConfig(
        **sizes, vocab_size=-(-len(tokenizer) // 64) * 64, bos_token_id=1, eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip


def recalled_words(facts: Facts) -> dict[str, float]:
    """What a reader keeps of a sentence: its words with weights, those of the left or upper thing counting double.

    'A red star right of a blue ring' and 'a blue ring left of a red star' say the same and give the same.
    """
    if facts.get("relation") in ("right of", "below"):
        facts = seen_from_the_other(facts)
    words: dict[str, float] = {}
    for key, value in facts.items():
        word = value.split()[0] if key == "relation" else value.split()[-1]
        words[word] = words.get(word, 0.0) + (1.0 if key.startswith("other") else 2.0)
    return words


def language_documents(
    data: Path, tokenizer: LlamaTokenizerFast, seed: int
) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Token ids of short documents, and for each the weights of the words that its last </s> shall recall (or none)."""
    rng = random.Random(seed)
    documents, recalls = [], []

    def add(text: str, facts: Facts, end: str = "</s>") -> None:
        documents.append(text + end)
        recalls.append(recalled_tokens(facts, tokenizer))

    for name in ("pretrain.json", "contrastive.json"):
        for sample in json.loads((data / name).read_text()):
            add(sample["text"], sample["facts"])
            if rng.random() < 0.2:  # stage 1's `plain` template ends captions with a newline
                add(sample["text"], {}, "\n")
            twins, wrong = sample.get("Hallucination caption", []), sample.get("hallucinated facts", [])
            if isinstance(twins, str):
                twins, wrong = [twins], [wrong]
            for twin, change in zip(twins, wrong, strict=True):
                add(twin, sample["facts"] | change)
    for sample in json.loads((data / "finetune.json").read_text()):
        turns = [turn["value"].replace("<image>\n", "") for turn in sample["conversations"][:2]]
        add(" ".join(turns), {})
    return tokenizer(documents).input_ids, recalls


@cache
def word_id(word: str, tokenizer: LlamaTokenizerFast) -> int:
    """Of a word that is a token."""
    return tokenizer(word, add_special_tokens=False).input_ids[0]


def recalled_tokens(facts: Facts, tokenizer: LlamaTokenizerFast) -> dict[int, float]:
    """`recalled_words` by token id, with weights that sum to 1."""
    words = recalled_words(facts)
    return {word_id(word, tokenizer): weight / sum(words.values()) for word, weight in words.items()}


@dataclass(frozen=True)
class Told:
    """A scene told in words instead of pixels, and what may stand around it."""

    notes: Tensor
    """[P, A] int64: token ids of the words that hold at each of the P places, 0 where there is nothing to say."""
    before: list[int]
    """Token ids in front of the notes: BOS, and in a dialogue its beginning."""
    asked: list[int]
    """Token ids behind the notes that are given: the question, in a dialogue."""
    text: list[int]
    """Token ids to learn: a caption of the scene or the answer to the question, with its end."""
    weights: list[float]
    """Of the tokens of `text`."""
    recall: dict[int, float]
    """`recalled_tokens` of all that is true."""


def noted_scenes(data: Path, tokenizer: LlamaTokenizerFast, aspect: Aspect) -> dict[str, tuple[Tensor, Facts]]:
    """By image: notes on the grid that the vision tower cuts it into, and the scene's facts."""
    words = torch.zeros(len(ATTRIBUTES), 1 + max(len(values) for values in ATTRIBUTES.values()), dtype=torch.long)
    for row, values in enumerate(ATTRIBUTES.values()):
        for column, value in enumerate(values):
            words[row, 1 + column] = word_id(value, tokenizer)
    scenes = {}
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        if not scene["image"].startswith("parts"):  # nobody tells of them
            labels = patch_labels(scene, IMAGE_SIZE // PATCH_SIZE, aspect)
            scenes[scene["image"]] = words.gather(1, labels).T, scene["facts"]
    return scenes


def told_scenes(
    data: Path, tokenizer: LlamaTokenizerFast, dialogue: tuple[str, str, str], aspect: Aspect = "pad"
) -> tuple[list[Told], list[Told]]:
    """(captions, dialogues): of pretrain.json, and of finetune.json the requests to describe the image.

    Scenes of two things are there twice, and words behind a relation weigh most: to name the second thing, and not the
    first again, is learnt last.

    Args:
        dialogue: what stands before the image, between it and the question, and between question and answer.
    """
    scenes = noted_scenes(data, tokenizer, aspect)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    words = [word for values in ATTRIBUTES.values() for word in values] + ["above", "below", "Yes", "No"]
    relations = {word_id(word, tokenizer) for word in ("left", "right", "above", "below")}
    facts_said = {word_id(word, tokenizer) for word in words}

    def weights(text: list[int]) -> list[float]:
        found, later = [], False
        for token in text:
            found.append((LATER_WEIGHT if later else FACT_WEIGHT) if token in facts_said else 1.0)
            later |= token in relations
        return found

    opening, link, turn = dialogue
    opened = [1, *ids(opening)]
    captions, dialogues = [], []
    for name, found in (("pretrain.json", captions), ("finetune.json", dialogues)):
        for sample in json.loads((data / name).read_text()):
            if found is dialogues and sample["conversations"][0]["value"].removeprefix("<image>\n") not in REQUESTS:
                continue
            notes, facts = scenes[sample["image"]]
            recall = recalled_tokens(facts, tokenizer)
            if found is captions:
                text = ids(sample["text"] + "\n")
                one = Told(notes, [1], [], text, weights(text), recall)
            else:
                question, answer = (one["value"] for one in sample["conversations"][:2])
                question = question.replace("<image>\n", "")
                text = [*ids(answer), tokenizer.eos_token_id]
                one = Told(notes, opened, ids(f"{link}{question}{turn}"), text, weights(text), recall)
            found += [one] * (2 if "relation" in facts else 1)
    return captions, dialogues


class LanguageTask(nn.Module):
    """What the language model learns from: sentences, and sentences behind notes.

    A large language model can put into a sentence what stands before it, so that LLaVA's connector only has to write
    what the image shows in the language model's own words. A tiny one that has read sentences alone has no use for
    what stands before; so this one is told scenes in notes: places that hold a few words each, as the mean of their
    embeddings. What a scene shows weighs more than how it is put, which nobody can foresee.

    HACL reads the state at </s>. In a large model it holds what was read; a tiny one has no reason to keep that, so
    this one is given one: the state at </s> predicts the words that the sentence, or the notes, have stated.
    """

    def __init__(self, language_model: LlamaModel, lm_head: nn.Linear, pad: int) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        self.pad = pad

    def padded(self, rows: list[list[int]]) -> Tensor:
        """[B, L] token ids; padded behind, where causal rows never see it."""
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])

    def recall_loss(self, logits: Tensor, recalls: list[dict[int, float]]) -> Tensor:
        """Cross entropy of logits [B, vocabulary] with the words to recall, above its minimum; none: left out."""
        wanted = torch.zeros_like(logits)
        for row, words in enumerate(recalls):
            wanted[row, list(words)] = torch.tensor(list(words.values()))
        apart = (torch.xlogy(wanted, wanted) - wanted * logits.log_softmax(-1)).sum(-1)
        return apart[wanted.sum(-1) > 0].mean()

    def read(self, documents: list[list[int]], recalls: list[dict[int, float]]) -> tuple[Tensor, Tensor]:
        """(loss, recall loss) of documents that end in the place to recall at."""
        ids = self.padded(documents)
        logits = self.lm_head(self.language_model(input_ids=ids).last_hidden_state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=self.pad)
        last = logits[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in documents])]
        return loss, self.recall_loss(last, recalls)

    def states(self, told: list[Told], behind: list[list[int]]) -> Tensor:
        """Last hidden states [B, L, hidden] behind the notes' last place; `behind` are the token ids there."""
        embed = self.language_model.embed_tokens
        notes = torch.stack([one.notes for one in told])
        said = (notes > 0)[..., None]
        places = (embed(notes) * said).sum(2) / said.sum(2).clamp(min=1)
        before = embed(torch.tensor([one.before for one in told]))
        rows = torch.cat([before, places, embed(self.padded(behind))], dim=1)
        states = self.language_model(inputs_embeds=rows).last_hidden_state
        return states[:, before.shape[1] + places.shape[1] - 1 :]

    def tell(self, told: list[Told]) -> Tensor:
        """Loss of the sentences behind the notes; all have equally many tokens `before` them."""
        states = self.states(told, [one.asked + one.text for one in told])[:, :-1]
        ids = self.padded([[self.pad] * len(one.asked) + one.text for one in told])
        wanted = ids != self.pad
        losses = F.cross_entropy(self.lm_head(states[wanted]), ids[wanted], reduction="none")
        weights = torch.tensor([weight for one in told for weight in one.weights])
        return (losses * weights).sum() / weights.sum()

    def glance(self, told: list[Told], eos: int) -> Tensor:
        """Recall loss of </s> right behind the notes, as HACL reads an image."""
        states = self.states(told, [[eos]] * len(told))[:, -1]
        return self.recall_loss(self.lm_head(states), [one.recall for one in told])


def train_language_model(
    language_model: LlamaModel, lm_head: nn.Linear, data: Path, tokenizer: LlamaTokenizerFast, aspect: Aspect,
    dialogue: tuple[str, str, str], steps: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Next-token prediction, in place; returns the last values of what `LanguageTask` says."""
    documents, recalls = language_documents(data, tokenizer, seed)
    captions, dialogues = told_scenes(data, tokenizer, dialogue, aspect)
    task = LanguageTask(language_model, lm_head, tokenizer.pad_token_id)
    orders = [
        list(batches(len(kind), size, steps, seed))
        for kind, size in ((documents, READ), (captions, CAPTIONED), (dialogues, ASKED))
    ]
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        read, described, asked = (order[step].tolist() for order in orders)
        loss, recall = task.read([documents[k] for k in read], [recalls[k] for k in read])
        shown, questioned = [captions[k] for k in described], [dialogues[k] for k in asked]
        if step % WITH_SYSTEM:  # the dialogues' beginning is long
            questioned = [replace(one, before=[1]) for one in questioned]
        told, answered = task.tell(shown), task.tell(questioned)
        told_recall = task.glance(shown if step % 2 else questioned, tokenizer.eos_token_id)
        values = {"loss": loss, "recall": recall, "told": told, "answered": answered, "told recall": told_recall}
        history.append({name: value.item() for name, value in values.items()})
        return loss + 2 * recall + told + answered + told_recall, history[-1]

    fit(task, loss_of, steps, 4e-3, "language model", line=1, matrices_lr=8e-3)
    recent = history[-10:]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]} if recent else {}
