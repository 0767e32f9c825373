"""Evaluates a model, or scores answers that are there already.

    python tools/evaluate.py --load CKPT --tasks preference retrieval --data-path F --image-folder DIR --output F.json
    python tools/evaluate.py --load CKPT --tasks yesno --questions F --image-folder DIR --output F.json
    python tools/evaluate.py --hf EXPORT --task pope --questions F --images DIR --output F.json
    python tools/evaluate.py --watch SAVE --tasks pope chair --questions F --objects F --images DIR
    python tools/evaluate.py --task pope  --questions F   --answers F  --output F.json
    python tools/evaluate.py --task amber --annotations F --answers F  --output F.json
    python tools/evaluate.py --task chair --objects F     --captions F --output F.json

Answers are read and written in the benchmarks' own formats. With --hf, answers are generated first; the same command
goes on where a killed one stopped. With --load nothing is generated: likelihoods and embeddings are compared, under
torchrun at any layout. With --watch, each checkpoint of a run is exported and answers, as it comes, until the run is
over. Without a GPU it runs on the CPU, in fp32.
"""

import argparse
import re
from pathlib import Path

from checkpoint_arguments import add_data_arguments, add_layout_arguments, filled, load_settings

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail
from hacl_megatron.config.files.urls import is_url, refuse_url

