"""Images a second of the input pipeline, against a torch DataLoader over Pillow that makes the same batches.

    python tools/benchmark_data.py                                                 # draws 512 JPEGs of 640 x 480
    python tools/benchmark_data.py --data-path F.json --image-folder DIR --tokenizer DIR

Both read files, decode, pad to a square, resize (bicubic), normalise, tokenize and pack; no model runs. Repetitions
are interleaved and the median counts, since a shared machine speeds up and slows down. Each repetition starts a fresh
loader and leaves out its first steps, so that nothing counts that was read ahead while the other one was measured.
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

IMAGE_SIZE, PATCH_SIZE = 336, 14
"""LLaVA-1.5's."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", help="LLaVA JSON file; default: draws one")
    parser.add_argument("--image-folder", help="folder that the image names are relative to")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: one trained on the drawn captions")
    parser.add_argument("--version", choices=template_names(), default="v1", help="conversation template")
    parser.add_argument("--image-backend", choices=("auto", "dali", "pillow"), default="auto", help="ours")
    parser.add_argument("--num-workers", type=int, default=2, help="threads of ours, processes of the DataLoader")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="samples of a step")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a repetition")
    parser.add_argument("--repetitions", type=int, default=7, help="of each of the two, interleaved")
    parser.add_argument("--drawn-images", type=int, default=512, help="images to draw without --data-path")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn images and the order")
    parser.add_argument("--save", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if args.data_path and not (args.image_folder and args.tokenizer):
        parser.error("--data-path needs --image-folder and --tokenizer")
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


def model_config():
    """LLaVA-1.5's image sizes; the language model's are not used here."""
    from hacl_megatron.config.architecture import ImageConfig, LanguageConfig, ModelConfig, VisionConfig

    width = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    return ModelConfig(
        language=LanguageConfig(**width, num_query_groups=1, vocab_size=32000),
        vision=VisionConfig(**width, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        image=ImageConfig(size=IMAGE_SIZE),
    )


class PillowDataset:
    """What a torch Dataset for LLaVA does: opens, pads, resizes and normalises by Pillow, tokenizes.

    `__getitem__` gives (EncodedSample, image key, float32 [3, S, S]); `collate` packs a list of them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from hacl_megatron.data.encoding import EncodingSettings
        from hacl_megatron.data.manifest import Manifest
        from hacl_megatron.data.tokenizer import load_tokenizer

        image, layout = model_config().image, model_config().image_layout
        self.folder, self.tokenizer = Path(args.image_folder), load_tokenizer(args.tokenizer)
        manifest = Manifest.read([args.data_path], version=args.version)
        self.samples = [sample for sample in manifest if len(sample.images) == 1]
        self.settings = EncodingSettings(version=args.version, model_max_length=2048, image_layout=layout)
        self.fill = tuple(int(mean * 255) for mean in image.mean)
        self.mean = torch.tensor(image.mean).mul(255).view(3, 1, 1)
        self.std = torch.tensor(image.std).mul(255).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, data: bytes):
        """float32 [3, S, S]: LLaVA's expand2square, CLIP's bicubic resize and normalisation."""
        import io

        import numpy as np
        import torch
        from PIL import Image

        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        if width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), self.fill)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32)
        return levels.sub_(self.mean).div_(self.std)

    def __getitem__(self, index: int):
        from hacl_megatron.data.encoding import encode
        from hacl_megatron.data.store import image_key

        sample = self.samples[index]
        data = (self.folder / sample.image).read_bytes()
        return sample, encode(sample, self.tokenizer, self.settings), image_key(data), self.pixels(data)

    def collate(self, items: list):
        import torch

        from hacl_megatron.data.packing import PackSlot, pack

        slots = [PackSlot(sample_id=s.sample_id, encoded=encoded, image_keys=(key,)) for s, encoded, key, _ in items]
        pixels = torch.stack([pixels for *_, pixels in items])
        return pack(slots, pixels, visual_tokens=self.settings.image_layout.visual_tokens, pad_multiple=1)


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
    from hacl_megatron.config.flags import DataFlags, TrainingFlags
    from hacl_megatron.config.run import RunConfig
    from hacl_megatron.data.loader import build_loader
    from hacl_megatron.data.step_maker import MicroBatching

    flags = DataFlags(
        data_path=[args.data_path],
        image_folder=args.image_folder,
        version=args.version,
        image_backend=args.image_backend,
        num_workers=args.num_workers,
    )
    with build_loader(
        RunConfig(data=flags, training=TrainingFlags(seed=args.seed), architecture=model_config()),
        tokenizer,
        global_batch_size=args.micro_batch_size,
        micro_batching=MicroBatching(micro_batch_size=args.micro_batch_size),
        data_parallel_rank=0,
        data_parallel_size=1,
        pad_multiple=1,
    ) as loader:
        for step in loader:
            yield from (batch.main for batch in step.micro_batches)


def images_per_second(steps: Iterator, args: argparse.Namespace) -> float:
    """Over `--steps` steps, behind as many as a loader may have read ahead."""
    for _ in range(2 * args.num_workers + 2):
        next(steps)
    start = time.perf_counter()
    images = sum(next(steps).num_images for _ in range(args.steps))
    seconds = time.perf_counter() - start
    steps.close()
    return images / seconds


def pixel_difference(args: argparse.Namespace, dataset: PillowDataset, backend: str, number: int = 32):
    """(largest, mean) absolute difference in levels of 255 between our pixels and the DataLoader's."""
    from hacl_megatron.data.images import ImageDecoder

    config = model_config().image
    files = [(dataset.folder / sample.image).read_bytes() for sample in dataset.samples[:number]]
    decoder = ImageDecoder(config, aspect_ratio="pad", backend=backend)
    decoded = decoder.decode(files)
    decoder.close()
    differences = [
        ((decoded.pixel_values[index] - dataset.pixels(data)) * dataset.std).abs()
        for index, data in enumerate(files)
        if decoded.reasons[index] is None
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
    rates: dict[str, list[float]] = {"ours": [], "DataLoader": []}
    for repetition in range(args.repetitions):
        ways = {"DataLoader": lambda: baseline_steps(args, dataset), "ours": lambda: our_steps(args, dataset.tokenizer)}
        for name in list(ways)[:: 1 if repetition % 2 else -1]:
            rates[name].append(images_per_second(ways[name](), args))
            print(f"repetition {repetition}: {name:<10} {rates[name][-1]:7.1f} images/s", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["DataLoader"], strict=True)]
    largest, mean = pixel_difference(args, dataset, backend)
    figures = {
        "backend": backend,
        "workers": args.num_workers,
        "cores": os.cpu_count(),
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_pixel_difference": largest,
        "mean_pixel_difference": mean,
    }
    ours, theirs = figures["images_per_second"].values()
    print(
        f"{ours:.1f} images/s by {backend} against {theirs:.1f} by a DataLoader of {args.num_workers} workers over "
        f"Pillow: ratio {figures['ratio']:.2f} (median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
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
