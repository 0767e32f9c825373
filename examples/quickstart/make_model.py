"""Writes the quickstart's tiny model: a Hugging Face folder with tokenizer and processor, ready for pretrain.

    python examples/quickstart/make_model.py --data output/quickstart/data --output output/quickstart/model
    python examples/quickstart/make_model.py --model minigpt4 --output output/quickstart/minigpt4/model

LLaVA and MiniGPT-4 start from parts that know something: a vision tower that has seen images, a Q-Former that has
learnt what to tell of them, a LLaMA that has read text. So do we, within about two minutes on two cores, and with Muon
(`muon.py`), by which they learn in half of the steps:

    tokenizer        LLaMA's kind (BPE, byte fallback), trained on the drawn sentences
    vision tower     a CLIP ViT (or BLIP-2's) that learns what every patch shows (colour, shape, size, where,
                     background) from the hidden state that the connector reads
    Q-Former         minigpt4 alone: BLIP-2's, each query of which learns to tell what one patch shows
    language model   a LLaMA that learns the sentences by next-token prediction, and to put into a sentence what it was
                     told before, at the same time on the other core

LLaVA's connector and MiniGPT-4's projection stay random: pretrain trains them, and the contrastive heads, from nothing.
"""

import argparse
import io
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tiny_llava
import tiny_minigpt4
import torch
from language_model import train_language_model
from qformer import train_qformer
from tokenizer import train_tokenizer
from transformers import LlamaTokenizerFast
from transformers.utils import logging as transformers_logging
from vision_tower import train_tower

KINDS = {"llava": tiny_llava, "minigpt4": tiny_minigpt4}


def one_thread_each() -> None:
    """Two trainings run side by side: half of the cores for each, and no more than such small matrices can use."""
    torch.set_num_threads(min(4, max(1, (os.cpu_count() or 1) // 2)))


def read_tokenizer(kind: str, data: Path) -> LlamaTokenizerFast:
    sentences = (data / "corpus.txt").read_text().splitlines()
    return train_tokenizer(sentences, KINDS[kind].PROMPT, KINDS[kind].NAMED_TOKENS)


def language_worker(kind: str, data: Path, steps: int, seed: int) -> tuple[bytes, dict[str, float]]:
    """A process of its own: (trained weights of `language_parts`, what `train_language_model` reached)."""
    one_thread_each()
    tokenizer = read_tokenizer(kind, data)
    parts = KINDS[kind].language_parts(KINDS[kind].build(tokenizer, seed))
    reached = train_language_model(*parts, data, tokenizer, KINDS[kind].ASPECT, KINDS[kind].DIALOGUE, steps, seed)
    buffer = io.BytesIO()
    torch.save(parts.state_dict(), buffer)
    return buffer.getvalue(), reached


def make_model(
    kind: str, data: Path, output: Path, tower_steps: int, qformer_steps: int, language_steps: int, seed: int
) -> None:
    """Everything named at the top of this file; each part prints what it reached."""
    start = time.monotonic()
    transformers_logging.disable_progress_bar()
    one_thread_each()
    tiny = KINDS[kind]
    tokenizer = read_tokenizer(kind, data)
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    model = tiny.build(tokenizer, seed)
    seen = {}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        reading = pool.submit(language_worker, kind, data, language_steps, seed) if language_steps else None
        seen["vision tower"] = train_tower(tiny.vision_tower(model), data, tiny.ASPECT, tower_steps, seed)
        if kind == "minigpt4":
            seen["Q-Former"] = train_qformer(model, data, tiny.ASPECT, qformer_steps, seed)
        if reading is not None:
            weights, reached = reading.result()
            tiny.language_parts(model).load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    for part, accuracy in seen.items():
        print(f"{part}: colour and shape right in {accuracy:.0%} of the held-out drawings' patches (chance: 2%)")
    if reading is not None:
        print(
            "language model: {loss:.2f} nats a token, {told:.2f} behind notes; {recall:.3f} nats from recalling every "
            "word at </s>, {told recall:.3f} behind notes".format(**reached)
        )
    tiny.save(model, tokenizer, output)
    number = sum(weight.numel() for weight in model.parameters())
    name = {"llava": "LLaVA", "minigpt4": "MiniGPT-4"}[kind]
    print(f"{output}: a {name} of {number / 1e6:.1f} million parameters, made in {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's tiny model.")
    parser.add_argument("--model", choices=KINDS, default="llava")
    parser.add_argument("--data", type=Path, default=Path("output/quickstart/data"), help="what draw.py wrote")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart/model"))
    parser.add_argument("--tower-steps", type=int, default=2200)
    parser.add_argument("--qformer-steps", type=int, default=800)
    parser.add_argument("--language-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    make_model(args.model, args.data, args.output, args.tower_steps, args.qformer_steps, args.language_steps, args.seed)


if __name__ == "__main__":
    main()
