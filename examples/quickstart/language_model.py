"""A tiny LLaMA learns the drawn sentences, and to put into a sentence what it was told before."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import Facts, seen_from_the_other
from fitting import batches, fit
from scenes import ATTRIBUTES, IMAGE_SIZE, PATCH_SIZE, Aspect, patch_labels
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaTokenizerFast

SIZES = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


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
        documents.append(tokenizer(text + end).input_ids)
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
    return documents, recalls


def recalled_tokens(facts: Facts, tokenizer: LlamaTokenizerFast) -> dict[int, float]:
    """`recalled_words` by token id, with weights that sum to 1."""
    words = recalled_words(facts)
    return {
        tokenizer(word, add_special_tokens=False).input_ids[0]: weight / sum(words.values())
        for word, weight in words.items()
    }


@dataclass(frozen=True)
class Told:
    """A scene told in words instead of pixels, and what may follow."""

    notes: Tensor
    """[P, A] int64: token ids of the words that hold at each of the P places, 0 where there is nothing to say."""
    text: list[int]
    """Token ids of a true sentence about the scene, with its end."""
    recall: dict[int, float]
    """`recalled_tokens` of all that is true."""


def told_scenes(data: Path, tokenizer: LlamaTokenizerFast, aspect: Aspect = "pad") -> list[Told]:
    """The scenes of pretrain.json and contrastive.json, as notes on the grid that the vision tower cuts them into."""
    words = torch.zeros(len(ATTRIBUTES), 1 + max(len(values) for values in ATTRIBUTES.values()), dtype=torch.long)
    for row, values in enumerate(ATTRIBUTES.values()):
        for column, value in enumerate(values):
            words[row, 1 + column] = tokenizer(value, add_special_tokens=False).input_ids[0]
    scenes = {}
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        labels = patch_labels(scene, IMAGE_SIZE // PATCH_SIZE, aspect)
        scenes[scene["image"]] = words.gather(1, labels).T, recalled_tokens(scene["facts"], tokenizer)
    told = []
    for name, end in (("pretrain.json", "\n"), ("contrastive.json", "</s>")):
        for sample in json.loads((data / name).read_text()):
            notes, recall = scenes[sample["image"]]
            text = tokenizer(sample["text"] + end, add_special_tokens=False).input_ids
            told.append(Told(notes=notes, text=text, recall=recall))
    return told


class LanguageTask(nn.Module):
    """What the language model learns from: sentences, and sentences behind notes.

    A large language model can put into a sentence what stands before it, so that LLaVA's connector only has to write
    what the image shows in the language model's own words. A tiny one that has read sentences alone has no use for
    what stands before; so this one is told scenes in notes: places that hold a few words each, as the mean of their
    embeddings.

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

    def tell(self, told: list[Told], eos: int) -> tuple[Tensor, Tensor]:
        """(loss of the sentences behind the notes, recall loss of </s> right behind the notes)."""
        embed = self.language_model.embed_tokens
        notes = torch.stack([one.notes for one in told])
        places = (embed(notes) * (notes > 0)[..., None]).sum(2) / (notes > 0).sum(2, keepdim=True).clamp(min=1)
        ids = self.padded([one.text for one in told])
        bos = embed(torch.ones(len(told), 1, dtype=torch.long))
        rows = torch.cat([bos, places, embed(ids)], dim=1)
        logits = self.lm_head(self.language_model(inputs_embeds=rows).last_hidden_state[:, places.shape[1] : -1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=self.pad)
        rows = torch.cat([places, embed(torch.full((len(told), 1), eos))], dim=1)  # as HACL reads an image
        last = self.lm_head(self.language_model(inputs_embeds=rows).last_hidden_state[:, -1])
        return loss, self.recall_loss(last, [one.recall for one in told])


def train_language_model(
    language_model: LlamaModel, lm_head: nn.Linear, data: Path, tokenizer: LlamaTokenizerFast, aspect: Aspect,
    steps: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Next-token prediction, in place; returns the last values of what `LanguageTask` says."""
    documents, recalls = language_documents(data, tokenizer, seed)
    scenes = told_scenes(data, tokenizer, aspect)
    task = LanguageTask(language_model, lm_head, tokenizer.pad_token_id)
    read, told = list(batches(len(documents), 48, steps, seed)), list(batches(len(scenes), 24, steps, seed))
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = read[step].tolist()
        loss, recall = task.read([documents[k] for k in chosen], [recalls[k] for k in chosen])
        told_loss, told_recall = task.tell([scenes[k] for k in told[step].tolist()], tokenizer.eos_token_id)
        values = {"loss": loss, "recall": recall, "told": told_loss, "told recall": told_recall}
        history.append({name: value.item() for name, value in values.items()})
        return loss + 2 * recall + told_loss + told_recall, history[-1]

    fit(task, loss_of, steps, 4e-3, "language model", line=1)
    recent = history[-10:]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]} if recent else {}
