"""Exports that see pictures in tiles, asked in words and by likelihood, beside transformers' processor and model."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodingSettings
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question
from hacl_megatron.evaluation.likelihood.task import with_answer
from hacl_megatron.evaluation.likelihood.yesno import SHORT_ANSWER
from tests.distributed import run_distributed
from tests.evaluation.exports import write_pope_questions
from tests.tiny_data import write_tiny_data
from tests.tiny_tiles import write_tiny_next, write_tiny_onevision
from tests.tool_runs import run_tool

MODELS = {"next": write_tiny_next, "onevision": write_tiny_onevision}
SIZES = [(150, 30), (40, 130), (60, 60), (200, 170)]
PROMPTS = ("What is this?", "Is it red or blue, and where is it?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled")
    for name, write in MODELS.items():
        write(folder / name, layers=2)
    write_tiny_data(folder / "data", n=len(SIZES))
    for size, path in zip(SIZES, sorted((folder / "data" / "images").rglob("*.jpg")), strict=True):
        with Image.open(path) as image:
            resized = image.resize(size)
        resized.save(path, quality=92)
    return folder


def pictures(folder: Path) -> list[str]:
    images = folder / "data" / "images"
    return sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))


def given(folder: Path, model: str, name: str) -> dict[str, torch.Tensor]:
    with Image.open(folder / "data" / "images" / name) as image:
        return dict(AutoImageProcessor.from_pretrained(folder / model)(image.convert("RGB"), return_tensors="pt"))


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers_on_the_same_files(folder: Path, name: str) -> None:
    """In batches of unlike pictures: fails where rows are another picture's, or views are padded away."""
    answerer = Answerer(folder / name, folder / "data" / "images", device="cpu")
    model = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
    questions = [Question(image=image, prompt=prompt) for image in pictures(folder) for prompt in PROMPTS]
    expected = []
    for question in questions:
        with Image.open(folder / "data" / "images" / question.image) as image:
            size = image.size
        ids = torch.from_numpy(answerer.rows(question.prompt, size))[None]
        output = model.generate(
            input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=answerer.stop_ids,
            **given(folder, name, question.image),
        )  # fmt: skip
        expected.append(answerer.tokenizer.decode(output[0, ids.shape[1] :].tolist()).strip())
    settings = GenerationSettings(max_new_tokens=5, batch_size=3)
    answers = list(answerer.answer(questions, settings))
    answerer.close()
    assert [answer.error for answer in answers] == [None] * len(questions)
    assert [answer.text for answer in answers] == expected and len(set(expected)) > 3


def evaluate(folder: str) -> None:
    for name in MODELS:
        flags = ["--load", f"{folder}/{name}", "--tasks", "yesno", "--questions", f"{folder}/questions.json"]
        flags += ["--image-folder", f"{folder}/data/images", "--output", f"{folder}/{name}.json", "--batch-size", "3"]
        version = data_flags(read_model_config(Path(folder) / name)).version
        assert run_tool("evaluate", *flags, "--device", "cpu", "--model-max-length", "500", "--version", version) == 0


def test_likelihoods_of_yes_and_no_are_those_of_transformers(folder: Path) -> None:
    """Two questions about each picture share its views: fails where they are laid out for another number of them."""
    write_pope_questions(folder / "questions.json", pictures(folder), 2 * len(SIZES))
    run_distributed(evaluate, 1, str(folder))
    questions = [json.loads(line) for line in (folder / "questions.json").read_text().splitlines()]
    for name in MODELS:
        found = [
            json.loads(line)
            for path in sorted(folder.glob(f"{name}*.jsonl"))
            for line in path.read_text().splitlines()
            if "log_likelihood_yes" in line
        ]
        assert len(found) == len(questions)
        config, tokenizer = read_model_config(folder / name), load_tokenizer(str(folder / name))
        version, layout = data_flags(config).version, config.image_layout
        settings = EncodingSettings(version=version, model_max_length=500, image_layout=layout)
        model = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
        for question, record in zip(questions, sorted(found, key=lambda record: record["key"]), strict=True):
            with Image.open(folder / "data" / "images" / question["image"]) as image:
                size = image.size
            for word, key in (("Yes", "log_likelihood_yes"), ("No", "log_likelihood_no")):
                encoded = with_answer(question["text"] + SHORT_ANSWER, word, size, tokenizer, settings)
                ids, labels = torch.from_numpy(encoded.dialogue)[None], torch.from_numpy(encoded.labels)
                ids = torch.where(ids == IMAGE, config.extra["image_token_index"], ids)
                with torch.no_grad():
                    logits = model(input_ids=ids, **given(folder, name, question["image"])).logits[0, :-1]
                expected = -float(cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum"))
                assert record[key] == pytest.approx(expected, abs=2e-2), (name, question)
