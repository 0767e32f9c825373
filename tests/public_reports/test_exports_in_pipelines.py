"""transformers' pipeline over exports says what the trainer's own evaluation has the model say.

LLaVA-OneVision is not among them: its processor holds one of videos, which transformers has with torchvision alone.
"""

import pytest
from PIL import Image
from transformers import pipeline

from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question
from tests.public_reports.export_cases import hf, llava_next, original
from tests.tool_runs import to_hf, to_megatron

QUESTION, LENGTH = "What is in the picture?", 12


@pytest.mark.parametrize("write", [hf, original, llava_next], ids=lambda write: write.__name__)
def test_a_chat_message_is_answered_as_by_evaluate(write, tmp_path):
    """Catches an export whose files the pipeline cannot use, and one that it shows other words or pixels than training:
    then random weights say something else."""
    out = to_hf(to_megatron(write(tmp_path), tmp_path / "save"), tmp_path / "out")
    picture = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
    picture.save(tmp_path / "a.png")
    answerer = Answerer(out, tmp_path, device="cpu")
    (expected,) = answerer.answer([Question(image="a.png", prompt=QUESTION)], GenerationSettings(max_new_tokens=LENGTH))
    answerer.close()
    ask = pipeline("image-text-to-text", model=str(out), device="cpu")
    content = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": QUESTION}]
    (found,) = ask(
        text=[{"role": "user", "content": content}],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": LENGTH, "do_sample": False},
    )
    assert found["generated_text"].strip() == expected.text != ""
