"""Prompts as in training, pixels as transformers', and batches that answer as each question alone would."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IMAGE, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question, prompt_rows, read_export
from tests.tiny import write_tiny_original_llava

PROMPTS = [
    "Is there a circle in the image?\nAnswer the question using a single word or phrase.",
    "Describe this image.",
    "  What?  ",
    "Name the colour of the large square at the bottom, and say whether a triangle is beside it.",
]


@pytest.fixture(scope="module")
def answerer(exports: dict[str, Path], images: Path) -> Answerer:
    return Answerer(exports["square"], images, device="cpu")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_the_beginning_of_a_training_dialogue(prompt: str, exports: dict[str, Path]) -> None:
    tokenizer, config = load_tokenizer(str(exports["square"])), read_export(exports["square"])
    rows = prompt_rows(prompt, tokenizer, config)
    sample = Sample(
        sample_id=0, name="", images=("a.jpg",), caption=None, hallucinated_captions=(), source="",
        conversations=(("human", f"<image>\n{prompt}"), ("gpt", "yes, red")),
    )  # fmt: skip
    settings = EncodingSettings(
        version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=config.vision.num_patches)
    )
    trained = encode(sample, tokenizer, settings)
    answer_starts = int(np.argmax(trained.labels != -100))
    assert not trained.tokenization_mismatch
    assert len(rows) == answer_starts
    np.testing.assert_array_equal(rows == config.extra["image_token_index"], trained.dialogue[:answer_starts] == IMAGE)
    np.testing.assert_array_equal(rows[rows != 320], trained.dialogue[:answer_starts][rows != 320])
    assert (rows == 320).sum() == 36


def test_transformers_own_processor_reads_the_text_behind_the_image_otherwise(exports: dict[str, Path]) -> None:
    """Why prompts are not left to it: one token behind `<image>` is another, here and with Vicuna's tokenizer."""
    tokenizer, config = load_tokenizer(str(exports["square"])), read_export(exports["square"])
    ours = prompt_rows("What is this?", tokenizer, config).tolist()
    text = tokenizer.decode(ours[: ours.index(320)]).strip() + " <image>\nWhat is this? ASSISTANT:"
    processor = AutoProcessor.from_pretrained(exports["square"])
    theirs = processor(text=text, images=Image.new("RGB", (48, 48)))["input_ids"]
    theirs = list(theirs[0]) if isinstance(theirs[0], list) else list(theirs)
    assert theirs.count(320) == ours.count(320)
    assert theirs != ours
    behind_ours, behind_theirs = (row[len(row) - row[::-1].index(320) :] for row in (ours, theirs))
    assert tokenizer.backend.convert_ids_to_tokens(behind_ours[0]) == "▁"
    assert behind_theirs == behind_ours[1:]


@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_pixels_are_those_of_the_exports_own_processor(aspect_ratio, exports, images: Path) -> None:
    answerer = Answerer(exports[aspect_ratio], images, device="cpu")
    processor = AutoProcessor.from_pretrained(exports[aspect_ratio])
    names = sorted(path.name for path in images.iterdir())
    prepared = answerer._prepare([Question(image=name, prompt="What?") for name in names])
    theirs = [
        torch.as_tensor(np.asarray(processor.image_processor(Image.open(images / name))["pixel_values"]))[0]
        for name in names
    ]
    for asked, expected in zip(prepared, theirs, strict=True):
        # A pixel is rounded to one of 255 levels between padding and resizing, in either order of the two.
        torch.testing.assert_close(asked.views[0], expected, rtol=0, atol=1e-5)


def answer_alone(model, answerer: Answerer, question: Question, images: Path, num_new: int) -> str:
    """Greedy decoding of one question without padding, cache or `generate`: the whole row again for every token."""
    ids = torch.from_numpy(answerer.rows(question.prompt))[None]
    pixels = answerer.decoder.decode([(images / question.image).read_bytes()]).pixel_values
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(num_new):
            token = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -1].argmax()
            if token == 2:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return answerer.tokenizer.decode(ids[0, start:].tolist()).strip()


