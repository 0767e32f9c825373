"""Writes a page that shows what the model will see of samples: pixels, tokens, targets, captions, faults.

    python tools/inspect_data.py --data-path F.json --image-folder DIR --tokenizer DIR --output page.html
    python tools/inspect_data.py ... --ids 000000033471 '#12'        # by their `id`, or by number in the file
    python tools/inspect_data.py ... --random 3000                   # or --all: the page is searched and ordered
    python tools/inspect_data.py ... --all --load CKPT               # also which hallucinations the model believes

The page is one file that fetches nothing; open it in any browser. Flags that change what the model sees are the
trainer's. With --load they are by default those of the run, and larger models may be laid out under torchrun.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_arguments import add_layout_arguments, load_settings

from hacl_megatron.config.console import exit_with_error, is_first_rank, say, streams_that_may_fail
from hacl_megatron.config.flags import MAX_IMAGE_PIXELS
from hacl_megatron.data.templates import check_template, template_names

LLAVA_IMAGE_SIZE, LLAVA_PATCH_SIZE = 336, 14
MANY, SMALL = 64, 192
"""From more than so many samples on, pictures have at most so many pixels a side."""
LARGE = 300_000_000
"""Bytes of a page from which on browsers open it slowly, or not at all."""
DEFAULTS = {
    "version": "v1", "image_aspect_ratio": "pad", "image_transparency": "drop", "image_orientation": "ignore",
    "image_backend": "auto", "model_max_length": 2048, "contrastive_image_context": "image",
    "max_image_pixels": MAX_IMAGE_PIXELS, "preference_loss": "none",
}  # fmt: skip
"""Of the flags that are a run's own with --load."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", nargs="+", required=True, help="LLaVA JSON file(s)")
    parser.add_argument("--image-folder", default=".", help="folder that the image names are relative to")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: --pretrained-checkpoint's or --load's")
    parser.add_argument(
        "--pretrained-checkpoint",
        help="Hugging Face LLaVA or checkpoint of the trainer, whose image size counts; default: LLaVA-1.5's 336 / 14",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ids", nargs="+", metavar="ID", help="samples by their `id`, or '#N' by number from 0")
    which.add_argument("--random", type=int, default=16, metavar="N", help="so many samples drawn at random (16)")
    which.add_argument("--all", action="store_true", help="all samples")
    parser.add_argument("--seed", type=int, default=1234, help="of --random")
    parser.add_argument(
        "--picture-size", type=int, metavar="PIXELS", help="pictures as WebP of at most so many pixels a side; 0: as "
        f"PNG, each pixel as the model sees it (default: {SMALL} from more than {MANY} samples on, else 0)"
    )  # fmt: skip
    seen = parser.add_argument_group("what the model sees", "Defaults are the run's own with --load.")
    seen.add_argument("--version", choices=template_names(), help="conversation template (v1)")
    seen.add_argument("--image-aspect-ratio", choices=("pad", "square", "stretch"), help="(pad)")
    seen.add_argument("--image-transparency", choices=("drop", "fill"), help="(drop)")
    seen.add_argument("--image-orientation", choices=("ignore", "exif"), help="(ignore)")
    seen.add_argument("--image-backend", choices=("auto", "dali", "pillow"), help="(auto)")
    seen.add_argument("--model-max-length", type=int, help="(2048)")
    seen.add_argument("--contrastive-image-context", choices=("image", "prompt"), help="(image)")
    seen.add_argument(
        "--preference-loss",
        choices=("none", "dpo", "mdpo", "phrase"),
        help="also show the tokens that it compares (none)",
    )
    seen.add_argument("--max-image-pixels", type=int, help=f"({MAX_IMAGE_PIXELS})")
    asked = parser.add_argument_group("what a model believes", "By caption preference and retrieval of evaluate.py.")
    asked.add_argument("--load", type=Path, metavar="CKPT", help="SAVE folder of a run, one of its iter_* folders, or "
                       "a Hugging Face LLaVA: scores each caption and each twin")  # fmt: skip
    asked.add_argument("--batch-size", type=int, default=8, help="samples that are scored at once")
    asked.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    asked.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on the CPU and for a run "
                       "in fp32 float32")  # fmt: skip
    add_layout_arguments(asked)
    parser.add_argument("--output", required=True, type=Path, help="page to write")
    args = parser.parse_args()
    if not (args.tokenizer or args.pretrained_checkpoint or args.load):
        parser.error("give --tokenizer, --pretrained-checkpoint or --load, the folder of the tokenizer")
    if args.load is not None and (args.tokenizer or args.pretrained_checkpoint):
        parser.error(
            "--load brings its own tokenizer and image size; leave --tokenizer and --pretrained-checkpoint out"
        )
    return args