BENCHMARKS = ("pope", "chair", "amber", "mmhal")
LIKELIHOODS = ("preference", "retrieval", "yesno")
PLACES = (
    "output", "annotations", "answers", "captions", "objects", "synonyms", "amber_words", "hf", "load", "watch",
    "scratch", "best_folder",
)  # fmt: skip
"""Flags of `place`."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=place, metavar="F.json", help="results file to write; with --watch a folder (SAVE/evaluation)"
    )
    add_benchmark_arguments(parser)
    add_generation_arguments(parser)
    add_checkpoint_arguments(parser)
    add_watch_arguments(parser)
    return parser.parse_args()


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks that are answered in words")
    group.add_argument("--task", choices=BENCHMARKS)
    group.add_argument("--questions", nargs="+", metavar="F", help="pope, amber, mmhal: the published questions; "
                       "chair: {image} lines; with --watch also TASK=F ...")  # fmt: skip
    group.add_argument("--annotations", type=place, help="amber: annotations.json")
    group.add_argument("--answers", type=place, help="answers in the benchmark's format; with --hf, where to write "
                       "them")  # fmt: skip
    group.add_argument("--captions", type=place, help="chair: {image_id, caption} lines; with --hf, where to write "
                       "them")  # fmt: skip
    group.add_argument("--objects", type=place, help="chair: JSON {image id: [objects]}, or COCO's annotations folder")
    group.add_argument("--synonyms", type=place, help="chair: a list of one's own (default: COCO's, as published)")
    group.add_argument("--amber-nouns", choices=("lexicon", "spacy"), default="lexicon", help="amber's descriptions: "
                       "an approximation without downloads, or AMBER's own way by NLTK and spaCy")  # fmt: skip
    group.add_argument("--amber-words", type=place, help="folder of relation.json and safe_words.txt (default: beside "
                       "--annotations)")  # fmt: skip
    group.add_argument("--amber-spacy-model", default="en_core_web_lg", help="a spaCy model with word vectors")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation of the answers")
    group.add_argument("--hf", type=place, metavar="EXPORT", help="exported Hugging Face model that answers")
    group.add_argument("--images", nargs="+", metavar="DIR", help="the benchmark's images; with --watch also TASK=DIR "
                       "...")  # fmt: skip
    group.add_argument("--prompt-suffix", help="text behind each question, in place of the published one")
    group.add_argument("--batch-size", type=int, default=8)
    group.add_argument("--num-beams", type=int, default=1, help="1: greedy")
    group.add_argument("--max-new-tokens", type=int, help="longest answer (default: the benchmark's)")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on the CPU and "
                       "for --load of a run in fp32 float32")  # fmt: skip
    group.add_argument("--num-shards", type=int, default=1, help="processes that share the questions")
    group.add_argument("--shard-index", type=int, default=0, help="which of them this one is, from 0")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "likelihoods and embeddings", "Nothing is generated. Also takes --questions, --prompt-suffix, --batch-size, "
        "--device and --dtype."
    )  # fmt: skip
    group.add_argument("--load", type=place, metavar="CKPT", help="SAVE folder of a run, one of its iter_* folders, or "
                       "a Hugging Face LLaVA or BLIP-2")  # fmt: skip
    group.add_argument("--tasks", nargs="+", choices=(*LIKELIHOODS, *BENCHMARKS), help="preference: is a caption "
                       "likelier than its hallucinated twins; retrieval: image to caption and back, by the contrastive "
                       "embeddings; yesno: POPE's --questions, the likelier of Yes and No; the others are for --watch"
                       )  # fmt: skip
    group.add_argument("--data-path", nargs="+", metavar="F.json", help="preference, retrieval: LLaVA JSON "
                       "with `text` and `Hallucination caption`")  # fmt: skip
    group.add_argument("--limit", type=int, metavar="N", help="take the first N samples of --data-path alone")
    group.add_argument(
        "--pool-size", type=int, metavar="N", help="retrieval: look for each pair among N (default: all)"
    )
    add_layout_arguments(group)
    add_data_arguments(group)


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "every checkpoint of a run", "Also takes --tasks with benchmarks, their files, and the flags of generation. "
        "The same command goes on after a kill."
    )  # fmt: skip
    group.add_argument("--watch", type=place, metavar="SAVE", help="folder of a run, which may be training meanwhile")
    group.add_argument("--scratch", type=place, metavar="DIR", help="for the export that is being asked (default: "
                       "scratch in --output)")  # fmt: skip
    group.add_argument("--keep-best", metavar="'TASK METRIC'", help="keep the export with the best of this score, such "
                       "as 'pope f1' or 'chair CHAIRi'")  # fmt: skip
    group.add_argument("--best-folder", type=place, metavar="DIR", help="where (default: SAVE/best)")
    group.add_argument("--forever", action="store_true", help="do not end with the run; wait for one to begin")
    group.add_argument("--poll-seconds", type=float, default=30.0, help="between two looks at SAVE")
    group.add_argument("--wait-for-restart", type=float, default=600.0, metavar="SECONDS", help="how long a run that "
                       "was stopped or killed may be silent before this ends too")  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    refuse_urls(args)
    if args.watch is not None:
        evaluate_checkpoints_as_they_come(args)
        return
    for name in ("scratch", "keep_best", "best_folder"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --watch SAVE; give that, or leave it out")
    if args.output is None:
        raise ValueError("give --output, the results file to write")
    for name in ("questions", "images"):
        setattr(args, name, only_path(name, getattr(args, name)))
    if args.load is not None:
        if args.task is not None or args.hf is not None:
            raise ValueError("--load goes with --tasks; leave --task and --hf out, or --load")
        evaluate_likelihoods(args)
        return
    if args.tasks is not None:
        raise ValueError("--tasks compares likelihoods of a checkpoint; give it by --load")
    if args.task is None:
        raise ValueError(f"nothing to evaluate: give --task ({', '.join(BENCHMARKS)}), or --load and --tasks")
    from hacl_megatron.evaluation.answers.benchmarks import BenchmarkFiles
    from hacl_megatron.evaluation.answers.run import BenchmarkRequest, evaluate_benchmark

    evaluate_benchmark(filled(BenchmarkRequest, args, files=filled(BenchmarkFiles, args)))


def refuse_urls(args: argparse.Namespace) -> None:
    """As paths they would lose a slash, and be shown with a password in them. Images of --load may be at one."""
    for given in args.images or ():
        refuse_url("--images", re.sub(r"^\w+=", "", given), "benchmarks' images are read from a folder")
    for name in ("data_path", "questions", *PLACES):
        given = getattr(args, name)
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, str):
                one, what = re.sub(r"^\w+=", "", one), f"--{name.replace('_', '-')}"
                refuse_url(what, one, "evaluations read and write files: give a path (aws s3 cp copies it)")


def place(given: str) -> Path | str:
    """A flag's path; a URL as it is, to be refused without its password."""
    return given if is_url(given) else Path(given)


def evaluate_likelihoods(args: argparse.Namespace) -> None:
    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    from hacl_megatron.evaluation.likelihood.run import LikelihoodRequest, evaluate_checkpoint
    from hacl_megatron.evaluation.likelihood.task_table import TASKS

    if not args.tasks:
        raise ValueError(f"--load needs --tasks: one or more of {', '.join(TASKS)}")
    if answered := [task for task in args.tasks if task in BENCHMARKS]:
        raise ValueError(
            f"--load with --tasks {answered[0]}, which needs answers in words: export the checkpoint and give --hf and "
            f"--task {answered[0]}, or --watch for every checkpoint of a run"
        )
    if args.image_folder is None:
        raise ValueError("--load needs --image-folder, the folder that image names are relative to")
    request = filled(
        LikelihoodRequest,
        args,
        settings=load_settings(args),
        tasks=tuple(dict.fromkeys(args.tasks)),
        data_path=tuple(map(Path, args.data_path or ())),
    )
    evaluate_checkpoint(request)


