"""Scores one checkpoint on held-out scenes: free descriptions (exact CHAIR) and adversarial yes/no questions (POPE).

    python examples/proof/score_run.py --load RUN/finetune --data output/proof/data --output RUN/finetune.json

Exports to Hugging Face in between, and answers with transformers' `generate`, greedily: what is scored is what a user
would serve. Caption preference is the trainer's own `--eval-tasks preference`, read from metrics.jsonl.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from draw_world import read_scene, read_scenes
from transformers.utils import logging as transformers_logging
from world import DETAILED, chair, read_description

from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question
from hacl_megatron.evaluation.answers.pope import score_pope

LONGEST = 48
"""Tokens of an answer; a description of four kinds has 30."""


def ask(answerer: Answerer, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
    settings = GenerationSettings(max_new_tokens=max_new_tokens, batch_size=100)
    answers = list(answerer.answer(questions, settings))
    assert all(answer.error is None for answer in answers), next(answer.error for answer in answers if answer.error)
    return [answer.text for answer in answers]


def answer_all(hf: Path, data: Path, split: str, limit: int | None) -> dict[str, Any]:
    """{descriptions: answers by picture, yes/no: POPE's answer lines}, on the first `limit` pictures of a split."""
    answerer = Answerer(hf, data / "images", device="cpu")
    try:
        names = list(read_scenes(data, split))[:limit]
        spoken = ask(answerer, [Question(image=name, prompt=DETAILED) for name in names], LONGEST)
        questions = [
            line for line in json.loads((data / f"{split}.questions.json").read_text()) if line["image"] in names
        ]
        said = ask(answerer, [Question(image=line["image"], prompt=line["text"]) for line in questions], 3)
    finally:
        answerer.close()
    lines = [line | {"answer": answer} for line, answer in zip(questions, said, strict=True)]
    return {"descriptions": dict(zip(names, spoken, strict=True)), "yes/no": lines}


def score_answers(answers: dict[str, Any], data: Path) -> dict[str, float]:
    """CHAIR of the descriptions, POPE of the questions; errors are shares of all questions of a label."""
    scenes = read_scenes(data, next(iter(answers["descriptions"])).split("-")[0])
    described = [read_description(text, read_scene(scenes[name])) for name, text in answers["descriptions"].items()]
    lines = answers["yes/no"]
    spoken = [{"question": line["text"], "answer": line["answer"]} for line in lines]
    pope = score_pope(lines, spoken).metrics
    scores = chair(described) | {f"yes/no {name}": float(value) for name, value in pope.items() if value is not None}
    return scores | {"yes/no errors": 1.0 - scores["yes/no accuracy"]}


def score_run(run: Path, data: Path, split: str, limit: int | None = None) -> dict[str, Any]:
    """Scores of the newest checkpoint in `run`, with the answers they come from."""
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=run) as folder:
        export = Path(folder) / "export"
        export_checkpoint(locate_checkpoint(run), export)
        answers = answer_all(export, data, split, limit)
        shutil.rmtree(export)
    scores = score_answers(answers, data)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag, value in rows[-1].items():
        if tag.endswith(" validation"):
            scores[tag.removesuffix(" validation")] = value
    scores["s a step"] = sorted(row["iteration-time"] for row in rows)[len(rows) // 2]
    return {"split": split, "scores": scores, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, required=True, help="a stage's --save folder")
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, help="first pictures of the split alone")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = score_run(args.load, args.data, args.split, args.limit)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{name} {value:.3f}" for name, value in result["scores"].items()))


if __name__ == "__main__":
    main()