def choose(manifest: Sequence, ids: Sequence[str] | None, number: int | None, seed: int) -> list[int]:
    """Indices of the samples to show, in the order asked for; `number` None: of all. ValueError names what is not
    there."""
    if ids is None and number is None:
        return [*range(len(manifest))]
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


class Chosen(Sequence):
    """Some samples of a manifest, built when they are asked for."""

    def __init__(self, manifest: Sequence, indices: list[int]) -> None:
        self._manifest, self._indices = manifest, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Any:  # slices are not supported
        return self._manifest[self._indices[place]]


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


def way_of_flags(args: argparse.Namespace):
    """(EncodingSettings, ImageDecoder, tokenizer folder) without a run to take them from."""
    from hacl_megatron.data.encoding import EncodingSettings
    from hacl_megatron.data.images import ImageDecoder, resolve_backend

    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    image, layout, folder = sizes_and_tokenizer(args)
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
        backend=resolve_backend(args.image_backend),
        max_image_pixels=args.max_image_pixels,
        transparency=args.image_transparency,
        orientation=args.image_orientation,
        layout=layout,
    )
    return settings, decoder, folder


def way_of_run(args: argparse.Namespace):
    """(folder of the checkpoint, RunConfig): the run's, with the flags that are given laid over it."""
    from dataclasses import replace

    from hacl_megatron.assemble.loaded_model import forward_config, saved_config

    source, config = forward_config(args.load, load_settings(args))
    own = saved_config(args.load)[1].preference  # a forward pass needs none of it
    weighed = replace(config.preference, preference_loss=own.preference_loss, preference_weight=own.preference_weight)
    config, parts = replace(config, preference=weighed), {}
    for part in ("data", "objective", "preference"):
        names = [name for name in DEFAULTS if hasattr(getattr(config, part), name)]
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        parts[part] = replace(getattr(config, part), **given)
    return source, replace(config, **parts)


def kinds_of_edits(args: argparse.Namespace, manifest, chosen: list[int]) -> tuple[dict[int, dict], list[str]]:
    """Kinds of edit of the chosen samples' hallucinated captions, by index; the data of which they are not known here:
    prepared, or at a URL."""
    from hacl_megatron.config.files.urls import is_url
    from hacl_megatron.hallucinate.items import kinds_in

    found, without, start = {}, [], 0
    for path, number in zip(args.data_path, manifest.samples_per_file, strict=True):
        own = [index - start for index in chosen if 0 <= index - start < number]
        own = [at for at in own if (s := manifest[start + at]).hallucinated_captions or s.listed_pairs]
        if own and (is_url(path) or path.endswith(".arrow") or Path(path).is_dir()):
            without.append(path)
        elif own:
            found |= {start + at: kinds for at, kinds in kinds_in(Path(path), own).items()}
        start += number
    return found, without


def inspect(args: argparse.Namespace) -> None:
    from hacl_megatron.data.manifest import Manifest

    for name, least in (("batch_size", 1), ("picture_size", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}, expected at least {least}")
    if not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}; make it, or name another")
    if args.load is None:
        manifest = Manifest.read(args.data_path, version=args.version or DEFAULTS["version"])
        chosen = choose(manifest, args.ids, None if args.all else args.random, args.seed)
        settings, decoder, tokenizer = way_of_flags(args)
        write(args, manifest, chosen, settings, decoder, tokenizer)
        return
    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    from hacl_megatron.checkpoint.run.folder import assets_of
    from hacl_megatron.data.encoding import EncodingSettings
    from hacl_megatron.data.images import ImageDecoder
    from hacl_megatron.evaluation.likelihood.beliefs import beliefs

    source, config = way_of_run(args)
    manifest = Manifest.read(args.data_path, version=config.data.version)
    chosen = choose(manifest, args.ids, None if args.all else args.random, args.seed)
    believed = beliefs(source, config, Chosen(manifest, chosen), batch_size=args.batch_size)
    if is_first_rank():
        settings, decoder = EncodingSettings.of(config), ImageDecoder.of(config)
        write(args, manifest, chosen, settings, decoder, str(assets_of(source)), believed)