def test_a_batch_of_unlike_prompts_answers_as_each_alone(answerer: Answerer, exports, images: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    questions = [Question(image=names[index % 5], prompt=PROMPTS[index % 4]) for index in range(7)]
    model = LlavaForConditionalGeneration.from_pretrained(exports["square"], dtype=torch.float32).eval()
    expected = [answer_alone(model, answerer, question, images, 6) for question in questions]
    assert len(set(expected)) > 3  # or the comparison says little
    for batch_size in (1, 3):
        answers = list(answerer.answer(questions, GenerationSettings(max_new_tokens=6, batch_size=batch_size)))
        assert [answer.text for answer in answers] == expected
        assert all(answer.error is None for answer in answers)


def test_beams_of_one_question_do_not_mix_with_anothers(answerer: Answerer, images: Path) -> None:
    name = sorted(path.name for path in images.iterdir())[0]
    questions = [Question(image=name, prompt=prompt) for prompt in PROMPTS[:2]]
    settings = GenerationSettings(max_new_tokens=5, num_beams=3, batch_size=2)
    together = [answer.text for answer in answerer.answer(questions, settings)]
    alone = [next(answerer.answer([question], settings)).text for question in questions]
    greedy = [answer.text for answer in answerer.answer(questions, GenerationSettings(max_new_tokens=5))]
    assert together == alone
    assert together != greedy


@pytest.mark.parametrize(
    ("key", "what"), [("max_position_embeddings", "context"), ("sliding_window", "sliding window")]
)
def test_an_answer_ends_where_the_model_would_see_no_more(answerer, exports, images, tmp_path, key, what) -> None:
    """Catches answers that run past positions that the model has never had, or past a window beyond which it no longer
    sees the image; and one that is cut without a word, or cuts its neighbours in the batch."""
    name = sorted(path.name for path in images.iterdir())[0]
    questions = [Question(image=name, prompt=prompt) for prompt in (PROMPTS[3], PROMPTS[1])]
    longest, other = (len(answerer.rows(question.prompt)) for question in questions)
    assert longest > other + 6
    folder = shutil.copytree(exports["square"], tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = longest + 2
    if key == "sliding_window":
        config["text_config"] |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    short = Answerer(folder, images, device="cpu")
    settings = GenerationSettings(max_new_tokens=6, batch_size=2)
    whole, unhurt = answerer.answer(questions, settings)
    cut, beside = short.answer(questions, settings)
    assert whole.cut is None and beside == unhurt
    assert cut.text != whole.text
    assert cut.text == next(answerer.answer(questions[:1], GenerationSettings(max_new_tokens=2))).text
    assert cut.cut == f"the answer ends at the model's {what} of {longest + 2} tokens"
    beams = GenerationSettings(max_new_tokens=6, num_beams=3, batch_size=2)
    assert [answer.cut for answer in short.answer(questions, beams)] == [cut.cut, None]
    config["text_config"][key] = longest
    (folder / "config.json").write_text(json.dumps(config))
    (refused,) = Answerer(folder, images, device="cpu").answer(questions[:1], settings)
    assert refused.error == f"the prompt leaves no room for an answer in the model's {what} of {longest} tokens"


def test_generation_settings_of_the_export_do_not_make_it_sample(exports, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports["square"], tmp_path / "samples")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.update(do_sample=True, temperature=5.0, top_p=0.9, max_length=4096)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    question = [Question(image=sorted(path.name for path in images.iterdir())[0], prompt=PROMPTS[1])]
    generation = GenerationSettings(max_new_tokens=8)
    torch.manual_seed(0)
    answers = {next(Answerer(folder, images, device="cpu").answer(question, generation)).text for _ in range(3)}
    assert len(answers) == 1
    assert answers == {next(Answerer(exports["square"], images, device="cpu").answer(question, generation)).text}


def test_an_unusable_image_or_prompt_costs_its_own_item_alone(answerer: Answerer, images: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    sound = [Question(image=name, prompt=PROMPTS[0]) for name in names[:3]]
    settings = GenerationSettings(max_new_tokens=4, batch_size=2)
    expected = [answer.text for answer in answerer.answer(sound, settings)]
    asked = [
        Question(image="missing.jpg", prompt=PROMPTS[0]),
        *sound[:2],
        Question(image="../outside.jpg", prompt=PROMPTS[0]),
        Question(image=names[0], prompt="word " * 500),
        sound[2],
        Question(image=names[0], prompt="\ud800"),
    ]
    answers = list(answerer.answer(asked, settings))
    assert [answer.text for answer in answers] == ["", *expected[:2], "", "", expected[2], ""]
    reasons = [answer.error for answer in answers if answer.error]
    assert "missing.jpg: no such file" in reasons[0] and "leaves the image folder" in reasons[1]
    assert "no room for an answer in the model's context of 512" in reasons[2] and "does not tokenize" in reasons[3]


def test_models_that_cannot_answer_are_refused(exports: dict[str, Path], images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format hf"):
        read_export(write_tiny_original_llava(tmp_path / "original")[0])
    cut = shutil.copytree(exports["square"], tmp_path / "cut")
    for weights in cut.glob("model*.safetensors"):
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "mlp.down_proj" in name))
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing|cannot load"):
        Answerer(cut, images, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            Answerer(exports["square"], images, device="cuda")


def test_a_prompt_with_an_image_tag_has_one_image_still(answerer: Answerer) -> None:
    assert (answerer.rows("<image>\nWhat?") == 320).sum() == 36
    np.testing.assert_array_equal(answerer.rows("<image>\nWhat?"), answerer.rows("What?"))
    with pytest.raises(UnusableSample):
        answerer.rows("\ud800")


def test_a_model_of_nan_is_refused_and_not_scored(exports: dict[str, Path], images: Path) -> None:
    """Its answers are empty texts, which a benchmark counts as wrong: an accuracy of 0.0, and a status of 0."""
    broken = Answerer(exports["square"], images, device="cpu")
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[5, 3] = float("nan")
    question = Question(image=sorted(path.name for path in images.iterdir())[0], prompt=PROMPTS[0])
    with pytest.raises(ValueError, match="not finite") as refusal:
        list(broken.answer([question], GenerationSettings(max_new_tokens=4)))
    assert str(exports["square"]) in str(refusal.value) and "\n" not in str(refusal.value)
