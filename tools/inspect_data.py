"""Writes a page that shows what the model will see of some samples: pixels, tokens, targets, captions, faults.

    python tools/inspect_data.py --data-path F.json --image-folder DIR --tokenizer DIR --output page.html
    python tools/inspect_data.py ... --ids 000000033471 '#12'        # by their `id`, or by number in the file

The page is one file without scripts; open it in any browser. Flags that change what the model sees are the trainer's.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail
from hacl_megatron.config.flags import MAX_IMAGE_PIXELS
from hacl_megatron.data.templates import check_template, template_names

TEMPLATE = Path(__file__).with_name("inspect_data.html.j2")
LLAVA_IMAGE_SIZE, LLAVA_PATCH_SIZE = 336, 14
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 0x7F) if chr(code) != "\n"}
"""Control characters as escapes, which a page can show."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", nargs="+", required=True, help="LLaVA JSON file(s)")
    parser.add_argument("--image-folder", default=".", help="folder that the image names are relative to")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: --pretrained-checkpoint's")
    parser.add_argument(
        "--pretrained-checkpoint",
        help="Hugging Face LLaVA or checkpoint of the trainer, whose image size counts; default: LLaVA-1.5's 336 / 14",
    )
    parser.add_argument("--version", choices=template_names(), default="v1", help="conversation template")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ids", nargs="+", metavar="ID", help="samples by their `id`, or '#N' by number from 0")
    which.add_argument("--random", type=int, default=16, metavar="N", help="so many samples drawn at random (16)")
    parser.add_argument("--seed", type=int, default=1234, help="of --random")
    parser.add_argument("--image-aspect-ratio", choices=("pad", "square", "stretch"), default="pad")
    parser.add_argument("--image-transparency", choices=("drop", "fill"), default="drop")
    parser.add_argument("--image-orientation", choices=("ignore", "exif"), default="ignore")
    parser.add_argument("--image-backend", choices=("auto", "dali", "pillow"), default="auto")
    parser.add_argument("--model-max-length", type=int, default=2048)
    parser.add_argument("--contrastive-image-context", choices=("image", "prompt"), default="image")
    parser.add_argument(
        "--preference-loss",
        choices=("none", "dpo", "mdpo", "phrase"),
        default="none",
        help="also show the tokens that it compares",
    )
    parser.add_argument("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS)
    parser.add_argument("--output", required=True, type=Path, help="page to write")
    args = parser.parse_args()
    if not (args.tokenizer or args.pretrained_checkpoint):
        parser.error("give --tokenizer or --pretrained-checkpoint, the folder of the tokenizer")
    return args


def choose(manifest: Sequence, ids: Sequence[str] | None, number: int, seed: int) -> list[int]:
    """Indices of the samples to show, in the order asked for; ValueError names what is not there."""
    if ids is None:
        if number < 1:
            raise ValueError(f"--random is {number}, expected at least 1")
        return sorted(random.Random(seed).sample(range(len(manifest)), min(number, len(manifest))))
    from hacl_megatron.config.names import did_you_mean

    wanted = dict.fromkeys(ids)
    found: dict[str, list[int]] = {}
    names: dict[str, None] = {}
    for index, sample in enumerate(manifest):
        names[sample.name] = None
        for key in {sample.name, f"#{index}"} & wanted.keys():
            found.setdefault(key, []).append(index)
    for key in wanted:
        if key not in found:
            advice = did_you_mean(key, names, f"there are {len(manifest)} samples, '#0' is the first")
            raise ValueError(f"--ids {key!r}: no such sample; {advice}")
    return list(dict.fromkeys(index for key in wanted for index in found[key]))


def sizes_and_tokenizer(args: argparse.Namespace):
    """(ImageConfig, ImageLayout, tokenizer folder)."""
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.checkpoint.run.folder import assets_of, find_checkpoint, read_run_config
    from hacl_megatron.config.architecture import ImageConfig
    from hacl_megatron.config.tiles import ImageLayout

    if args.pretrained_checkpoint is None:
        tokens = (LLAVA_IMAGE_SIZE // LLAVA_PATCH_SIZE) ** 2
        return ImageConfig(size=LLAVA_IMAGE_SIZE), ImageLayout(visual_tokens=tokens), args.tokenizer
    folder = Path(args.pretrained_checkpoint)
    own = find_checkpoint(folder)
    config = read_run_config(own).architecture if own is not None else read_model_config(folder)
    return config.image, config.image_layout, args.tokenizer or str(assets_of(folder))


def visible(value: object) -> object:
    """Text with its control characters made visible; anything else as it is."""
    return value.translate(CONTROL) if isinstance(value, str) else value


def inspect(args: argparse.Namespace) -> None:
    import jinja2

    from hacl_megatron.data.encoding import EncodingSettings
    from hacl_megatron.data.images import ImageDecoder, resolve_backend
    from hacl_megatron.data.manifest import Manifest
    from hacl_megatron.data.show import show
    from hacl_megatron.data.store import ImageStore
    from hacl_megatron.data.tokenizer import load_tokenizer

    manifest = Manifest.read(args.data_path, version=args.version)
    chosen = choose(manifest, args.ids, args.random, args.seed)
    image, layout, folder = sizes_and_tokenizer(args)
    tokenizer, store, backend = (
        load_tokenizer(folder),
        ImageStore(args.image_folder),
        resolve_backend(args.image_backend),
    )
    check_template(args.version, tokenizer)
    settings = EncodingSettings(
        version=args.version,
        model_max_length=args.model_max_length,
        image_layout=layout,
        image_context=args.contrastive_image_context,
        preference_loss=args.preference_loss,
    )
    decoder = ImageDecoder(
        image,
        aspect_ratio=args.image_aspect_ratio,
        backend=backend,
        max_image_pixels=args.max_image_pixels,
        transparency=args.image_transparency,
        orientation=args.image_orientation,
        layout=layout,
    )
    samples = [
        show(manifest[index], store=store, decoder=decoder, tokenizer=tokenizer, settings=settings) for index in chosen
    ]
    decoder.close()
    bad = sum(bool(shown.reasons) for shown in samples)
    shape = args.image_aspect_ratio if layout.tiles is None else "in tiles"
    facts = {
        "template": args.version,
        "tokenizer": folder,
        "images": f"{image.size} x {image.size}, {shape}, by {backend}",
        "rows an image": layout.visual_tokens if layout.tiles is None else "by its size",
        "shown": f"{len(samples)} of {len(manifest):,} samples, {bad} unusable",
    }
    environment = jinja2.Environment(
        autoescape=True, finalize=visible, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"What the model sees of {', '.join(Path(path).name for path in args.data_path)}",
        facts=facts,
        samples=samples,
    )
    # A lone surrogate, which a broken sample may hold, is no character of UTF-8: shown as its escape.
    args.output.write_text(page, encoding="utf-8", errors="backslashreplace")
    say(f"{args.output}: {facts['shown']}")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            inspect(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
