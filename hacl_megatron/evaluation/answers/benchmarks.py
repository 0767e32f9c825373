"""The benchmarks that models answer in words: what they ask, in which form they take answers, who scores them.

    questions ─items→ Item(image, prompt) ─generate─→ text ─record→ a line of the official answers file ─score→ Scores

Each benchmark reads and checks all its files when it is made, before any model is loaded.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from hacl_megatron.evaluation.answers.amber import DIMENSIONS, WordLists, needs_nouns, read_annotations, score_amber
from hacl_megatron.evaluation.answers.amber_nouns import SPACY_MODEL, LexiconNouns, SpacyNouns
from hacl_megatron.evaluation.answers.chair import ObjectReader, Synonyms, image_id_of_name, read_objects, score_chair
from hacl_megatron.evaluation.answers.pope import is_of_llava, of_llava, score_pope
from hacl_megatron.evaluation.json_files import read_records
from hacl_megatron.evaluation.scores import Scores

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 puts behind the questions of POPE and other short-answer sets (its evaluation files)."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkFiles:
    """Where a benchmark's files are, and how to read them: the flags of tools/evaluate.py by the same names."""

    questions: Path | None = None
    annotations: Path | None = None
    objects: Path | None = None
    synonyms: Path | None = None
    images: Path | None = None
    amber_words: Path | None = None
    amber_nouns: Literal["lexicon", "spacy"] = "lexicon"
    amber_spacy_model: str = SPACY_MODEL
    prompt_suffix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to ask a model."""

    image: str
    """Image file, relative to the image folder."""
    prompt: str
    """The user's message without the image tag."""
    fields: dict[str, Any]
    """The official record, but for the answer."""


class Benchmark:
    """What all benchmarks share. A subclass says how its files look."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Flags without which nothing can be scored."""
    asks_from: ClassVar[str] = "questions"
    """The flag that says what to ask a model."""
    answer_key: ClassVar[str] = "answer"
    lines: ClassVar[bool] = True
    """Whether the official answers file is JSON lines; otherwise a JSON list."""
    suffix: ClassVar[str] = ""
    """Published text behind each question; `--prompt-suffix` replaces it."""
    max_new_tokens: ClassVar[int] = 128
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {}
    """Which way a metric is better; of those that have such a way."""

    def __init__(self, files: BenchmarkFiles, *, ask: bool) -> None:
        """Reads the files; with `ask`, those that `items` needs too. Raises ValueError for what is missing."""
        self.files = files
        for name in (*self.needs, *((self.asks_from,) if ask else ())):
            self.path(name)
        self.suffix_used = self.suffix if files.prompt_suffix is None else files.prompt_suffix

    def path(self, name: str) -> Path:
        path = getattr(self.files, name)
        if path is None:
            raise ValueError(f"--task {self.name} needs --{name.replace('_', '-')}")
        return path

    def used_files(self) -> dict[str, Path]:
        """Every file given, by its flag."""
        names = ("questions", "annotations", "objects", "synonyms")
        return {name: path for name in names if (path := getattr(self.files, name)) is not None}

    def items(self) -> list[Item]:
        """Everything to ask, in the official order."""
        raise NotImplementedError

    def key(self, record: dict[str, Any]) -> Hashable:
        """What tells an official record from the others."""
        raise NotImplementedError

    def record(self, item: Item, text: str) -> dict[str, Any]:
        """The official record of an answer."""
        return {**item.fields, self.answer_key: text}

    def read_answers(self, path: Path) -> list[dict[str, Any]]:
        """An official answers file. Raises ValueError."""
        return read_records(path, needed=(self.answer_key,), kind=f"{self.name} answers")

    def score(self, answers: Sequence[dict[str, Any]], where: Path) -> Scores:
        raise NotImplementedError


class Pope(Benchmark):
    name, needs, suffix = "pope", ("questions",), SHORT_ANSWER
    better = dict.fromkeys(("accuracy", "precision", "recall", "f1"), "higher")

    def __init__(self, files: BenchmarkFiles, *, ask: bool) -> None:
        super().__init__(files, ask=ask)
        needed = ("text", "label", *(("image", "question_id") if ask else ()))
        self.questions = read_records(self.path("questions"), needed=needed, kind="POPE questions")

    def items(self) -> list[Item]:
        return [
            Item(
                image=question["image"],
                prompt=question["text"] + self.suffix_used,
                fields={"question_id": question["question_id"], "question": question["text"]},
            )
            for question in self.questions
        ]

    def key(self, record: dict[str, Any]) -> Hashable:
        return record.get("question_id")

    def read_answers(self, path: Path) -> list[dict[str, Any]]:
        """POPE's own form, or LLaVA's. Raises ValueError."""
        records = read_records(path, needed=(), kind="POPE answers")
        if all(is_of_llava(record) and "label" in record and "prompt" not in record for record in records):
            raise ValueError(
                f"{path} holds POPE's questions, which have a label and no answer; give --answers the file of answers"
            )
        if all(is_of_llava(record) for record in records):
            return [of_llava(record) for record in records]
        return read_records(path, needed=(self.answer_key,), kind="POPE answers, its own or LLaVA's (prompt, text)")

    def score(self, answers: Sequence[dict[str, Any]], where: Path) -> Scores:
        return score_pope(self.questions, answers, where=where)


