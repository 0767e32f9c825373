"""Turns a checkpoint of this trainer into a Hugging Face folder.

    python tools/convert_megatron_to_hf.py --load SAVE --hf-path OUT [--format hf|llava|projector|peft] [--verify]

`hf` is what `transformers.LlavaForConditionalGeneration.from_pretrained` (`Blip2ForConditionalGeneration` for a model
with a Q-Former) and `AutoProcessor.from_pretrained` load, `llava` the original LLaVA layout, `projector` its
`mm_projector.bin` alone, or MiniGPT-4's `llama_proj.pth`; each with `hacl_heads.safetensors`. LoRA is merged into these
weights; `peft` writes it as an adapter that `peft.PeftModel.from_pretrained` lays beside the base, which is written too
(OUT/base) where the run did not start from it.
The model is never held: memory does not grow with it. OUT appears when it is complete.
"""

import argparse
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", required=True, type=Path, help="SAVE folder (its newest checkpoint), or an iter_* one"
    )
    parser.add_argument("--hf-path", required=True, type=Path, help="folder to write")
    parser.add_argument("--format", choices=("hf", "llava", "projector", "peft"), default="hf")
    parser.add_argument("--leave-lora-out", action="store_true", help="hf, llava: the weights beside the LoRA alone")
    parser.add_argument(
        "--peft-base", type=Path, metavar="DIR", help="peft: a folder that holds the base already; default: what the "
        "run started from, if it does"
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: each as in the checkpoint"
    )
    parser.add_argument(
        "--vision-tower", choices=("inside", "folder", "named"), help="llava: the tower in the weight files, in a CLIP "
        "folder within, or just named; default: inside where a name for it is known, else a folder"
    )  # fmt: skip
    parser.add_argument(
        "--image-aspect-ratio", choices=("pad", "square", "stretch"), help="default: as the model was trained"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest safetensors file, such as 5GB")
    parser.add_argument("--workers", type=int, default=2, help="threads that read ahead")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --hf-path")
    parser.add_argument(
        "--verify", action="store_true", help="hf: then compare both models' logits on a random batch, and pixels; "
        "holds both in fp32 (8 bytes a parameter: some 60 GB for a 7B)"
    )  # fmt: skip
    return parser.parse_args()


def convert(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    from hacl_megatron.assemble.start_from import chat_template
    from hacl_megatron.checkpoint.convert.freed_memory import keep_freed_memory
    from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
    from hacl_megatron.checkpoint.convert.reader import ShardedReader
    from hacl_megatron.checkpoint.hf.export import DTYPES
    from hacl_megatron.checkpoint.run.folder import ASSETS_FOLDER, iteration_folder, locate_checkpoint, read_run_config

    keep_freed_memory()
    if args.verify and args.format != "hf":
        raise ValueError(
            f"--verify runs transformers' model, which cannot load --format {args.format}; verify --format hf"
        )
    if args.leave_lora_out and (args.verify or args.format not in ("hf", "llava")):
        raise ValueError(
            "--leave-lora-out writes another model than the checkpoint's, as hf or llava, not to be verified"
        )
    if args.peft_base is not None and args.format != "peft":
        raise ValueError("--peft-base is for --format peft alone; leave it out")
    checkpoint, dtype = locate_checkpoint(args.load), DTYPES[args.dtype] if args.dtype else None
    run = read_run_config(checkpoint)
    trained = checkpoint.name != iteration_folder(checkpoint.parent, 0).name  # else it is a conversion
    template = chat_template(run, checkpoint / ASSETS_FOLDER, trained=trained)
    if template is None and args.format == "hf":
        print(f"note: no chat template for --version {run.data.version} is known here; the export has the source's")
    total = ShardedReader(checkpoint).num_bytes if args.format in ("hf", "llava") else None
    with tqdm(total=total, unit="B", unit_scale=True, desc=args.format, delay=0.2) as bar:
        report = export_checkpoint(
            checkpoint,
            args.hf_path,
            format=args.format,
            merge_lora=not args.leave_lora_out,
            dtype=dtype,
            tower=args.vision_tower,
            image_aspect_ratio=args.image_aspect_ratio,
            chat_template=template,
            peft_base=args.peft_base,
            max_shard_size=args.max_shard_size,
            workers=args.workers,
            force=args.force,
            progress=bar.update,
        )
    print(f"{report.num_tensors} tensors, {report.num_bytes / 1e9:.3f} GB from {checkpoint} to {report.folder}")
    for note in report.notes:
        say(f"note: {note}")
    if args.verify:
        from hacl_megatron.evaluation.agreement import report_agreement

        report_agreement(checkpoint, args.hf_path, dtype=dtype, image_aspect_ratio=args.image_aspect_ratio)


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            convert(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
