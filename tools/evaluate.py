"""Evaluates a model, or scores answers that are there already.

    python tools/evaluate.py --load CKPT --tasks preference retrieval --data-path F --image-folder DIR --output F.json
    python tools/evaluate.py --load CKPT --tasks yesno --questions F --image-folder DIR --output F.json
    python tools/evaluate.py --hf EXPORT --task pope --questions F --images DIR --output F.json
    python tools/evaluate.py --task pope  --questions F   --answers F  --output F.json
    python tools/evaluate.py --task amber --annotations F --answers F  --output F.json
    python tools/evaluate.py --task chair --objects F     --captions F --output F.json

Answers are read and written in the benchmarks' own formats. With --hf, answers are generated first; the same command
goes on where a killed one stopped. With --load nothing is generated: likelihoods and embeddings are compared, under
torchrun at any layout. Without a GPU it runs on the CPU, in fp32.
"""

import argparse
from pathlib import Path

from checkpoint_arguments import add_data_arguments, add_layout_arguments, filled, load_settings

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail

BENCHMARKS = ("pope", "chair", "amber", "mmhal")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="F.json", help="results file to write")
    add_benchmark_arguments(parser)
    add_generation_arguments(parser)
    add_checkpoint_arguments(parser)
    return parser.parse_args()


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks that are answered in words")
    group.add_argument("--task", choices=BENCHMARKS)
    group.add_argument(
        "--questions", type=Path, help="pope, amber, mmhal: the published questions; chair: {image} lines"
    )
    group.add_argument("--annotations", type=Path, help="amber: annotations.json")
    group.add_argument("--answers", type=Path, help="answers in the benchmark's format; with --hf, where to write them")
    group.add_argument("--captions", type=Path, help="chair: {image_id, caption} lines; with --hf, where to write them")
    group.add_argument("--objects", type=Path, help="chair: JSON {image id: [objects]}, or COCO's annotations folder")
    group.add_argument("--synonyms", type=Path, help="chair: a list of one's own (default: COCO's, as published)")
    group.add_argument("--amber-nouns", choices=("lexicon", "spacy"), default="lexicon", help="amber's descriptions: "
                       "an approximation without downloads, or AMBER's own way by NLTK and spaCy")  # fmt: skip
    group.add_argument("--amber-words", type=Path, help="folder of relation.json and safe_words.txt (default: beside "
                       "--annotations)")  # fmt: skip
    group.add_argument("--amber-spacy-model", default="en_core_web_lg", help="a spaCy model with word vectors")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation of the answers")
    group.add_argument("--hf", type=Path, metavar="EXPORT", help="exported Hugging Face model that answers")
    group.add_argument("--images", type=Path, metavar="DIR", help="the benchmark's images")
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
    group.add_argument("--load", type=Path, metavar="CKPT", help="SAVE folder of a run, one of its iter_* folders, or "
                       "a Hugging Face LLaVA or BLIP-2")  # fmt: skip
    group.add_argument("--tasks", nargs="+", choices=("preference", "retrieval", "yesno"), help="preference: is a "
                       "caption likelier than its hallucinated twins; retrieval: image to caption and back, by the "
                       "contrastive embeddings; yesno: POPE's --questions, the likelier of Yes and No")  # fmt: skip
    group.add_argument("--data-path", nargs="+", type=Path, metavar="F.json", help="preference, retrieval: LLaVA JSON "
                       "with `text` and `Hallucination caption`")  # fmt: skip
    group.add_argument("--limit", type=int, metavar="N", help="take the first N samples of --data-path alone")
    group.add_argument(
        "--pool-size", type=int, metavar="N", help="retrieval: look for each pair among N (default: all)"
    )
    add_layout_arguments(group)
    add_data_arguments(group)


def evaluate(args: argparse.Namespace) -> None:
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


def evaluate_likelihoods(args: argparse.Namespace) -> None:
    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    from hacl_megatron.evaluation.likelihood.run import LikelihoodRequest, evaluate_checkpoint
    from hacl_megatron.evaluation.likelihood.task_table import TASKS

    if not args.tasks:
        raise ValueError(f"--load needs --tasks: one or more of {', '.join(TASKS)}")
    if args.image_folder is None:
        raise ValueError("--load needs --image-folder, the folder that image names are relative to")
    request = filled(
        LikelihoodRequest,
        args,
        settings=load_settings(args),
        tasks=tuple(dict.fromkeys(args.tasks)),
        data_path=tuple(args.data_path or ()),
    )
    evaluate_checkpoint(request)


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            evaluate(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
