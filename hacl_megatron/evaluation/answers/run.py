"""One benchmark from files to results: have the questions answered if a model is given, then score and show.

--hf: items ─Answerer→ journal, JSON lines ─all there→ official answers file ┐
                                         --answers, --captions ──────────────┴→ Scores → results, table
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hacl_megatron.checkpoint.hf.config_read import data_flags
from hacl_megatron.config.console import say
from hacl_megatron.data.prepare.json_text import json_text
from hacl_megatron.data.templates import find_template
from hacl_megatron.evaluation.answers.benchmarks import BENCHMARKS, Benchmark, BenchmarkFiles, Item
from hacl_megatron.evaluation.journal import Journal
from hacl_megatron.evaluation.scores import Scores, file_digest, format_table, write_scores, write_whole


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest:
    """Which benchmark to score, on whose answers: the flags of tools/evaluate.py by the same names."""

    task: str
    """A name of `BENCHMARKS`."""
    files: BenchmarkFiles
    """The benchmark's own files."""
    output: Path
    """The results file."""
    answers: Path | None = None
    """Official answers file; with `hf`, where to write it (None: beside `output`)."""
    captions: Path | None = None
    """The same for `chair`, which takes no `answers`."""
    hf: Path | None = None
    """Exported model that answers; None: the answers are there. What follows means nothing then."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where it runs; auto: on a GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """None: bfloat16 on a GPU, float32 on the CPU."""
    batch_size: int = 8
    """Questions at a time."""
    num_beams: int = 1
    """1: greedy."""
    max_new_tokens: int | None = None
    """Longest answer; None: the benchmark's own."""
    num_shards: int = 1
    """Processes that share the questions."""
    shard_index: int = 0
    """Which of them this one is, from 0."""


def evaluate_benchmark(request: BenchmarkRequest) -> Scores | None:
    """Do what is asked for; writes the results, prints the table and returns the scores.

    None where other shards have answers to give yet. Raises ValueError for a user's mistake, before any model is loaded
    where that is possible.
    """
    files = request.files
    answers_path, flag = answers_file(request)
    if request.hf is None:
        for_generation = {"images": files.images, "prompt_suffix": files.prompt_suffix,
                          "max_new_tokens": request.max_new_tokens, "dtype": request.dtype}  # fmt: skip
        if unused := [name for name, value in for_generation.items() if value is not None]:
            raise ValueError(f"--{unused[0].replace('_', '-')} is for generation; give --hf as well, or leave it out")
        benchmark = BENCHMARKS[request.task](files, ask=False)
        if answers_path is None:
            raise ValueError(f"give --{flag} to score answers, or --hf to have a model answer")
        settings: dict[str, Any] = {"task": request.task}
    else:
        benchmark = BENCHMARKS[request.task](files, ask=True)
        suffix = ".jsonl" if benchmark.lines else ".json"
        answers_path = answers_path or request.output.with_name(f"{request.output.stem}.answers{suffix}")
        if not benchmark.lines and answers_path.suffix != ".json":
            raise ValueError(
                f"--{flag} {answers_path}: {request.task} takes a JSON list; name a file that ends in .json"
            )
        if answers_path == request.output:
            raise ValueError(f"--{flag} and --output are the same file, {request.output}; name two")
        settings = answer_benchmark(benchmark, request, answers_path)
        if settings is None:
            return None
    if request.task == "amber":
        settings["amber_nouns"] = files.amber_nouns
    answers = benchmark.read_answers(answers_path)
    scores = benchmark.score(answers, answers_path)
    return finish(request.output, scores, benchmark, answers, settings, {flag: answers_path})


def answers_file(request: BenchmarkRequest) -> tuple[Path | None, str]:
    """The official answers file, to read or to write, and the flag that names it."""
    flag, other = ("captions", "answers") if request.task == "chair" else ("answers", "captions")
    if getattr(request, other) is not None:
        raise ValueError(f"--task {request.task} takes its answers by --{flag}, not by --{other}")
    return getattr(request, flag), flag


