"""Turns Hugging Face weights into a checkpoint that `--pretrained-checkpoint` of the trainer loads at every layout.

    python tools/convert_hf_to_megatron.py --hf-path DIR --save OUT [--verify]
    python tools/convert_hf_to_megatron.py --language-model VICUNA --vision-tower CLIP --save OUT
    python tools/convert_hf_to_megatron.py --language-model VICUNA --vision-tower BLIP2 --save OUT
    python tools/convert_hf_to_megatron.py --hf-path LORA --model-base BASE --save OUT [--lora keep]

DIR is a `LlavaForConditionalGeneration`, a `Blip2ForConditionalGeneration`, or a folder in the original LLaVA layout,
around a language model of any family that the trainer has. LORA is a LoRA folder of LLaVA's or of `peft`, or one with
LLaVA's mm_projector.bin, to be read over the model that it was trained on; adapters are merged into the weights, or
kept to be trained further. From a language model and a vision tower's folder (of a BLIP-2, tower and Q-Former are
taken), connector and heads are drawn by --seed; a run that starts from OUT draws them anew, by its own --seed and
flags. The model is never held: memory does not grow with it. OUT appears when it is complete; OUT/converted_from.json
says what became of every tensor.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hacl_megatron.checkpoint.convert.prefetch import prefetch
from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail
from hacl_megatron.config.towers import tower_origins


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--hf-path", type=Path, help="LLaVA folder, Hugging Face's layout or the original one; or BLIP-2's"
    )
    parser.add_argument(
        "--model-base", type=Path, metavar="DIR", help="what --hf-path was trained on, where that holds adapters or a "
        "connector alone; default: the folder that it names"
    )  # fmt: skip
    parser.add_argument(
        "--lora", choices=("merge", "keep"), help="what becomes of the adapters in --hf-path (default: merge)"
    )
    source.add_argument("--language-model", type=Path, help="folder of a language model; needs --vision-tower")
    parser.add_argument(
        "--vision-tower", type=Path, help=f"{tower_origins()} folder, where the weights above hold no tower"
    )
    parser.add_argument(
        "--vision-backend", choices=("megatron", "hf"), help="what will run the tower; default: megatron for CLIP"
    )
    parser.add_argument(
        "--pretrain-mm-mlp-adapter", type=Path, help="LLaVA's mm_projector.bin or MiniGPT-4's llama_proj, or a "
        "folder with one, laid over the connector"
    )  # fmt: skip
    parser.add_argument("--save", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: each as it is stored"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that read and write")
    parser.add_argument("--seed", type=int, default=1234, help="for a connector or heads that no file holds")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at --save")
    parser.add_argument(
        "--verify", action="store_true", help="then compare both models' logits on a random batch, and pixels; holds "
        "both in fp32 (8 bytes a parameter: some 60 GB for a 7B)"
    )  # fmt: skip
    args = parser.parse_args()
    if args.language_model and args.model_base:
        parser.error("--model-base goes with --hf-path, the folder of the adapters")
    if args.language_model and not args.vision_tower:
        parser.error(f"--language-model needs --vision-tower, the folder of a {tower_origins()} model")
    return args


def convert(args: argparse.Namespace) -> None:
    folder, adapters = args.hf_path or args.language_model, None
    prefetch(args.model_base or folder)
    from tqdm import tqdm

    from hacl_megatron.checkpoint.convert.freed_memory import keep_freed_memory
    from hacl_megatron.checkpoint.convert.hf_to_megatron import convert_to_sharded
    from hacl_megatron.checkpoint.hf.adapters.folder import find_model_base, open_adapted_sources, read_adapted_config
    from hacl_megatron.checkpoint.hf.adapters.settings import ADAPTER_CONFIG, is_adapter_folder
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.checkpoint.hf.export import DTYPES
    from hacl_megatron.checkpoint.hf.import_weights import open_sources
    from hacl_megatron.model.fresh import fresh_parts

    keep_freed_memory()
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.model_base is not None or (args.hf_path is not None and is_adapter_folder(args.hf_path)):
        adapters, folder = folder, find_model_base(folder, args.model_base)
        config = read_adapted_config(adapters, folder, args.vision_tower)
    else:
        config = read_model_config(folder, args.vision_tower)
    if args.lora and (adapters is None or not (adapters / ADAPTER_CONFIG).is_file()):
        raise ValueError(
            f"--lora {args.lora}: {adapters or folder} has no LoRA (no {ADAPTER_CONFIG}); leave the flag out"
        )
    if args.vision_backend:
        config = replace(config, vision=config.vision.on(args.vision_backend))
    beside = {"adapter": args.pretrain_mm_mlp_adapter, "vision_tower": args.vision_tower}
    if adapters is None:
        sources = open_sources(folder, config, **beside)
    else:
        sources = open_adapted_sources(adapters, folder, config, keep=args.lora == "keep", **beside)
    with tqdm(unit="B", unit_scale=True, desc="convert", delay=0.2) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        report = convert_to_sharded(
            sources,
            folder,
            args.save,
            fresh=fresh_parts(config, args.seed),
            dtype=dtype,
            workers=args.workers,
            adapters=adapters,
            force=args.force,
            progress=show,
        )
    print(f"{report.num_parameters:,} parameters, {report.num_bytes / 1e9:.3f} GB, to {report.checkpoint}")
    if report.fresh:
        print(f"fresh: {', '.join(report.fresh)}")
    for reason in sorted(set(report.ignored.values())):
        say(f"not used: {sum(value == reason for value in report.ignored.values())} tensors, {reason}")
    for note in sources.notes:
        say(f"note: {note}")
    if args.verify:
        from hacl_megatron.evaluation.agreement import report_agreement

        report_agreement(report.checkpoint, folder, sources, dtype=dtype, adapters=adapters)


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            convert(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
