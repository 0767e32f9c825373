"""What the round trips of conversion share: the models, heads beside them, and every tensor of a folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, open_sources
from tests.tiny import (
    FAMILY_SIZES,
    LLAMA3_ROPE_SCALING,
    randomise,
    tiny_image_processor,
    write_tiny_llava,
)

HIDDEN = 48
MODELS = {
    "odd": {},
    "tied-llama3": {"tie": True, "rope_scaling": LLAMA3_ROPE_SCALING, "select_layer": -1},
    "first-layers": {"select_layer": 1, "vision_layers": 3},
    **FAMILY_SIZES,
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def write_heads(folder: Path, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"vision_projector.weight": (HIDDEN // 4, HIDDEN), "vision_projector.bias": (HIDDEN // 4,),
              "text_projector.weight": (HIDDEN // 4, HIDDEN), "text_projector.bias": (HIDDEN // 4,),
              "temperature": (1,)}  # fmt: skip
    heads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(heads, folder / HEADS_FILE)
    return heads


def carried_of(folder: Path, config) -> dict[str, Tensor]:
    sources = open_sources(folder, config)
    return {name: sources.read(name) for name in sources.table.carried if name in sources.found}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file of a folder, by the name in the file."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def load_exactly(folder: Path, kind: type = LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The model of a folder by transformers' class `kind`, which must find all of its tensors and no others."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    problems = {key: value for key, value in info.items() if value and key != "conversion_errors"}
    assert not problems, problems
    return model.eval()


def write_parts(folder: Path, *, whole_clip: bool) -> tuple[Path, Path, LlavaForConditionalGeneration]:
    """A LLaMA folder and a CLIP folder, with the parts of the tiny LLaVA."""
    folder.mkdir()
    source = write_tiny_llava(folder / "llava")
    llava = load_exactly(source)
    llama = LlamaForCausalLM(llava.config.text_config)
    llama.model.load_state_dict(llava.model.language_model.state_dict())
    llama.lm_head.load_state_dict(llava.lm_head.state_dict())
    llama.save_pretrained(folder / "llama")
    if whole_clip:
        text = CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
        clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=llava.config.vision_config.to_dict()))
        randomise(clip, 3)
        clip.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
        clip.save_pretrained(folder / "clip")
    else:
        llava.model.vision_tower.save_pretrained(folder / "clip")
    tiny_image_processor().save_pretrained(folder / "clip")
    return folder / "llama", folder / "clip", llava


def save_adapter(path: Path, prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (HIDDEN, 32), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save({prefix + name: value for name, value in tensors.items()}, path)
    return tensors