def only_path(name: str, given: list[str] | None) -> Path | None:
    """The one value of a flag that takes several with --watch alone."""
    if given is not None and len(given) > 1:
        raise ValueError(f"--{name} takes one value here, found {len(given)}: {' '.join(given)}")
    return None if given is None else Path(given[0])


def evaluate_checkpoints_as_they_come(args: argparse.Namespace) -> None:
    for name in ("load", "hf", "task", "answers", "captions"):
        if getattr(args, name) is not None:
            raise ValueError(f"--watch and --{name} do not go together; leave one out")
    tasks = list(dict.fromkeys(args.tasks or ()))
    if not tasks or set(tasks) & {*LIKELIHOODS}:
        raise ValueError(
            f"--watch needs --tasks of {', '.join(BENCHMARKS)}, found {', '.join(tasks) or 'none'}; preference and "
            "retrieval are the trainer's own --eval-tasks"
        )
    if args.num_shards != 1 or args.shard_index != 0:
        raise ValueError("--watch answers in one process; leave --num-shards and --shard-index out")
    if args.best_folder is not None and args.keep_best is None:
        raise ValueError("--best-folder needs --keep-best, the score that decides")
    if args.poll_seconds <= 0:
        raise ValueError(f"--poll-seconds {args.poll_seconds:g}, expected more than 0")
    from hacl_megatron.training.reporting.run_files import refuse_what_is_no_run
    from hacl_megatron.training.reporting.status import run_state

    if args.watch.is_dir() and not args.forever:
        refuse_what_is_no_run(args.watch)
    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    from hacl_megatron.evaluation.answers.benchmarks import BenchmarkFiles
    from hacl_megatron.evaluation.answers.run import BenchmarkRequest
    from hacl_megatron.evaluation.watch.best import KeepBest
    from hacl_megatron.evaluation.watch.run import RunEnd, WatchRequest, watch

    output = args.output or args.watch / "evaluation"
    asking = [task for task in tasks if task != "chair"] or tasks  # chair captions all images, unless chair=F is given
    questions = by_task("questions", args.questions, tasks, for_all=asking, most=1)
    images = by_task("images", args.images, tasks, for_all=tasks, most=len(tasks))
    requests = {
        task: filled(
            BenchmarkRequest,
            args,
            task=task,
            output=output,
            files=filled(BenchmarkFiles, args, questions=questions.get(task), images=images.get(task)),
        )
        for task in tasks
    }

    def run_end() -> RunEnd | None:
        state = run_state(args.watch)
        if state.is_alive:
            return None
        words = "no run has begun here" if state.state is None else f"the run is {state.state}"
        return RunEnd(words=words, for_good=state.state == "finished")

    best = None
    if args.keep_best is not None:
        best = KeepBest(score=args.keep_best, folder=args.best_folder or args.watch / "best")
    request = filled(
        WatchRequest,
        args,
        save=args.watch,
        tasks=requests,
        output=output,
        scratch=args.scratch or output / "scratch",
        keep_best=best,
    )
    watch(request, run_end)


def by_task(name: str, given: list[str] | None, tasks: list[str], *, for_all: list[str], most: int) -> dict[str, Path]:
    """The paths of `--NAME F`, which is for all of `for_all`, and `--NAME TASK=F`.

    Args:
        most: so many tasks may share a plain value.
    """
    found: dict[str, Path] = {}
    for value in given or ():
        task, equals, path = value.partition("=")
        if equals and task in tasks:
            names, path = [task], Path(path)
        else:
            names, path = for_all, Path(value)
            if len(names) > most:
                raise ValueError(
                    f"--{name} {value}: for which of {', '.join(names)}? write --{name} "
                    f"{' '.join(f'{task}=F' for task in names)}"
                )
        if twice := [task for task in names if task in found]:
            raise ValueError(f"--{name} names two for {twice[0]}: {found[twice[0]]} and {path}")
        found |= dict.fromkeys(names, path)
    return found


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            evaluate(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
