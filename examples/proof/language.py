"""What the language model reads before any arm: sentences, and dialogues about scenes that it is told of.

HACL reads the state at </s>. In a large language model that state holds what was read; a small one has no reason to
keep it, so this one is given one: a linear probe, thrown away afterwards, tells from it which facts were stated.

Scenes are told in *notes*: sixteen places, as an image has, each the mean of the embeddings of the words that hold
there. Such a model can describe and answer behind anything that resembles its words; what it lacks is eyes. A stand-in
for a large model that takes soft tokens in its stride.

A question such as "Is there a red cross?" is hard for a small model: it learns soon whether anything is red and whether
there is a cross, and whether both are one thing perhaps thousands of steps later, or not at all. `train_to_match`
teaches that in two steps, by probes of the first layers that are thrown away.

`train_to_tell` makes of it a second model, whose state at </s> tells captions from their twins nearly as well as its
likelihoods do.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaTokenizerFast
from world import (
    COLOURS,
    DETAILED,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Statement,
    alt_text,
    as_on_the_web,
    description,
    hallucinate,
    mention_of,
    question_about,
    recombined_kinds,
    sentence,
    yes_no_question,
)

READ, CAPTIONED, GLANCED, DESCRIBED, QUIZZED = 24, 20, 24, 10, 16
"""Rows of each kind of document in a step."""
QUESTIONS = 6
"""Of a quiz."""
LESSONS, LESSON_QUESTIONS, DESCRIBED_BESIDE = 20, 8, 6
"""Rows of a step of `train_to_match`, their questions, and rows with descriptions beside them."""
WITH_SYSTEM = 4
"""Every so many steps the dialogues have the system prompt, which is long."""
TOLD_APART = 48
"""Scenes of a step of `train_to_tell`."""
NUM_FACTS = 10 * len(COLOURS) * len(SHAPES)


def facts_of(statement: Statement) -> list[int]:
    """Indices of the facts that a statement makes: kinds with their size, number, and place in a relation."""
    facts = []
    for at, mention in enumerate(statement.mentions):
        kind = COLOURS.index(mention.colour) * len(SHAPES) + SHAPES.index(mention.shape)
        aspects = [0, mention.number]
        aspects += [4 + SIZES.index(mention.size)] if mention.size else []
        if statement.relation:
            aspects.append(6 + (RELATIONS.index(statement.relation) ^ at))  # of "a left of b", b is right of something
        facts += [aspect * len(COLOURS) * len(SHAPES) + kind for aspect in aspects]
    return facts


def whole_statement(scene: Scene) -> Statement:
    return Statement(tuple(mention_of(group, True) for group in scene.groups))


@dataclass(frozen=True)
class Document:
    """A row: token ids, notes of a scene, token ids."""

    before: list[int]
    scene: int | None
    """Number of the scene told in notes behind `before`; None: nothing is told, and nothing in `before`."""
    after: list[int]
    learned: list[bool]
    """Which of `after` are to be predicted."""
    facts: list[int] | None
    """What the state at the last token shall hold."""


class Library:
    """Writes documents about scenes, without end.

    Args:
        scenes: S scenes.
        notes: [S, P, A] token ids of the words that hold at each place, 0 where there is nothing to say.
        system: the system prompt of stage 2's template.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        notes: Tensor,
        tokenizer: LlamaTokenizerFast,
        system: str,
        seed: int,
    ) -> None:
        self.scenes, self.notes = scenes, notes
        self.tokenizer, self.system = tokenizer, system
        self.rng = random.Random(f"library/{seed}")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def on_a_page(self, text: str) -> str:
        """The text, half of the time among what web captions say beside what is seen."""
        return as_on_the_web(self.rng, text) if self.rng.random() < 0.5 else text

    def read(self) -> Document:
        """An alt text, its twin or a description, ended by </s> with what it said."""
        scene = self.rng.choice(self.scenes)
        statement, opening = alt_text(self.rng, scene)
        if self.rng.random() < 0.4:
            statement = hallucinate(self.rng, statement, scene)[1]
        elif self.rng.random() < 0.2:
            statement, opening = whole_statement(scene), "The picture shows "
        ids = [1, *self.ids(self.on_a_page(sentence(statement, opening))), 2]
        return Document([], None, ids, [True] * len(ids), facts_of(statement))

    def captioned(self) -> Document:
        """Stage 1's template: a scene, and an alt text of it."""
        at = self.rng.randrange(len(self.scenes))
        after = self.ids(self.on_a_page(sentence(*alt_text(self.rng, self.scenes[at]))) + "\n")
        return Document([1], at, after, [True] * len(after), None)

    def glance(self, prompt: bool) -> Document:
        """A scene and </s> alone, as HACL reads an image."""
        at = self.rng.randrange(len(self.scenes))
        return Document([1] if prompt else [], at, [2], [False], facts_of(whole_statement(self.scenes[at])))

    def told_apart(self, prompt: bool) -> tuple[Document, Document, Document]:
        """A scene as HACL reads an image, and as it reads texts, an alt text and its twin in the same words."""
        at = self.rng.randrange(len(self.scenes))
        statement, opening = alt_text(self.rng, self.scenes[at])
        twin = hallucinate(self.rng, statement, self.scenes[at])[1]
        texts = [sentence(one, opening) for one in (statement, twin)]
        if self.rng.random() < 0.5:
            seed = self.rng.random()
            texts = [as_on_the_web(random.Random(seed), text) for text in texts]
        read = [Document([], None, [1, *self.ids(text), 2], [], None) for text in texts]
        return Document([1] if prompt else [], at, [2], [], None), *read

    def dialogue(self, with_system: bool, quiz: bool) -> Document:
        """Stage 2's template, with or without Vicuna's system prompt: a description and a question, or questions."""
        at = self.rng.randrange(len(self.scenes))
        scene = self.scenes[at]
        turns = [] if quiz else [(DETAILED, description(scene))]
        for _ in range(QUESTIONS if quiz else 1):
            answer = self.rng.random() < 0.5
            adversarial = self.rng.random() < 0.8
            turns.append((yes_no_question(self.rng, scene, adversarial, answer), "Yes." if answer else "No."))
        after, learned = [], []
        for number, (question, answer) in enumerate(turns):
            asked = self.ids(("USER: " if number else "\n") + question + " ASSISTANT:")
            answered = [*self.ids(answer), 2]
            after += asked + answered
            learned += [False] * len(asked) + [True] * len(answered)
        return Document([1, *self.ids((self.system if with_system else "") + "USER: ")], at, after, learned, None)

    def lesson(self) -> "Lesson":
        """Questions whose colour and shape are both there, half of the time on one thing."""
        while not (absent := recombined_kinds(scene := self.scenes[at := self.rng.randrange(len(self.scenes))])):
            pass
        after, learned, asked = [], [], []
        for number in range(LESSON_QUESTIONS):
            is_there = self.rng.random() < 0.5
            kind = self.rng.choice(scene.groups).kind if is_there else self.rng.choice(absent)
            question = self.ids(("USER: " if number else "\n") + question_about(*kind) + " ASSISTANT:")
            answer = [*self.ids("Yes." if is_there else "No."), 2]
            word = len(question) - 1 - question[::-1].index(self.ids(f"a {kind[1]}")[-1])
            colours = [float(any(group.kind == (colour, kind[1]) for group in scene.groups)) for colour in COLOURS]
            asked.append((len(after) + word, colours, float(is_there)))
            after += question + answer
            learned += [False] * len(question) + [True] + [False] * (len(answer) - 1)
        return Lesson(Document([1, *self.ids("USER: ")], at, after, learned, None), asked)


