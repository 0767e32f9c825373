"""What the GPU measurements run: LLaVA-1.5 7B's sizes in both stages, with data of the published lengths.

Real JPEGs of a photograph's size, drawn; texts of random words that a real tokenizer reads. As many layers as the
card's memory takes without recomputation; `tiny` shrinks everything, so that the programs can be rehearsed on a CPU.
"""

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llava_1_5"
SAMPLES = 256
SEVEN_B = dict(hidden=4096, ffn=11008, heads=32, vocab=32000, vision_hidden=1024, vision_layers=24, image=336)
QWEN = dict(hidden=3584, ffn=18944, heads=28, groups=4, vocab=152064, vision_hidden=1024, vision_layers=24, image=336)
"""Qwen2.5-7B's, 28 layers, with the same tower."""
TINY = dict(hidden=128, ffn=256, heads=2, vocab=512, vision_hidden=64, vision_layers=3, image=56)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured run."""

    name: str
    stage: str
    """`pretrain` (connector, heads, τ train) or `finetune` (the LLaMA too)."""
    context: str
    """`--contrastive-image-context`."""
    layers: int
    micro_batch: int
    num_micro_batches: int = 1
    fp8: bool = False
    recompute: bool = False
    sizes: str = "llama"
    """`qwen2`: Qwen2.5-7B's."""
    preference: str | None = None
    """`--preference-loss`, on records of one answer and its twin, without contrast; without it, the data of the other
    cases."""

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.num_micro_batches


def cases(memory: float, *, tiny: bool = False) -> dict[str, Case]:
    """By name; `memory` in GiB decides how many layers and samples fit."""
    if tiny:
        sizes = {"pretrain": (2, 2), "finetune": (2, 2)}
    elif memory > 120:
        sizes = {"pretrain": (32, 16), "finetune": (16, 8)}
    else:
        sizes = {"pretrain": (32, 8), "finetune": (12, 4)}
    found = {}
    for stage, (layers, size) in sizes.items():
        micro_batches = 2 if stage == "finetune" else 1
        for context in ("image", "prompt"):
            for fp8 in (False, True):
                name = f"{stage}-{context}" + ("-fp8" if fp8 else "")
                found[name] = Case(
                    name=name, stage=stage, context=context, layers=layers, micro_batch=size,
                    num_micro_batches=micro_batches, fp8=fp8,
                )  # fmt: skip
    for name, loss in (("finetune-twins", "none"), ("finetune-dpo", "dpo"), ("finetune-phrase", "phrase")):
        found[name] = replace(found["finetune-image"], name=name, preference=loss)
    qwen = replace(found["pretrain-image"], name="pretrain-qwen", sizes="qwen2")
    found[qwen.name] = replace(qwen, layers=min(qwen.layers, 28))
    return found


def model_section(case: Case, *, tiny: bool) -> dict[str, Any]:
    """The `model:` section of the example, with the case's layers."""
    sizes = TINY if tiny else QWEN if case.sizes == "qwen2" else SEVEN_B
    return {
        "language": {
            "family": case.sizes,
            "num-layers": case.layers, "hidden-size": sizes["hidden"], "ffn-hidden-size": sizes["ffn"],
            "num-attention-heads": sizes["heads"], "num-query-groups": sizes.get("groups", sizes["heads"]),
            "vocab-size": sizes["vocab"], "max-position-embeddings": 4096,
        },
        "vision": {
            "num-layers": sizes["vision_layers"], "hidden-size": sizes["vision_hidden"],
            "ffn-hidden-size": 4 * sizes["vision_hidden"], "num-attention-heads": sizes["vision_hidden"] // 64,
            "image-size": sizes["image"], "patch-size": 14,
        },
    }  # fmt: skip


def write_data(folder: Path) -> None:
    """JPEGs, two JSON files and a tokenizer, once."""
    from tests.tiny import image_token_id, sentencepiece_model, tiny_tokenizer

    if (folder / "finetune.json").exists():
        return
    rng, noise = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(SAMPLES):
        coarse = Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((640, 480))
        grain = noise.integers(-12, 13, (480, 640, 3))
        photo = np.clip(np.asarray(coarse, dtype=np.int64) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / "images" / f"{index:04d}.jpg", quality=85)
    words = ["circle", "square", "red", "green", "left", "right", "the", "on", "a", "blue"]

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    records: dict[str, list[dict[str, Any]]] = {"pretrain": [], "finetune": [], "twins": []}
    for index in range(SAMPLES):
        caption = text(rng.randint(3, 8))
        common = {"id": str(index), "image": f"{index:04d}.jpg", "text": caption, "Hallucination caption": text(5)}
        turns = [{"from": "human", "value": "<image>\n" + text(4)}, {"from": "gpt", "value": caption}]
        records["pretrain"].append({**common, "conversations": turns})
        dialogue = []
        for turn in range(3):
            question = ("<image>\n" if turn == 0 else "") + text(5)
            dialogue += [{"from": "human", "value": question}, {"from": "gpt", "value": text(rng.randint(5, 20))}]
        records["finetune"].append({**common, "conversations": dialogue})
        true, wrong = text(rng.randint(15, 40)), text(rng.randint(15, 40))
        turns = [turns[0], {"from": "gpt", "value": true}]
        records["twins"].append({**common, "text": true, "Hallucination caption": wrong, "conversations": turns})
    tiny_tokenizer(331).save_pretrained(folder / "tokenizer")
    shutil.copy(sentencepiece_model(image_token_id(331)), folder / "tokenizer")
    for stage, entries in records.items():
        (folder / f"{stage}.json").write_text(json.dumps(entries))


def write_config(case: Case, data: Path, *, tiny: bool, steps: int) -> Path:
    """The example's YAML with the case's sizes, this data and nothing saved; its path."""
    example = "hacl_pretrain_7b.yaml" if case.stage == "pretrain" else "finetune_7b.yaml"
    values = yaml.safe_load((EXAMPLES / example).read_text())
    for name in ("pretrained-checkpoint", "vision-tower", "save", "load", "save-interval", "num-train-epochs"):
        values.pop(name, None)
    transformer: dict[str, Any] = {}
    if case.recompute:
        transformer |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    if case.fp8:
        transformer["fp8"] = "hybrid"
    values |= {
        "model": model_section(case, tiny=tiny),
        "tokenizer": str(data / "tokenizer"),
        "data-path": [str(data / f"{case.stage if case.preference is None else 'twins'}.json")],
        "image-folder": str(data / "images"),
        "model-max-length": 2048,
        "micro-batch-size": case.micro_batch,
        "global-batch-size": case.global_batch,
        "train-iters": steps,
        "contrastive-weight": 1.0 if case.preference is None else 0.0,
        "preference-loss": case.preference or "none",
        "contrastive-negatives": "queue" if case.stage == "pretrain" else "micro-batch",
        "contrastive-image-context": case.context,
        "transformer": transformer,
        "num-workers": 8,
    }
    path = data / f"{case.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
