"""A MiniGPT-4 is evaluated as a LLaVA is: the prompt as trained, answers and likelihoods as transformers has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IMAGE, EncodingSettings, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question, prompt_rows, read_export
from hacl_megatron.evaluation.likelihood.task_run import from_text
from hacl_megatron.evaluation.likelihood.yesno import SHORT_ANSWER
from tests.distributed import run_distributed
from tests.evaluation.exports import speak, write_pope_questions
from tests.evaluation.likelihood.likelihood_oracle import records
from tests.tiny import write_tiny_blip2
from tests.tiny_data import write_tiny_data
from tests.tool_runs import run_tool, to_hf, to_megatron

NUM_SAMPLES, QUERIES, IMAGE_TOKEN = 6, 5, 320
TASKS = ("preference", "retrieval", "yesno")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint (`save`), its export, data and questions."""
    folder = tmp_path_factory.mktemp("minigpt4")
    to_megatron(write_tiny_blip2(folder / "source"), folder / "save")
    to_hf(folder / "save", folder / "export")
    data = write_tiny_data(folder / "data", n=NUM_SAMPLES)
    samples = json.loads(data["contrastive"].read_text())
    write_pope_questions(folder / "questions.json", [sample["image"] for sample in samples], NUM_SAMPLES)
    return folder


@pytest.fixture(scope="module")
def likelihoods(folder: Path) -> Path:
    """The folder, with `tp2.json` of the checkpoint and `export.json` of the export."""
    for name, load, processes in (("export", "export", 1), ("tp2", "save", 2)):
        command = [
            "--load", str(folder / load), "--tasks", *TASKS, "--data-path", str(folder / "data" / "contrastive.json"),
            "--image-folder", str(folder / "data" / "images"), "--questions", str(folder / "questions.json"),
            "--output", str(folder / f"{name}.json"), "--batch-size", "4", "--device", "cpu",
            "--tensor-model-parallel-size", str(processes), "--image-backend", "pillow",
        ]  # fmt: skip
        run_distributed(evaluate, processes, command)
    return folder


def evaluate(command: list[str]) -> None:
    assert run_tool("evaluate", *command) == 0


class Oracle:
    """transformers' model and processor, and MiniGPT-4's template written down again."""

    def __init__(self, export: Path, images: Path) -> None:
        self.images, self.heads = images, load_file(export / "hacl_heads.safetensors")
        self.model = Blip2ForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(export).image_processor
        self.tokenizer = load_tokenizer(str(export))

    def pixels(self, name: str) -> Tensor:
        with Image.open(self.images / name) as image:
            return torch.as_tensor(np.asarray(self.processor(image.convert("RGB"))["pixel_values"]))

    def prompt(self, question: str) -> list[int]:
        before, behind = "###Human: <Img>", f"</Img> {question} ###Assistant: "
        image = [IMAGE_TOKEN] * QUERIES
        return [*self.tokenizer.encode(before, bos=True), *image, *self.tokenizer.encode(behind, bos=False)]

    @torch.no_grad()
    def logits(self, ids: list[int], name: str) -> Tensor:
        return self.model(input_ids=torch.tensor([ids]), pixel_values=self.pixels(name), use_cache=False).logits[0]

    def log_likelihood(self, name: str, question: str, answer: str) -> float:
        prompt, said = self.prompt(question), self.tokenizer.encode(f"{answer}###", bos=False)
        logits = self.logits([*prompt, *said], name).double()
        rows = F.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        return float(rows.gather(1, torch.tensor(said)[:, None]).sum())

    @torch.no_grad()
    def embedding(self, ids: list[int], head: str, image: str | None = None) -> Tensor:
        hidden = self.model.get_input_embeddings()(torch.tensor([[*ids, self.tokenizer.eos_id]]))
        if image is not None:
            features = self.model.get_image_features(pixel_values=self.pixels(image)).pooler_output
            hidden = torch.cat([features, hidden], dim=1)
        state = self.model.language_model.model(inputs_embeds=hidden).last_hidden_state[0, -1]
        return F.normalize(F.linear(state, self.heads[f"{head}.weight"], self.heads[f"{head}.bias"]), dim=-1)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder / "export", folder / "data" / "images")