def note_of_size(num_bytes: int, number: int) -> str | None:
    """What to say of a page of so many samples that will have about so many bytes."""
    if num_bytes <= LARGE:
        return None
    return (
        f"note: the page of {number:,} samples will have about {num_bytes / 1e6:,.0f} MB, which browsers open slowly "
        f"or not at all; --random {max(1, number * LARGE // num_bytes)} makes one of {LARGE / 1e6:,.0f} MB"
    )


def write(
    args: argparse.Namespace, manifest, chosen: list[int], settings, decoder, tokenizer_folder: str, believed=None
) -> None:
    """Writes the page of the chosen samples.

    Args:
        believed: what `evaluation.likelihood.beliefs` returned for them.
    """
    from sample_page import SamplePage
    from tqdm import tqdm

    from hacl_megatron.data.show import Pictures, show
    from hacl_megatron.data.store import ImageStore
    from hacl_megatron.data.tokenizer import load_tokenizer

    tokenizer, store = load_tokenizer(tokenizer_folder), ImageStore(args.image_folder)
    check_template(settings.version, tokenizer)
    kinds, without_kinds = kinds_of_edits(args, manifest, chosen)
    size = (SMALL if len(chosen) > MANY else 0) if args.picture_size is None else args.picture_size
    pictures = Pictures(size=size or None)
    by_sample, scores, no_cosines = believed or ({}, [], None)
    measures = () if believed is None else ("sum", "per token", "cosine")[: 3 if no_cosines is None else 2]
    page, bad = SamplePage(measures=measures), 0
    for place, index in enumerate(tqdm(chosen, desc="samples", delay=2)):
        shown = show(
            manifest[index], store=store, decoder=decoder, tokenizer=tokenizer, settings=settings, pictures=pictures
        )
        bad += bool(shown.reasons)
        page.add(shown, kinds.get(index, {}), by_sample.get(place))
        if place == MANY and (size_note := note_of_size(page.expected_bytes(len(chosen)), len(chosen))):
            say(size_note)
    decoder.close()
    layout, image = settings.image_layout, decoder.config
    shape = decoder.aspect_ratio if layout.tiles is None else "in tiles"
    small = "" if pictures.size is None else f", shown as WebP of at most {pictures.size} x {pictures.size}"
    facts = {
        "template": settings.version,
        "tokenizer": tokenizer_folder,
        "images": f"{image.size} x {image.size}, {shape}, by {decoder.backend}{small}",
        "rows an image": layout.visual_tokens if layout.tiles is None else "by its size",
        "shown": f"{len(chosen):,} of {len(manifest):,} samples, {bad:,} unusable",
    }
    if without_kinds:
        facts["kinds of edit"] = f"not known of {', '.join(without_kinds)}; give the JSON, as a file here"
    if believed is not None:
        facts["model"] = args.load
        facts |= {
            f"{task.task} {name}": f"{value:.3f}"
            for task in scores
            for name, value in task.metrics.items()
            if value is not None and ("accuracy" in name or "margin" in name)
        }
        facts |= {} if no_cosines is None else {"contrast": no_cosines}
    title = f"What the model sees of {', '.join(Path(path).name for path in args.data_path)}"
    num_bytes = page.write(args.output, title, facts)
    say(f"{args.output}: {facts['shown']}, {num_bytes / 1e6:,.1f} MB")
    for task in scores:
        for note in task.notes:
            say(f"note: {task.task}: {note}")
    for name in ("contrast", "kinds of edit"):
        if name in facts:
            say(f"note: {name}: {facts[name]}")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            inspect(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