@dataclass(frozen=True)
class Lesson:
    """A quiz, and what can be known of each question where its shape is read."""

    document: Document
    asked: list[tuple[int, list[float], float]]
    """Place of the shape's word in `after`, which colours things of that shape have, and whether the kind is there."""


def embed_notes(embed: nn.Module, notes: Tensor) -> Tensor:
    """Token ids [..., P, A], 0 where there is nothing to say -> at each place the mean of its words, [..., P, H]."""
    said = (notes > 0)[..., None]
    return (embed(notes) * said).sum(-2) / said.sum(-2).clamp(min=1)


class LanguageTask(nn.Module):
    """Next-token prediction, and the facts told from the last state by a probe."""

    def __init__(self, language_model: LlamaModel, lm_head: nn.Linear, notes: Tensor) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        self.probe = nn.Linear(language_model.config.hidden_size, NUM_FACTS)
        self.notes = notes

    def forward(self, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
        """(loss of the learned tokens, loss of the facts), each 0 where there is none to learn."""
        states, last = self.states(documents)
        targets = []
        for document, end in zip(documents, last, strict=True):
            learned = zip(document.after, document.learned, strict=True)
            before = end + 1 - len(document.after)
            targets.append(torch.tensor([-100] * before + [token if wanted else -100 for token, wanted in learned]))
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]
        chosen = wanted != -100
        loss = states.sum() * 0
        if chosen.any():
            loss = F.cross_entropy(self.lm_head(states[:, :-1][chosen]), wanted[chosen])
        with_facts = [row for row, document in enumerate(documents) if document.facts is not None]
        if not with_facts:
            return loss, states.sum() * 0
        hot = torch.zeros(len(with_facts), NUM_FACTS)
        for row, at in enumerate(with_facts):
            hot[row, documents[at].facts] = 1.0
        logits = self.probe(states[with_facts, [last[at] for at in with_facts]])
        return loss, F.binary_cross_entropy_with_logits(logits, hot, reduction="sum") / len(with_facts)

    def embed(self, document: Document) -> Tensor:
        """[L, H]: the embeddings of a row."""
        table = self.language_model.embed_tokens
        parts = [table(torch.tensor(document.before, dtype=torch.long))]
        if document.scene is not None:
            parts.append(embed_notes(table, self.notes[document.scene]))
        return torch.cat([*parts, table(torch.tensor(document.after))])

    def states(self, documents: Sequence[Document]) -> tuple[Tensor, list[int]]:
        """Last hidden states [N, L, H] of rows padded behind, and every row's last place."""
        rows = [self.embed(document) for document in documents]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.language_model(inputs_embeds=padded).last_hidden_state, [len(row) - 1 for row in rows]

    def ends(self, documents: Sequence[Document]) -> Tensor:
        """[N, H]: the states at the rows' last tokens."""
        states, last = self.states(documents)
        return states[torch.arange(len(last)), last]