# ---------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("name", ["tp2", "export"])
def test_likelihoods_and_embeddings_are_those_of_transformers(likelihoods: Path, oracle: Oracle, name: str) -> None:
    folder, output = likelihoods, likelihoods / f"{name}.json"
    questions = [json.loads(line) for line in (folder / "questions.json").read_text().splitlines()]
    found = records(output, "yesno")
    assert len(found) == NUM_SAMPLES
    for record, question in zip(found, questions, strict=True):
        expected = [
            oracle.log_likelihood(question["image"], question["text"] + SHORT_ANSWER, answer)
            for answer in ("Yes", "No")
        ]
        assert [record["log_likelihood_yes"], record["log_likelihood_no"]] == pytest.approx(expected, abs=TOLERANCE)

    samples = json.loads((folder / "data" / "contrastive.json").read_text())
    for record in records(output, "preference"):
        sample = samples[record["key"]]
        wrong = sample["Hallucination caption"]
        texts = [sample["text"], *([wrong] if isinstance(wrong, str) else wrong)]
        question = sample["conversations"][0]["value"].replace("<image>", "").strip()
        expected = [oracle.log_likelihood(sample["image"], question, text) for text in texts]
        found = [answer["log_likelihood"] for answer in (record["caption"], *record["hallucinated"])]
        assert found == pytest.approx(expected, abs=TOLERANCE)

    for record in records(output, "retrieval"):
        sample = samples[record["key"]]
        caption = oracle.embedding(oracle.tokenizer.encode(sample["text"], bos=True), "text_projector")
        image = oracle.embedding([], "vision_projector", sample["image"])
        for key, expected in (("image_embedding", image), ("caption_embedding", caption)):
            np.testing.assert_allclose(from_text(record[key]), expected.numpy(), atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------------------------------- answers


def test_a_prompt_is_the_beginning_of_a_training_dialogue(folder: Path, oracle: Oracle) -> None:
    tokenizer, config = load_tokenizer(str(folder / "export")), read_export(folder / "export")
    rows = prompt_rows("Is there a circle?", tokenizer, config)
    sample = Sample(
        sample_id=0, name="", images=("a.jpg",), caption=None, hallucinated_captions=(), source="",
        conversations=(("human", "<image>\nIs there a circle?"), ("gpt", "yes")),
    )  # fmt: skip
    settings = EncodingSettings(
        version="minigpt4", model_max_length=512, image_layout=ImageLayout(visual_tokens=QUERIES)
    )
    trained = encode(sample, tokenizer, settings)
    starts = int(np.argmax(trained.labels != -100))
    expected = np.where(trained.dialogue == IMAGE, IMAGE_TOKEN, trained.dialogue)[:starts]
    np.testing.assert_array_equal(rows, expected)
    assert rows.tolist() == oracle.prompt("Is there a circle?")


def greedy(oracle: Oracle, question: Question, num_new: int) -> str:
    """Token by token through the forward pass, without padding, cache or `generate`."""
    ids = oracle.prompt(question.prompt)
    start = len(ids)
    while len(ids) < start + num_new and ids[-1] != 2:
        ids.append(int(oracle.logits(ids, question.image)[-1].argmax()))
    return oracle.tokenizer.decode(ids[start:]).strip()


def test_a_batch_answers_as_each_question_alone(folder: Path, oracle: Oracle) -> None:
    names = sorted(path.name for path in oracle.images.glob("*.jpg"))
    prompts = ["What is this?", "Name the colour of the large square at the bottom.", "A circle?"]
    questions = [Question(image=name, prompt=prompt) for name, prompt in zip(names[:3] * 2, prompts * 2, strict=True)]
    questions += [Question(image=names[3], prompt=prompts[0])]
    answerer = Answerer(folder / "export", oracle.images, device="cpu")
    answers = list(answerer.answer(questions, GenerationSettings(max_new_tokens=6, batch_size=3)))
    assert [answer.text for answer in answers] == [greedy(oracle, question, 6) for question in questions]
    assert len({answer.text for answer in answers}) > 2
    beams = GenerationSettings(max_new_tokens=4, num_beams=2, batch_size=2)
    together = [answer.text for answer in answerer.answer(questions[:2], beams)]
    assert together == [next(answerer.answer([question], beams)).text for question in questions[:2]]


def test_an_answer_ends_at_its_mark(folder: Path, monkeypatch) -> None:
    """Words put into the model's mouth: what follows `###` is neither said nor, once all have ended, computed."""
    images = folder / "data" / "images"
    names = sorted(path.name for path in images.glob("*.jpg"))
    answerer = Answerer(folder / "export", images, device="cpu")
    # the question itself holds the mark, too
    lengths = speak(answerer, ["A###BCDEFGHIJ", "AB#C##D###EFG"], monkeypatch)
    questions = [Question(image=name, prompt="What?") for name in names[:2]]
    answers = answerer.answer(questions, GenerationSettings(max_new_tokens=13, batch_size=2))
    assert [answer.text for answer in answers] == ["A", "AB#C##D"]
    alone = answerer.answer(questions[:1], GenerationSettings(max_new_tokens=13, batch_size=1))
    assert [answer.text for answer in alone] == ["A"]
    assert lengths == [10, 4]


def test_the_tool_answers_pope(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--hf", folder / "export", "--task", "pope", "--questions", folder / "questions.json", "--images",
                 folder / "data" / "images", "--output", tmp_path / "pope.json", "--device", "cpu",
                 "--max-new-tokens", 4]  # fmt: skip
    assert run_tool("evaluate", *arguments) == 0
    result = json.loads((tmp_path / "pope.json").read_text())
    assert "MiniGPT-4" in json.dumps(result) and len(
        (tmp_path / "pope.answers.jsonl").read_text().splitlines()
    ) == NUM_SAMPLES  # fmt: skip
