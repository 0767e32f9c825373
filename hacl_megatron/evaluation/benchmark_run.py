"""One benchmark from files to results: have the questions answered if a model is given, then score and show.

--hf: items ─generate (resumable)→ journal, JSON lines ─all there→ official answers file ┐
                                                    --answers, --captions ─────────────┴→ Scores → results, table
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from hacl_megatron.evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkFiles
from hacl_megatron.evaluation.scores import Scores, format_table, write_scores

GENERATION_FLAGS = ("images", "prompt_suffix", "max_new_tokens", "dtype")
"""Flags that mean nothing where no model answers."""


def evaluate_benchmark(args: argparse.Namespace) -> Scores | None:
    """Run what the flags of tools/evaluate.py ask for; prints the table and returns the scores.

    None where other shards have answers to give yet. Raises ValueError for a user's mistake, before any model is loaded
    where that is possible.
    """
    fields = ("questions", "annotations", "objects", "synonyms", "images", "amber_words", "amber_nouns",
              "amber_spacy_model", "prompt_suffix")  # fmt: skip
    files = BenchmarkFiles(**{name: getattr(args, name) for name in fields})
    benchmark = BENCHMARKS[args.task](files, ask=args.hf is not None)
    answers_path, flag = answers_file(args)
    settings: dict[str, Any] = {"task": args.task}
    if args.task == "amber":
        settings["amber_nouns"] = args.amber_nouns
    if args.hf is None:
        if unused := [name for name in GENERATION_FLAGS if getattr(args, name) is not None]:
            raise ValueError(f"--{unused[0].replace('_', '-')} is for generation; give --hf as well, or leave it out")
        if answers_path is None:
            raise ValueError(f"give --{flag} to score answers, or --hf to have a model answer")
    else:
        raise NotImplementedError
    answers = benchmark.read_answers(answers_path)
    scores = benchmark.score(answers, answers_path)
    return finish(args.output, scores, benchmark, answers, settings, {flag: answers_path})


def answers_file(args: argparse.Namespace) -> tuple[Path | None, str]:
    """The official answers file, to read or to write, and the flag that names it."""
    flag, other = ("captions", "answers") if args.task == "chair" else ("answers", "captions")
    if getattr(args, other) is not None:
        raise ValueError(f"--task {args.task} takes its answers by --{flag}, not by --{other}")
    return getattr(args, flag), flag


def finish(
    output: Path,
    scores: Scores,
    benchmark: Benchmark,
    answers: list[dict[str, Any]],
    settings: dict[str, Any],
    files: dict[str, Path],
) -> Scores:
    """Add what an answers file says of unusable images, write the results, print the table."""
    bad = [answer for answer in answers if answer.get("error")]
    if bad:
        listed = [{"key": benchmark.key(answer), "reason": answer["error"]} for answer in bad]
        scores = replace(
            scores,
            counts={**scores.counts, "unusable images": len(bad)},
            notes=(*scores.notes, f"{len(bad)} items with an unusable image count with an empty answer"),
            details={**scores.details, "unusable_images": listed},
        )
    write_scores(output, scores, settings=settings, files={**benchmark.used_files(), **files})
    print(format_table(scores))
    print(f"results: {output}")
    return scores
