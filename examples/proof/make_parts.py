"""Makes what stands before any arm: a vision tower that has seen the world and a language model that has read about it.

    python examples/proof/make_parts.py --data output/proof/data --output output/proof/model

Writes them as Hugging Face folders, OUTPUT/language and OUTPUT/tower; both are frozen in stage 1 of every arm.

    vision tower     CLIP's architecture; learns what every patch shows (colour, shape, size, background) from hidden
                     state -2, which is what LLaVA reads. Not CLIP's own loss: see the protocol.
    language model   LLaMA's architecture; reads alt texts, descriptions and dialogues, alone and behind *notes*, that is,
                     places that hold words of what stands there as the mean of their embeddings. So it can already
                     describe and answer what it was told in its own words, as Vicuna can; what it lacks is eyes.

HACL reads the state at </s>. In a large language model that state holds what was read; a small one has no reason to keep
it, so this one is given one: a linear probe, thrown away afterwards, tells from it which facts were stated.
"""

import argparse
import io
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draw_world import dialogue_sample, read_scene, read_scenes
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, LlamaTokenizerFast, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging
from world import (
    BACKGROUNDS,
    BRIEF,
    COLOURS,
    DETAILED,
    OPENINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Mention,
    Scene,
    Statement,
    alt_text,
    description,
    hallucinate,
    mention_of,
    phrase,
    sentence,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import make_model as quickstart  # noqa: E402
from make_model import TowerTask, batches, build, fit, language_parts, make_processor, square_pixels  # noqa: E402

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "background": BACKGROUNDS}
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GRID = quickstart.IMAGE_SIZE // quickstart.PATCH_SIZE
SHOWN = 0.15
"""A patch shows a thing that covers at least this share of it."""
SYSTEM = quickstart.VICUNA_PROMPT.removesuffix("USER: ASSISTANT:")


def patch_labels(record: dict[str, Any]) -> Tensor:
    """[A, GRID * GRID] int64 of a line of scenes.jsonl: what each patch shows of `ATTRIBUTES`, 0 for no thing."""
    edges = torch.arange(GRID + 1) * quickstart.PATCH_SIZE
    labels = torch.zeros(len(ATTRIBUTES), GRID, GRID, dtype=torch.long)
    labels[3] = 1 + BACKGROUNDS.index(record["background"])
    for thing in record["things"]:
        left, top, right, bottom = thing["box"]
        wide = (edges[1:].clamp(max=right) - edges[:-1].clamp(min=left)).clamp(min=0)
        high = (edges[1:].clamp(max=bottom) - edges[:-1].clamp(min=top)).clamp(min=0)
        covered = high[:, None] * wide[None, :] >= SHOWN * quickstart.PATCH_SIZE**2
        for row, name in enumerate(("colour", "shape", "size")):
            labels[row, covered] = 1 + ATTRIBUTES[name].index(thing[name])
    return labels.flatten(1)


# --- vision tower -----------------------------------------------------------------------------------------------


def train_tower(tower: nn.Module, data: Path, steps: int, seed: int) -> float:
    """Trains `tower` in place on the split `parts`; returns the share of dev's patches with colour and shape right."""
    task = TowerTask(tower, ATTRIBUTES)

    def load(split: str) -> tuple[Tensor, Tensor]:
        records = [record for name, record in read_scenes(data).items() if name.startswith(split)]
        pixels = [square_pixels(Image.open(data / "images" / record["image"]), tower.config.image_size) for record in records]
        return torch.stack(pixels), torch.stack([patch_labels(record) for record in records])

    if steps:
        pixels, labels = load("parts")
        index = list(batches(len(pixels), 48, steps, seed))

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            x, y = pixels[index[step]], labels[index[step]]
            if step % 2:  # in a mirror
                x, y = x.flip(-1), y.unflatten(-1, (GRID, GRID)).flip(-1).flatten(-2)
            if step // 2 % 2:  # upside down
                x, y = x.flip(-2), y.unflatten(-1, (GRID, GRID)).flip(-2).flatten(-2)
            loss, accuracy = task(x, y)
            return loss, {"loss": loss.item(), "patches right": accuracy.item()}

        fit(task, loss_of, steps, 2e-3, "vision tower", line=0)
    with torch.no_grad():
        return task(*load("dev"))[1].item()


# --- language model ---------------------------------------------------------------------------------------------


def facts_of(statement: Statement) -> list[int]:
    """Indices of the facts that a statement makes: kinds with their size, number, and place in a relation."""
    facts = []
    for at, mention in enumerate(statement.mentions):
        kind = COLOURS.index(mention.colour) * len(SHAPES) + SHAPES.index(mention.shape)
        aspects = [0, mention.number]
        aspects += [4 + SIZES.index(mention.size)] if mention.size else []
        if statement.relation:
            relation = RELATIONS.index(statement.relation)
            aspects.append(6 + (relation ^ at))  # "a left of b" says of b that it is right of something
        facts += [aspect * len(COLOURS) * len(SHAPES) + kind for aspect in aspects]
    return facts


