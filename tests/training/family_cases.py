"""Tiny models of each family as runs start from them, with tokenizers and templates of their kind.

Sizes are odd: 6 heads in 2 groups, each 24 wide over a hidden size of 48, 331 rows of which the tokenizer has fewer,
`<image>` in the middle where the tokenizer is byte-level; 9 heads in 3 groups for three tensor-parallel ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data.tiny_bpe import LLAMA_3, QWEN, write_bpe
from tests.tiny import LLAMA3_ROPE_SCALING, write_tiny_llava
from tests.training.runs import layout_flags, train

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3_ROPE_SCALING},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 400},
}
"""Arguments of `write_tiny_llava` beside sizes."""
BYTE_LEVEL = {"llama": ("llama_3", LLAMA_3), "qwen2": ("qwen", QWEN), "qwen3": ("qwen", QWEN)}
"""Families with a tokenizer of this kind and its chat template; the others have SentencePiece's."""
VERSIONS = {"llama": "llama_3", "qwen2": "chatml", "qwen3": "chat", "mistral": "mistral"}
"""`--version` of stage 2."""
IMAGE_AT = 150
LORA = ["--lora-rank", "3", "--lora-alpha", "6"]


@dataclass(frozen=True)
class Model:
    """What a run starts from."""

    family: str
    tied: bool
    lora: bool
    by_three: bool = False
    """Sizes that three tensor-parallel ranks can share."""

    @property
    def folder(self) -> str:
        """Of the Hugging Face checkpoint."""
        return f"{self.family}-{'tied' if self.tied else 'untied'}{'-by3' * self.by_three}"

    @property
    def name(self) -> str:
        """Of what the runs start from."""
        return self.folder + "-lora" * self.lora

    def flags(self, root: Path, stage: str) -> list[str]:
        """Beside the YAML of `tests.training.runs.make_inputs` in `root`."""
        version = [] if stage == "pretrain" else ["--version", VERSIONS[self.family]]
        start = ["--pretrained-checkpoint", str(root / self.name), "--model-max-length", "400"]
        return [*start, *version, *(LORA if self.lora else [])]


def write_models(root: Path, models: list[Model]) -> None:
    """Folders under `root` that runs of these models start from.

    Adapters begin where one step with a large rate has led them: fresh ones have B = 0, and so no gradient of A.
    """
    steps = []
    for model in dict.fromkeys(models):
        if not (root / model.folder).exists():
            _write_llava(root / model.folder, model)
        if model.lora:
            hf = Model(model.family, model.tied, lora=False, by_three=model.by_three)
            files = ["--config", str(root / "pretrain.yaml"), *hf.flags(root, "pretrain"), *LORA]
            rates = ["--lr", "0.05", "--connector-lr", "0", "--heads-lr", "0", "--exit-interval", "1"]
            steps.append([*files, *rates, "--save", str(root / model.name), *layout_flags("tp1")[1]])
    for at in range(0, len(steps), 12):  # as many as one group of processes does in its time
        train(steps[at : at + 12], 1)


def _write_llava(folder: Path, model: Model) -> None:
    sizes: dict[str, Any] = {"heads": 6, "groups": 2, "layers": 3}
    if model.by_three:
        sizes = {"heads": 9, "groups": 3, "layers": 3, "hidden": 36, "ffn": 90, "vision_hidden": 30, "vision_heads": 3}
    write_tiny_llava(folder, family=model.family, tie=model.tied, head_dim=24, **sizes, **FAMILIES[model.family])
    if model.family not in BYTE_LEVEL:
        return
    for path in [*folder.glob("*token*"), *folder.glob("chat_template*"), *folder.glob("processor_config.json")]:
        path.unlink()
    kind, template = BYTE_LEVEL[model.family]
    write_bpe(folder, kind, chat_template=template, image_at=IMAGE_AT)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": IMAGE_AT}))
