"""Likelihoods and embeddings by transformers alone, on an exported folder; nothing of the package but its tokenizer
(which has tests of its own)."""

import json
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hacl_megatron.data.tokenizer import load_tokenizer

V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ",
    "\n{question} ASSISTANT:",
    " {answer}</s>",
)
"""Vicuna's prompt before the image, behind it, and the answer."""
PLAIN = ("", "", "{answer}\n")


class Oracle:
    def __init__(self, export: Path, images: Path) -> None:
        self.export, self.images = export, images
        self.model = LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(export).image_processor
        self.tokenizer = load_tokenizer(str(export))
        self.visual = self.model.config.image_seq_length

    @cached_property
    def heads(self) -> dict[str, Tensor]:
        return load_file(self.export / "hacl_heads.safetensors")

    def pixels(self, name: str) -> Tensor:
        with Image.open(self.images / name) as image:
            return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def log_likelihood(self, name: str, question: str, answer: str, template: tuple[str, str, str] = V1) -> Tensor:
        """[tokens] log-likelihoods of the answer's tokens."""
        before, behind, said = (part.format(question=question, answer=answer) for part in template)
        image = [self.model.config.image_token_id] * self.visual
        prefix = [*self.tokenizer.encode(before, bos=True), *image]
        prompt = [*prefix, *self.tokenizer.encode(behind, bos=False)]
        whole = torch.tensor([[*prefix, *self.tokenizer.encode(behind + said, bos=False)]])
        assert whole[0, : len(prompt)].tolist() == prompt
        logits = self.model(input_ids=whole, pixel_values=self.pixels(name)).logits[0].double()
        # What pads the vocabulary is there in the export too, and has no likelihood in training.
        return F.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None]).flatten()

    @torch.no_grad()
    def states(self, ids: list[int], **pixels: Tensor) -> Tensor:
        """[H] behind the final norm, at the EOS that is put behind `ids`."""
        rows = torch.tensor([[*ids, self.tokenizer.eos_id]])
        return self.model.model(input_ids=rows, **pixels).last_hidden_state[0, -1]

    def image_state(self, name: str) -> Tensor:
        return self.states([self.model.config.image_token_id] * self.visual, pixel_values=self.pixels(name))

    def text_state(self, text: str) -> Tensor:
        return self.states(self.tokenizer.encode(text, bos=True))

    def embedding(self, state: Tensor, head: str) -> Tensor:
        return F.normalize(F.linear(state, self.heads[f"{head}.weight"], self.heads[f"{head}.bias"]), dim=-1)


def records(output: Path, task: str) -> list[dict]:
    """The journal of a task, in the order of its items."""
    lines = output.with_name(f"{output.stem}.{task}.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len({record["key"] for record in found}) == len(found)
    return sorted(found, key=lambda record: record["key"])