NUM_FACTS = 10 * len(COLOURS) * len(SHAPES)


def whole_statement(scene: Scene) -> Statement:
    return Statement(tuple(mention_of(group, True) for group in scene.groups))


@dataclass(frozen=True)
class Document:
    """A row of text, perhaps behind notes."""

    before: list[int]
    """Token ids in front of the notes."""
    scene: int | None
    """Number of the scene told in notes; None: text alone, all of it in `after`."""
    after: list[int]
    learned: list[bool]
    """Which of `after` are to be predicted."""
    facts: list[int] | None
    """What the state at the last token shall hold."""


class Library:
    """Writes documents about the scenes of the split `parts`, without end."""

    def __init__(self, data: Path, tokenizer: LlamaTokenizerFast, seed: int) -> None:
        records = [record for name, record in read_scenes(data).items() if name.startswith("parts")]
        self.scenes = [read_scene(record) for record in records]
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        words = torch.zeros(len(ATTRIBUTES), 1 + max(map(len, ATTRIBUTES.values())), dtype=torch.long)
        for row, values in enumerate(ATTRIBUTES.values()):
            for column, value in enumerate(values):
                words[row, 1 + column] = tokenizer(value, add_special_tokens=False).input_ids[0]
        labels = torch.stack([patch_labels(record) for record in records])
        self.notes = torch.stack([words[row][labels[:, row]] for row in range(len(ATTRIBUTES))], dim=-1)
        """[S, P, A] token ids, 0 where there is nothing to say."""

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def read(self) -> Document:
        """An alt text, its twin or a description, ended by </s> with what it said, or as stage 1 ends it."""
        scene = self.rng.choice(self.scenes)
        statement, opening = alt_text(self.rng, scene)
        if self.rng.random() < 0.4:
            statement = hallucinate(self.rng, statement, scene)[1]
        elif self.rng.random() < 0.2:
            statement, opening = whole_statement(scene), "The picture shows "
        ids = self.ids(sentence(statement, opening))
        return Document([], None, [1, *ids, 2], [True] * (len(ids) + 2), facts_of(statement))

    def told(self) -> Document:
        """Stage 1's template behind notes."""
        at = self.rng.randrange(len(self.scenes))
        after = self.ids(sentence(*alt_text(self.rng, self.scenes[at])) + "\n")
        return Document([1], at, after, [True] * len(after), None)

    def glance(self, prompt: bool) -> Document:
        """Notes and </s> alone, as HACL reads an image."""
        at = self.rng.randrange(len(self.scenes))
        return Document([1] if prompt else [], at, [2], [False], facts_of(whole_statement(self.scenes[at])))

    def dialogue(self, with_system: bool) -> Document:
        """Stage 2's template behind notes, with or without Vicuna's system prompt."""
        at = self.rng.randrange(len(self.scenes))
        turns = dialogue_sample(self.rng, "", self.scenes[at])["conversations"]
        system = SYSTEM if with_system else ""
        after, learned = self.ids("\n" + turns[0]["value"].removeprefix("<image>\n") + " ASSISTANT:"), []
        learned += [False] * len(after)
        for number, turn in enumerate(turns[1:]):
            answers = number % 2 == 0
            piece = self.ids(turn["value"]) + [2] if answers else self.ids(f"USER: {turn['value']} ASSISTANT:")
            after += piece
            learned += [answers] * len(piece)
        return Document([1, *self.ids(system + "USER: ")], at, after, learned, None)


class LanguageTask(nn.Module):
    """Next-token prediction, and the facts told from the last state by a probe."""

    def __init__(self, model: LlavaForConditionalGeneration, library: Library) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.probe = nn.Linear(model.config.text_config.hidden_size, NUM_FACTS)
        self.notes = library.notes

    def forward(self, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
        """(loss of the learned tokens, loss of the facts), each 0 where there is none to learn."""
        embed = self.language_model.embed_tokens
        rows, targets, last = [], [], []
        for document in documents:
            parts = [embed(torch.tensor(document.before, dtype=torch.long))]
            if document.scene is not None:
                notes = self.notes[document.scene]
                parts.append((embed(notes) * (notes > 0)[..., None]).sum(1) / (notes > 0).sum(1, keepdim=True).clamp(min=1))
            before = sum(map(len, parts))
            parts.append(embed(torch.tensor(document.after)))
            rows.append(torch.cat(parts))
            learned = [token if wanted else -100 for token, wanted in zip(document.after, document.learned, strict=True)]
            targets.append(torch.tensor([-100] * before + learned))
            last.append(len(rows[-1]) - 1)
        states = self.language_model(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ).last_hidden_state
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]
        chosen = wanted != -100
        loss = F.cross_entropy(self.lm_head(states[:, :-1][chosen]), wanted[chosen]) if chosen.any() else states.sum() * 0
        with_facts = [row for row, document in enumerate(documents) if document.facts is not None]
        if not with_facts:
            return loss, states.sum() * 0
        hot = torch.zeros(len(with_facts), NUM_FACTS)
        for row, at in enumerate(with_facts):
            hot[row, documents[at].facts] = 1.0
        logits = self.probe(states[with_facts, [last[at] for at in with_facts]])
        return loss, F.binary_cross_entropy_with_logits(logits, hot, reduction="sum") / len(with_facts)


