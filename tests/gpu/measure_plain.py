"""The other side: HACL on transformers' LLaVA (`tests/reference_hacl.py`), four padded passes a step, on one GPU.

    python -m tests.gpu.measure_plain --out FOLDER --cases pretrain-image …

Behind `measure_package`, which leaves the lengths of its packs in FOLDER: this takes steps over samples of the same
lengths, in bf16, with the same number of layers and samples, images already on the GPU as floats. AdamW on bf16 weights
(fused), without fp32 copies: less work than the package's.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.speed_cases import SEVEN_B, TINY, Case, cases
from tests.reference_hacl import IGNORE, ReferenceHacl, ReferenceTrainer, Sample

WARM_UP = 1
"""Steps that do not count, behind a first one that tries whether it fits."""


def build(case: Case, attention: str, *, tiny: bool, device: str) -> ReferenceTrainer:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = TINY if tiny else SEVEN_B
    text = LlamaConfig(
        hidden_size=sizes["hidden"], intermediate_size=sizes["ffn"], num_hidden_layers=case.layers,
        num_attention_heads=sizes["heads"], vocab_size=sizes["vocab"], bos_token_id=1, eos_token_id=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=sizes["vision_hidden"], intermediate_size=4 * sizes["vision_hidden"],
        num_hidden_layers=sizes["vision_layers"], num_attention_heads=sizes["vision_hidden"] // 64,
        image_size=sizes["image"], patch_size=14, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=sizes["vocab"] - 1, tie_word_embeddings=False,
        image_seq_length=(sizes["image"] // 14) ** 2,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.set_default_dtype(torch.bfloat16)
    llava = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    model = ReferenceHacl(llava, freeze_language_model=case.stage == "pretrain", image_context=case.context)
    model.to(device)
    trainer = ReferenceTrainer(model, lr=1e-5, train_iters=1000)
    groups = trainer.optimizer.param_groups
    trainer.optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
    return trainer


def draw(case: Case, lengths: list[dict[str, list[int]]], *, tiny: bool, device: str) -> list[list[Sample]]:
    sizes = TINY if tiny else SEVEN_B
    visual, image_id = (sizes["image"] // 14) ** 2, sizes["vocab"] - 1
    step = []
    for batch in lengths:
        samples = []
        for index, (rows, targets, before) in enumerate(
            zip(batch["dialogues"], batch["targets"], batch["prefix"], strict=True)
        ):
            ids = torch.randint(20, sizes["vocab"] - 2, (rows,))
            ids[0] = 1
            ids[before : before + visual] = image_id
            labels = torch.full_like(ids, IGNORE)
            labels[-targets:] = ids[-targets:]
            twins = [n for n, owner in zip(batch["hallucinated"], batch["owner"], strict=True) if owner == index]
            samples.append(
                Sample(
                    dialogue=ids,
                    labels=labels,
                    pixel_values=torch.randn(3, sizes["image"], sizes["image"]),
                    image_id=index,
                    caption=torch.randint(20, sizes["vocab"] - 2, (batch["captions"][index] - 1,)),
                    hallucinated=[torch.randint(20, sizes["vocab"] - 2, (n - 1,)) for n in twins],
                )
            )
        step.append(samples)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["pretrain-image", "pretrain-prompt", "finetune-image"])
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0
    torch.set_default_device(device)
    for name in args.cases:
        case = cases(memory, tiny=args.tiny)[name]
        for attention in args.attention:
            found: dict[str, Any] = {"case": name, "label": f"plain, {attention}", **vars(case)}
            try:
                lengths = json.loads((args.out / f"lengths-{name}.json").read_text())
                trainer = build(case, attention, tiny=args.tiny, device=device)
                batches = draw(case, lengths, tiny=args.tiny, device=device)
                try:
                    trainer.step(batches)
                except torch.OutOfMemoryError:  # its padded passes keep more than the package's: in two halves, then
                    found["label"] += ", half micro-batches"
                    trainer.optimizer.zero_grad()
                    batches = [half for batch in batches for half in (batch[::2], batch[1::2])]
                    torch.cuda.empty_cache()
                    trainer.step(batches)
                times = []
                for _ in range(args.steps):
                    started = time.perf_counter()
                    trainer.step(batches)  # ends with numbers on the host
                    times.append(time.perf_counter() - started)
                found["iteration-time"] = statistics.median(times[min(WARM_UP, args.steps - 1) :])
                found["iteration-times"] = [round(value, 4) for value in times]
                found["samples-per-second"] = case.global_batch / found["iteration-time"]
                if device == "cuda":
                    found["mem-max-allocated-bytes"] = torch.cuda.max_memory_allocated()
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"[:600]
            with (args.out / "speed.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
            trainer = batches = None
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
