"""Images a second of the input pipeline, against a torch DataLoader that makes the same batches.

    python tools/benchmark_data.py                                                 # draws 512 JPEGs of 640 x 480
    python tools/benchmark_data.py --tiles llava_next                              # pictures cut into tiles
    python tools/benchmark_data.py --data-path F.json --image-folder DIR --tokenizer DIR

Both read files, decode, pad to a square, resize (bicubic), normalise, tokenize and pack; no model runs. With tiles the
DataLoader cuts pictures by transformers' own processor, and what is counted are views: base views and tiles.
Repetitions are interleaved and the median counts, since a shared machine speeds up and slows down. Each repetition
starts a fresh loader and leaves out its first steps, so that nothing counts that was read ahead while the other one was
measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail
from hacl_megatron.data.templates import template_names

IMAGE_SIZES = {"none": 336, "llava_next": 336, "llava_onevision": 384}
PATCH_SIZE = 14
"""LLaVA-1.5's and those of the models that cut pictures into tiles."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", help="LLaVA JSON file; default: draws one")
    parser.add_argument("--image-folder", help="folder that the image names are relative to")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: one trained on the drawn captions")
    parser.add_argument("--version", choices=template_names(), default="v1", help="conversation template")
    parser.add_argument("--tiles", choices=(*IMAGE_SIZES,), default="none", help="whose tiles pictures are cut into")
    parser.add_argument("--image-backend", choices=("auto", "dali", "pillow"), default="auto", help="ours")
    parser.add_argument("--num-workers", type=int, default=2, help="threads of ours, processes of the DataLoader")
    parser.add_argument("--micro-batch-size", type=int, help="samples of a step; default 32, with tiles 8")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a repetition")
    parser.add_argument("--repetitions", type=int, default=7, help="of each of the two, interleaved")
    parser.add_argument("--drawn-images", type=int, default=512, help="images to draw without --data-path")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn images and the order")
    parser.add_argument("--save", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if args.data_path and not (args.image_folder and args.tokenizer):
        parser.error("--data-path needs --image-folder and --tokenizer")
    args.micro_batch_size = args.micro_batch_size or (32 if args.tiles == "none" else 8)
    return args


# --- what is read ------------------------------------------------------------------------------------------------


def draw_image(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG (quality 90) about as heavy to decode as a photograph of COCO: noise of falling spectrum, and shapes."""
    import io

    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    levels = np.zeros((height, width, 3), dtype=np.float32)
    for cell, weight in ((160, 80), (40, 40), (10, 22), (3, 14), (1, 5)):  # amplitude falls with frequency
        noise = rng.normal(0, weight, (height // cell + 2, width // cell + 2, 3)).clip(-120, 120) + 128
        coarse = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        levels += np.asarray(coarse, dtype=np.float32) - 128
    image = Image.fromarray((levels + 120).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, radius = rng.integers(0, width), rng.integers(0, height), rng.integers(10, 90)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(map(int, rng.integers(0, 256, 3))))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


WORDS = (
    "a the man dog cat street table red large small near behind with and of two people sitting standing bicycle tree"
)


def draw_data(folder: Path, number: int, seed: int) -> dict[str, str]:
    """Images, captions with one hallucinated twin each and a tokenizer trained on them; returns where they are."""
    import numpy as np
    import sentencepiece
    from tqdm import tqdm

    rng, words = np.random.default_rng(seed), WORDS.split()
    records, sizes = [], []
    (folder / "images").mkdir()
    for index in tqdm(range(number), desc="drawing", unit="img", leave=False, disable=None):
        data = draw_image(seed + index, *((640, 480) if index % 3 else (480, 640)))
        (folder / "images" / f"{index}.jpg").write_bytes(data)
        sizes.append(len(data))
        caption = " ".join(rng.choice(words, 20)).capitalize() + "."
        turns = [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": caption}]
        other = " ".join(rng.choice(words, 20)).capitalize() + "."
        record = {"id": str(index), "image": f"{index}.jpg", "conversations": turns, "text": caption}
        records.append(record | {"Hallucination caption": other})
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([record["text"] for record in records]),
        model_prefix=str(folder / "tokenizer" / "tokenizer"),
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    print(f"{number} drawn JPEGs of 640 x 480 and 480 x 640, {statistics.mean(sizes) / 1000:.0f} kB on average")
    paths = {"data_path": "data.json", "image_folder": "images", "tokenizer": "tokenizer"}
    return {name: str(folder / path) for name, path in paths.items()}


# --- the two ways ------------------------------------------------------------------------------------------------


def model_config(tiles: str):
    """LLaVA-1.5's, LLaVA-NeXT's or LLaVA-OneVision's image sizes; the language model's are not used here."""
    from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
    from hacl_megatron.config.tiles import TilesConfig

    width, size = (
        {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1},
        IMAGE_SIZES[tiles],
    )
    grids = {
        "none": [],
        "llava_next": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
        "llava_onevision": [(tall, wide) for tall in range(1, 7) for wide in range(1, 7)],
    }
    pinpoints = tuple((tall * size, wide * size) for tall, wide in grids[tiles])
    several = {"max_tiles": 9, "only_alone": True} if tiles == "llava_onevision" else {}
    return ModelConfig(
        language=LanguageConfig(**width, num_query_groups=1, vocab_size=32000, max_position_embeddings=1 << 15),
        vision=VisionConfig(**width, image_size=size, patch_size=PATCH_SIZE),
        image=ImageConfig(size=size),
        tiles=TilesConfig(pinpoints=pinpoints, **several) if pinpoints else None,
    )


def run_config(args: argparse.Namespace):
    """Of ours; the DataLoader takes from it how samples are encoded."""
    from hacl_megatron.config.flags import DataFlags, TrainingFlags
    from hacl_megatron.config.run import RunConfig

    flags = DataFlags(
        data_path=[args.data_path],
        image_folder=args.image_folder,
        version=args.version,
        image_backend=args.image_backend,
        num_workers=args.num_workers,
        model_max_length=2048 if args.tiles == "none" else 1 << 14,
    )
    architecture = model_config(args.tiles)
    return RunConfig(data=flags, training=TrainingFlags(seed=args.seed), architecture=architecture)


class PillowDataset:
    """What a torch Dataset for LLaVA does: opens, pads, resizes and normalises by Pillow, tokenizes. With tiles
    transformers' processor makes the pixels.

    `__getitem__` gives (Sample, EncodedSample, image key, float32 [views, 3, S, S]); `collate` packs a list of them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from hacl_megatron.data.encoding import EncodingSettings
        from hacl_megatron.data.manifest import Manifest
        from hacl_megatron.data.tokenizer import load_tokenizer

        config = run_config(args)
        image, self.layout = config.architecture.image, config.architecture.image_layout
        self.folder, self.tokenizer = Path(args.image_folder), load_tokenizer(args.tokenizer)
        manifest = Manifest.read([args.data_path], version=args.version)
        self.samples = [sample for sample in manifest if len(sample.images) == 1]
        self.settings = EncodingSettings.of(config)
        self.processor = None if args.tiles == "none" else processor_of(args.tiles, config.architecture)
        self.fill = tuple(int(mean * 255) for mean in image.mean)
        self.mean = torch.tensor(image.mean).mul(255).view(3, 1, 1)
        self.std = torch.tensor(image.std).mul(255).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, image):
        """float32 [views, 3, S, S] of an RGB picture: LLaVA's expand2square, CLIP's bicubic resize and normalisation;
        or what transformers' processor of tiles makes."""
        import numpy as np
        import torch
        from PIL import Image

        if self.processor is not None:
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        width, height = image.size
        if width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), self.fill)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        size = self.layout.view_size
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32)
        return levels.sub_(self.mean).div_(self.std)[None]

    def __getitem__(self, index: int):
        import io

        from PIL import Image

        from hacl_megatron.data.encoding import encode
        from hacl_megatron.data.store import image_key

        sample = self.samples[index]
        data = (self.folder / sample.images[0]).read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        encoded = encode(sample, self.tokenizer, self.settings, [image.size])
        return sample, encoded, image_key(data), self.pixels(image)

    def collate(self, items: list):
        import torch

        from hacl_megatron.data.packing import PackSlot, pack

        slots = [PackSlot(sample_id=s.sample_id, encoded=encoded, image_keys=(key,)) for s, encoded, key, _ in items]
        pixels = torch.cat([pixels for *_, pixels in items])
        return pack(slots, pixels, visual_tokens=self.layout.visual_tokens, pad_multiple=1)