def train_language_model(
    model: LlavaForConditionalGeneration, data: Path, tokenizer: LlamaTokenizerFast, steps: int, seed: int
) -> dict[str, float]:
    """In place; returns the last values of what `LanguageTask` says of each kind of document."""
    library = Library(data, tokenizer, seed)
    task = LanguageTask(model, library)
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        read, facts = task([library.read() for _ in range(24)])
        told, _ = task([library.told() for _ in range(20)])
        _, glanced = task([library.glance(prompt=step % 2 == 0) for _ in range(24)])
        dialogue, _ = task([library.dialogue(with_system=step % 4 == 0) for _ in range(20)])  # a long prompt
        values = {"read": read, "facts": facts, "told": told, "glanced": glanced, "dialogue": dialogue}
        history.append({name: value.item() for name, value in values.items()})
        return read + told + 2 * dialogue + 0.1 * facts + 0.1 * glanced, history[-1]

    fit(task, loss_of, steps, 3e-3, "language model", line=1)
    recent = history[-20:]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]} if recent else {}


# --- both -------------------------------------------------------------------------------------------------------


def corpus(data: Path) -> list[str]:
    """Sentences that hold every word of the world."""
    rng = random.Random(0)
    scenes = [read_scene(record) for record in list(read_scenes(data).values())[:2000]]
    lines = [*BRIEF, DETAILED, *OPENINGS, "Yes.", "No."]
    for scene in scenes:
        lines += [sentence(*alt_text(rng, scene)), description(scene)]
        lines += [turn["value"].removeprefix("<image>\n") for turn in dialogue_sample(rng, "", scene)["conversations"]]
    for shape in SHAPES:
        lines += [sentence(Statement((Mention(colour, shape, None, 2),))) for colour in COLOURS]
    lines += [f"{word} " * 3 for word in (*BACKGROUNDS, *COLOURS, *SHAPES, *SIZES)]
    return lines


def new_model(data: Path, seed: int) -> tuple[LlavaForConditionalGeneration, LlamaTokenizerFast]:
    tokenizer = quickstart.train_tokenizer(corpus(data))
    return build(tokenizer, seed, VISION, LANGUAGE), tokenizer


def language_worker(data: Path, steps: int, seed: int) -> tuple[bytes, dict[str, float]]:
    """A process of its own: (trained weights of `language_parts`, what `train_language_model` reached)."""
    torch.set_num_threads(1)
    model, tokenizer = new_model(data, seed)
    reached = train_language_model(model, data, tokenizer, steps, seed)
    buffer = io.BytesIO()
    torch.save(language_parts(model).state_dict(), buffer)
    return buffer.getvalue(), reached


def save_parts(model: LlavaForConditionalGeneration, tokenizer: LlamaTokenizerFast, output: Path) -> None:
    """OUTPUT/language (a LLaMA with its tokenizer) and OUTPUT/tower (a CLIP tower with its image processor).

    No connector: each run draws its own from its seed.
    """
    llama = LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(output / "language")
    tokenizer.save_pretrained(output / "language")
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(output / "tower")
    make_processor(tokenizer).image_processor.save_pretrained(output / "tower")


def make_parts(data: Path, output: Path, tower_steps: int, language_steps: int, seed: int) -> None:
    """Trains both side by side and writes the LLaVA."""
    start = time.monotonic()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = new_model(data, seed)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        reading = pool.submit(language_worker, data, language_steps, seed)
        seen = train_tower(model.model.vision_tower, data, tower_steps, seed)
        print(f"vision tower: colour and shape right in {seen:.1%} of the held-out patches", flush=True)
        weights, reached = reading.result()
    language_parts(model).load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    save_parts(model, tokenizer, output)
    reached = {"patches right": seen} | reached | {"seconds": time.monotonic() - start}
    (output / "parts.json").write_text(json.dumps(reached, indent=1) + "\n")
    print(f"{output}: {len(tokenizer)} tokens; " + ", ".join(f"{name} {value:.3f}" for name, value in reached.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--output", type=Path, default=Path("output/proof/model"))
    parser.add_argument("--tower-steps", type=int, default=2500)
    parser.add_argument("--language-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    make_parts(args.data, args.output, args.tower_steps, args.language_steps, args.seed)


if __name__ == "__main__":
    main()