def answer_benchmark(benchmark: Benchmark, request: BenchmarkRequest, answers_path: Path) -> dict[str, Any] | None:
    """Have a model answer what is not answered yet, and write the official answers file once all is.

    Returns the settings the answers were made with; None while other shards are not done.
    """
    # torch and transformers, which scoring alone need not wait for
    from hacl_megatron.evaluation.answers.answerer import read_export
    from hacl_megatron.evaluation.model_files import choose_device, default_dtype, fingerprint

    images = request.files.images
    if images is None:
        raise ValueError("--hf needs --images, the folder of the benchmark's images")
    check_numbers(request)
    if not 0 <= request.shard_index < request.num_shards:
        raise ValueError(
            f"--shard-index {request.shard_index}, expected 0 to {request.num_shards - 1} (--num-shards - 1)"
        )
    items = benchmark.items()
    keys = [benchmark.key(item.fields) for item in items]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the {benchmark.name} questions name {twice!r} twice; each needs its own id")
    template = find_template(data_flags(read_export(request.hf)).version).title
    if not any((images / item.image).is_file() for item in items):
        raise ValueError(
            f"--images {images}: none of the {len(items)} images is there, such as {items[0].image}; give the "
            "folder that holds them"
        )
    device = choose_device(request.device)
    settings = {
        "task": benchmark.name,
        "model": fingerprint(request.hf),
        "inputs": {name: file_digest(path) for name, path in benchmark.used_files().items() if path.is_file()},
        "dtype": request.dtype or default_dtype(device),
        "num_beams": request.num_beams,
        "max_new_tokens": request.max_new_tokens or benchmark.max_new_tokens,
        "prompt_suffix": benchmark.suffix_used,
        "num_shards": request.num_shards,
    }
    path = journal_path(answers_path, request.num_shards, request.shard_index)
    with Journal(path, settings, benchmark.key) as journal:
        share = list(zip(keys, items, strict=True))[request.shard_index :: request.num_shards]
        left = [item for key, item in share if key not in journal.done]
        if left:
            _generate(benchmark, left, journal, request, settings, num_done=len(share) - len(left))
    if not _gather(benchmark, keys, answers_path, request.num_shards):
        return None
    run = {"hf": str(request.hf), "images": str(images), "device": device.type, "batch_size": request.batch_size}
    return {**settings, **run, "prompt_template": f"{template}, tokenized as in training"}


def check_numbers(request: BenchmarkRequest) -> None:
    """Raises ValueError, in one line, for one that must be positive and is not."""
    for name in ("batch_size", "num_beams", "num_shards", "max_new_tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}, expected at least 1")


def journal_path(answers_path: Path, num_shards: int, shard_index: int) -> Path:
    """Where a process writes its answers: the official file itself, if that is JSON lines and one process writes it."""
    if num_shards == 1:
        return answers_path.with_suffix(".jsonl") if answers_path.suffix == ".json" else answers_path
    return answers_path.with_name(f"{answers_path.stem}.shard-{shard_index}-of-{num_shards}.jsonl")


def _generate(
    benchmark: Benchmark,
    items: Sequence[Item],
    journal: Journal,
    request: BenchmarkRequest,
    settings: dict[str, Any],
    *,
    num_done: int,
) -> None:
    from tqdm import tqdm

    # As in answer_benchmark.
    from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question

    answerer = Answerer(request.hf, request.files.images, device=request.device, dtype=settings["dtype"])
    generation = GenerationSettings(
        max_new_tokens=settings["max_new_tokens"], num_beams=request.num_beams, batch_size=request.batch_size
    )
    questions = [Question(image=item.image, prompt=item.prompt) for item in items]
    if num_done:
        print(f"{num_done} answers are in {journal.path} already; {len(items)} to go", flush=True)
    with tqdm(total=num_done + len(items), initial=num_done, desc=benchmark.name, unit="answer") as bar:
        for item, answer in zip(items, answerer.answer(questions, generation), strict=True):
            said = {name: text for name in ("error", "cut") if (text := getattr(answer, name)) is not None}
            journal.append({**benchmark.record(item, answer.text), **said})
            bar.update()
    answerer.close()


def _gather(benchmark: Benchmark, keys: Sequence[Hashable], answers_path: Path, num_shards: int) -> bool:
    """Write the official answers file in the official order; False, and a line about it, while shards are missing."""
    paths = [journal_path(answers_path, num_shards, index) for index in range(num_shards)]
    found: list[tuple[Hashable, dict[str, Any]]] = []
    for path in paths:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last: what another writes just now
            found += [(benchmark.key(record), record) for record in map(json.loads, lines)]
    if paths == [answers_path] and [key for key, _ in found] == list(keys):
        return True
    records = dict(found)
    if missing := [key for key in keys if key not in records]:
        print(f"{len(missing)} of {len(keys)} answers are still to come from other shards; the last one scores them")
        return False
    ordered = [records[key] for key in keys]
    if benchmark.lines:
        write_whole(answers_path, "".join(json_text(record) + "\n" for record in ordered))
    else:
        write_whole(answers_path, json_text(ordered, indent=1) + "\n")
    return True


def finish(
    output: Path,
    scores: Scores,
    benchmark: Benchmark,
    answers: list[dict[str, Any]],
    settings: dict[str, Any],
    files: dict[str, Path],
) -> Scores:
    """Add what an answers file says of unusable images and cut answers, write the results, print the table."""
    bad = [answer for answer in answers if answer.get("error")]
    if bad:
        listed = [{"key": benchmark.key(answer), "reason": answer["error"]} for answer in bad]
        scores = replace(
            scores,
            counts={**scores.counts, "unusable items": len(bad)},
            notes=(*scores.notes, f"{len(bad)} items could not be put and count with an empty answer: {bad[0]['error']}"
                   + (" ..." if len(bad) > 1 else "")),
            details={**scores.details, "unusable_items": listed},
        )  # fmt: skip
    if cut := [answer["cut"] for answer in answers if answer.get("cut")]:
        scores = replace(
            scores,
            counts={**scores.counts, "cut answers": len(cut)},
            notes=(*scores.notes, f"{len(cut)} answers were cut: {cut[0]}"),
        )
    write_scores(output, scores, settings=settings, files={**benchmark.used_files(), **files})
    say(format_table(scores))
    print(f"results: {output}")
    return scores