Fit = Callable[..., None]


@torch.no_grad()
def told_errors(language_model: LlamaModel, lm_head: nn.Linear, library: Library, quizzes: int) -> float:
    """The share of yes/no questions about the library's scenes, told without error, that are answered wrong."""
    task = LanguageTask(language_model, lm_head, library.notes)
    wrong = asked = 0
    for _ in range(quizzes):
        document = library.dialogue(with_system=True, quiz=True)
        states, (last,) = task.states([document])
        first = last + 1 - len(document.after)
        learned = document.learned
        for at in range(1, len(learned)):
            if learned[at] and not learned[at - 1]:
                wrong += int(lm_head(states[0, first + at - 1]).argmax()) != document.after[at]
                asked += 1
    return wrong / asked


def train_language_model(
    language_model: LlamaModel, lm_head: nn.Linear, library: Library, steps: int, fit: Fit, lr: float = 3e-3
) -> dict[str, float]:
    """In place; returns the last values of what `LanguageTask` says of each kind of document."""
    task = LanguageTask(language_model, lm_head, library.notes)
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        read, facts = task([library.read() for _ in range(READ)])
        captioned, _ = task([library.captioned() for _ in range(CAPTIONED)])
        _, glanced = task([library.glance(prompt=step % 2 == 0) for _ in range(GLANCED)])
        with_system = step % WITH_SYSTEM == 0
        described, _ = task([library.dialogue(with_system, quiz=False) for _ in range(DESCRIBED)])
        quizzed, _ = task([library.dialogue(with_system, quiz=True) for _ in range(QUIZZED)])
        values = {"read": read, "facts": facts, "captioned": captioned, "glanced": glanced}
        values |= {"described": described, "quizzed": quizzed}
        history.append({name: value.item() for name, value in values.items()})
        return read + captioned + described + 2 * quizzed + 0.1 * facts + 0.1 * glanced, history[-1]

    fit(task, loss_of, steps, lr, "language model", line=1)
    return last_values(history)


