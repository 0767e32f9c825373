"""A program for another Python: opens exports with the transformers that it has, computes, and saves them again.

    python open_export.py RESULTS.npz EXPORT EXPORT ...      `RESULTS` gets ids, logits, pixels and prompts of each

It imports nothing of this repository.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A red circle on the left."}]}]


def open_export(folder: Path) -> dict[str, np.ndarray]:
    """What a user gets of it; raises what transformers does, also where a weight is missing or left over."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    blip2 = name == "Blip2ForConditionalGeneration"
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8))
    found: dict[str, Any] = {}
    for turn in ("opened", "again"):  # once more as it has saved them itself
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model, info = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, torch_dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        text = "A red circle on the left." if blip2 else "USER: <image>\nA red circle on the left. ASSISTANT:"
        batch = processor(text=[text, text + " A"], images=[picture, picture], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        # Blip2Processor forgets its chat template.
        speaker = processor.tokenizer if blip2 else processor
        prompt = speaker.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        found |= {f"{turn} ids": batch["input_ids"].numpy(), f"{turn} logits": logits.numpy(),
                  f"{turn} pixels": batch["pixel_values"].numpy(), f"{turn} prompt": np.array(prompt)}  # fmt: skip
        folder = folder.with_name(f"{folder.name}-by-{transformers.__version__}")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return found


if __name__ == "__main__":
    results, *exports = map(Path, sys.argv[1:])
    np.savez(results, **{f"{out.name}: {key}": value for out in exports for key, value in open_export(out).items()})