class Chair(Benchmark):
    name, needs, asks_from, answer_key = "chair", ("objects",), "images", "caption"
    prompt = "Please describe this image in detail."
    max_new_tokens = 512
    better = {"CHAIRs": "lower", "CHAIRi": "lower", "Recall": "higher"}  # noqa: RUF012  # as declared above

    def __init__(self, files: BenchmarkFiles, *, ask: bool) -> None:
        super().__init__(files, ask=ask)
        self.synonyms = Synonyms.read(files.synonyms)
        self.objects = read_objects(self.path("objects"), self.synonyms)
        if ask:
            ObjectReader(self.synonyms)  # so that what it lacks is said before hours of generation

    def items(self) -> list[Item]:
        """The images of `--questions` ({"image": ...} records), else every image in the folder with known objects."""
        if self.files.questions is not None:
            records = read_records(self.files.questions, needed=("image",), kind="images to caption")
            names = [record["image"] for record in records]
        else:
            folder = self.path("images")
            names = sorted(path.name for path in folder.glob("*") if re.search(r"\d\.\w+$", path.name))
            names = [name for name in names if image_id_of_name(name) in self.objects]
            if not names:
                raise ValueError(
                    f"--images {folder}: holds no file whose name ends in one of the {len(self.objects)} image ids of "
                    "--objects (such as COCO_val2014_000000001290.jpg)"
                )
        unknown = [name for name in names if image_id_of_name(name) not in self.objects]
        if unknown:
            raise ValueError(f"{len(unknown)} images to caption are not among those of --objects: {unknown[0]}")
        prompt = self.prompt + self.suffix_used
        return [Item(image=name, prompt=prompt, fields={"image_id": image_id_of_name(name)}) for name in names]

    def key(self, record: dict[str, Any]) -> Hashable:
        return record.get("image_id")

    def read_answers(self, path: Path) -> list[dict[str, Any]]:
        return read_records(path, needed=("image_id", "caption"), kind="captions")

    def score(self, answers: Sequence[dict[str, Any]], where: Path) -> Scores:
        return score_chair(answers, self.objects, synonyms=self.synonyms, where=where)


class Amber(Benchmark):
    name, needs, answer_key, lines, max_new_tokens = "amber", ("annotations",), "response", False, 512
    better = {"CHAIR": "lower", "Cover": "higher", "Hal": "lower", "Cog": "lower"} | {
        f"{dimension} {metric}": "higher"
        for dimension in DIMENSIONS
        for metric in ("accuracy", "precision", "recall", "F1")
    }

    def __init__(self, files: BenchmarkFiles, *, ask: bool) -> None:
        super().__init__(files, ask=ask)
        self.annotations = read_annotations(self.path("annotations"))
        self.questions = []
        if ask:
            self.questions = read_records(
                self.path("questions"), needed=("id", "image", "query"), kind="AMBER queries (query_all.json)"
            )
            for question in self.questions:
                if question["id"] not in self.annotations:
                    raise ValueError(f"{files.questions}: id {question['id']} is not in {files.annotations}")
            if needs_nouns(self.annotations, self.questions):
                self._scorer_of_descriptions()  # so that what it lacks is said before hours of generation

    def items(self) -> list[Item]:
        return [
            Item(image=q["image"], prompt=q["query"] + self.suffix_used, fields={"id": q["id"]}) for q in self.questions
        ]

    def key(self, record: dict[str, Any]) -> Hashable:
        return record.get("id")

    def record(self, item: Item, text: str) -> dict[str, Any]:
        """A description as it is; of an answer to a question the "Yes" or "No" that it starts with, if it does.

        AMBER takes nothing but these two words. What the model said stays beside them.
        """
        if self.annotations[item.fields["id"]]["type"] == "generative":
            return super().record(item, text)
        first = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
        return {**item.fields, "response": first[1].capitalize() if first else text, "said": text}

    def read_answers(self, path: Path) -> list[dict[str, Any]]:
        return read_records(path, needed=("id", "response"), kind="AMBER answers")

    def score(self, answers: Sequence[dict[str, Any]], where: Path) -> Scores:
        words, nouns = None, None
        if needs_nouns(self.annotations, answers):
            words, nouns = self._scorer_of_descriptions()
        return score_amber(self.annotations, answers, words=words, nouns=nouns, where=where)

    def _scorer_of_descriptions(self) -> tuple[WordLists, LexiconNouns | SpacyNouns]:
        folder = self.files.amber_words or self.path("annotations").parent
        words = WordLists.read(folder / "relation.json", folder / "safe_words.txt")
        spacy = self.files.amber_nouns == "spacy"
        return words, SpacyNouns(self.files.amber_spacy_model) if spacy else LexiconNouns()


class MmHal(Benchmark):
    """MMHal-Bench (arXiv 2309.14525): answers in the form of its template, to be judged by its own script."""

    name, needs, answer_key, lines, max_new_tokens = "mmhal", (), "model_answer", False, 1024
    asks = ("image_src", "question")

    def __init__(self, files: BenchmarkFiles, *, ask: bool) -> None:
        super().__init__(files, ask=ask)
        self.questions = []
        if ask:
            self.questions = read_records(self.path("questions"), needed=self.asks, kind="MMHal-Bench's template")

    def items(self) -> list[Item]:
        return [
            Item(image=q["image_src"].rsplit("/", 1)[-1], prompt=q["question"] + self.suffix_used, fields=q)
            for q in self.questions
        ]

    def key(self, record: dict[str, Any]) -> Hashable:
        return record.get("image_src"), record.get("question")

    def read_answers(self, path: Path) -> list[dict[str, Any]]:
        return read_records(path, needed=(*self.asks, self.answer_key), kind="MMHal-Bench answers")

    def score(self, answers: Sequence[dict[str, Any]], where: Path) -> Scores:
        empty = sum(not str(answer["model_answer"]).strip() for answer in answers)
        return Scores(
            task=self.name,
            metrics={},
            counts={"answers": len(answers), "empty answers": empty},
            notes=(f"not judged: give {where} to MMHal-Bench's eval_gpt4.py --response",),
        )


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {kind.name: kind for kind in (Pope, Chair, Amber, MmHal)}