def train_to_match(model: LlamaForCausalLM, library: Library, steps: int, fit: Fit) -> dict[str, float]:
    """In place: the model learns to tell whether a colour and a shape that it is asked about are of one thing.

    Where the shape is read, a probe of the first layer tells the colours that things of this shape have, and one of the
    second whether the colour read before is among them; the layers behind carry it to the answer. Returns the last
    values of the losses.
    """
    task = LanguageTask(model.model, model.lm_head, library.notes)
    task.colours, task.match = nn.Linear(model.config.hidden_size, len(COLOURS)), nn.Linear(model.config.hidden_size, 1)
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        lessons = [library.lesson() for _ in range(LESSONS)]
        rows = [task.embed(lesson.document) for lesson in lessons]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        states = model.model(inputs_embeds=padded, output_hidden_states=True)
        before, answers, places, colours, there = [], [], [], [], []
        for number, (row, lesson) in enumerate(zip(rows, lessons, strict=True)):
            document, first = lesson.document, len(row) - len(lesson.document.after)
            wanted = [at for at, learned in enumerate(document.learned) if learned]
            before += [states.last_hidden_state[number, first + at - 1] for at in wanted]
            answers += [document.after[at] for at in wanted]
            for at, colours_there, is_there in lesson.asked:
                places.append((number, first + at))
                colours.append(colours_there)
                there.append(is_there)
        at = tuple(torch.tensor(places).T)
        seen = task.colours(states.hidden_states[1][at])
        matched = task.match(states.hidden_states[2][at])[:, 0]
        values = {
            "answers": F.cross_entropy(model.lm_head(torch.stack(before)), torch.tensor(answers)),
            "colours": F.binary_cross_entropy_with_logits(seen, torch.tensor(colours)) * len(COLOURS),
            "match": F.binary_cross_entropy_with_logits(matched, torch.tensor(there)),
            "described": task([library.dialogue(False, quiz=False) for _ in range(DESCRIBED_BESIDE)])[0],
        }
        history.append({name: value.item() for name, value in values.items()})
        return torch.stack(list(values.values())).sum(), history[-1]

    fit(task, loss_of, steps, 1e-3, "language model", line=1, matrices_lr=3e-3)
    return last_values(history)


def last_values(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the last 20 steps."""
    recent = history[-20:]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]} if recent else {}


def train_to_tell(model: LlamaForCausalLM, library: Library, steps: int, fit: Fit) -> dict[str, float]:
    """In place: a scene's state at </s> comes to lie nearer to its alt texts' than to twins' and other scenes'.

    What the model could before is kept up. Returns the last values of the losses and of both accuracies.
    """
    task = LanguageTask(model.model, model.lm_head, library.notes)
    task.log_temperature = nn.Parameter(torch.tensor(0.07).log())
    history: list[dict[str, float]] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        with_system = step % WITH_SYSTEM == 0
        kept = [
            task(documents)[0]
            for documents in (
                [replace(library.read(), facts=None) for _ in range(READ // 2)],
                [library.captioned() for _ in range(CAPTIONED // 2)],
                [library.dialogue(with_system, quiz=False) for _ in range(DESCRIBED // 2)],
                [library.dialogue(with_system, quiz=True) for _ in range(QUIZZED // 2)],
            )
        ]
        triples = [library.told_apart(prompt=step % 3 > 0) for _ in range(TOLD_APART)]
        scenes, texts, twins = (F.normalize(task.ends(kind), dim=-1) for kind in zip(*triples, strict=True))
        temperature = task.log_temperature.exp().clamp(min=0.01)
        likeness, false = scenes @ texts.T / temperature, (scenes * twins).sum(-1, keepdim=True) / temperature
        here = torch.arange(len(scenes))
        among = (F.cross_entropy(torch.cat([likeness, false], 1), here) + F.cross_entropy(likeness.T, here)) / 2
        true = likeness.diagonal()[:, None]
        beside = F.softplus(false - true).mean()  # against the twin alone, which is one of many above
        values = {"kept": sum(kept), "among": among, "beside": beside}
        values |= {"told from twins": (true > false).float().mean()}
        values |= {"told among": (likeness.argmax(1) == here).float().mean()}
        history.append({name: value.item() for name, value in values.items()})
        return sum(kept) + kept[-1] + (among + beside) / 2, history[-1]

    fit(task, loss_of, steps, 1e-3, "language model that tells", line=0)
    return last_values(history)