def processor_of(tiles: str, model):
    """transformers' image processor, the one that works without torchvision."""
    image = model.image
    options = {
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in model.tiles.pinpoints],
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    square = {"height": image.size, "width": image.size}
    if tiles == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(size={"shortest_edge": image.size}, crop_size=square, **options)
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(size=square, **options)


def one_thread(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def baseline_steps(args: argparse.Namespace, dataset: PillowDataset) -> Iterator:
    """`PackedBatch`es by torch's DataLoader, endless."""
    import torch

    order = torch.utils.data.RandomSampler(dataset, num_samples=10**9, replacement=True)
    loader = torch.utils.data.DataLoader(
        dataset,
        args.micro_batch_size,
        sampler=order,
        num_workers=args.num_workers,
        collate_fn=dataset.collate,
        multiprocessing_context="fork",
        worker_init_fn=one_thread,
    )
    yield from loader


def our_steps(args: argparse.Namespace, tokenizer) -> Iterator:
    """`PackedBatch`es by our StepLoader, endless."""
    from hacl_megatron.data.loader import build_loader
    from hacl_megatron.data.step_maker import MicroBatching

    with build_loader(
        run_config(args),
        tokenizer,
        global_batch_size=args.micro_batch_size,
        micro_batching=MicroBatching(micro_batch_size=args.micro_batch_size),
        data_parallel_rank=0,
        data_parallel_size=1,
        pad_multiple=1,
    ) as loader:
        for step in loader:
            yield from (batch.main for batch in step.micro_batches)


def views_per_second(steps: Iterator, args: argparse.Namespace) -> float:
    """Over `--steps` steps, behind as many as a loader may have read ahead."""
    for _ in range(2 * args.num_workers + 2):
        next(steps)
    start = time.perf_counter()
    views = sum(next(steps).num_images for _ in range(args.steps))
    seconds = time.perf_counter() - start
    steps.close()
    return views / seconds


def pixel_difference(args: argparse.Namespace, dataset: PillowDataset, backend: str, number: int = 32):
    """(largest, mean) absolute difference in levels of 255 between our pixels and the DataLoader's."""
    import io

    from PIL import Image

    from hacl_megatron.data.images import ImageDecoder

    config = model_config(args.tiles)
    files = [(dataset.folder / sample.images[0]).read_bytes() for sample in dataset.samples[:number]]
    decoder = ImageDecoder(config.image, aspect_ratio="pad", backend=backend, layout=config.image_layout)
    decoded = decoder.decode(files)
    decoder.close()
    views = zip(decoded.first_views, decoded.first_views[1:], strict=False)
    differences = [
        (
            (decoded.pixel_values[start:end] - dataset.pixels(Image.open(io.BytesIO(data)).convert("RGB")))
            * dataset.std
        ).abs()
        for data, reason, (start, end) in zip(files, decoded.reasons, views, strict=True)
        if reason is None
    ]
    return max(d.max().item() for d in differences), statistics.mean(d.mean().item() for d in differences)


def benchmark(args: argparse.Namespace) -> dict:
    """Runs both, interleaved; prints and returns the figures."""
    import torch

    from hacl_megatron.data.images import resolve_backend

    torch.set_num_threads(1)
    backend = resolve_backend(args.image_backend)
    dataset = PillowDataset(args)
    if len(dataset) < 1:
        raise ValueError(f"{args.data_path}: no sample has an image; expected some to measure with")
    views = "images" if args.tiles == "none" else "views"
    rates: dict[str, list[float]] = {"ours": [], "DataLoader": []}
    for repetition in range(args.repetitions):
        ways = {"DataLoader": lambda: baseline_steps(args, dataset), "ours": lambda: our_steps(args, dataset.tokenizer)}
        for name in list(ways)[:: 1 if repetition % 2 else -1]:
            rates[name].append(views_per_second(ways[name](), args))
            print(f"repetition {repetition}: {name:<10} {rates[name][-1]:7.1f} {views}/s", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["DataLoader"], strict=True)]
    largest, mean = pixel_difference(args, dataset, backend)
    figures = {
        "backend": backend,
        "workers": args.num_workers,
        "cores": os.cpu_count(),
        "tiles": args.tiles,
        f"{views}_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_pixel_difference": largest,
        "mean_pixel_difference": mean,
    }
    ours, theirs = figures[f"{views}_per_second"].values()
    way = "Pillow" if args.tiles == "none" else type(dataset.processor).__name__
    print(
        f"{ours:.1f} {views}/s by {backend} against {theirs:.1f} by a DataLoader of {args.num_workers} workers over "
        f"{way}: ratio {figures['ratio']:.2f} (median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"pixels differ by at most {largest:.1f}/255, {mean:.3f}/255 on average")
    return figures


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not args.data_path:
            vars(args).update(draw_data(Path(folder), args.drawn_images, args.seed))
        figures = benchmark(args)
    if args.save:
        args.save.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            main(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
