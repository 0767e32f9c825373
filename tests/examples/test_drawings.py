"""The quickstart's drawings, sentences and tiny model, each by itself."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hacl_megatron.config.tiles import ImageLayout
from tests.warm import run_warm

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    """The scripts import one another by file name, as `python examples/quickstart/NAME.py` lets them."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def draw_to(folder: Path, *, seed: int = 7, processes: int = 2) -> Path:
    """60 training and 20 held-out drawings, by the command a user types."""
    command = [sys.executable, str(SCRIPTS / "draw.py"), "--output", str(folder), "--train", "60", "--valid", "20"]
    command += ["--parts", "4"]
    command += ["--seed", str(seed), "--processes", str(processes)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_to(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    """The model folder after three steps of each training."""
    folder = tmp_path_factory.mktemp("model")
    return make_model("llava", data, folder)


@pytest.fixture(scope="module")
def minigpt4(data, tmp_path_factory) -> Path:
    """Likewise, of `--model minigpt4`."""
    return make_model("minigpt4", data, tmp_path_factory.mktemp("minigpt4"))


def make_model(kind: str, data: Path, folder: Path) -> Path:
    command = [str(SCRIPTS / "make_model.py"), "--data", str(data), "--output", str(folder)]
    command += ["--model", kind, "--tower-steps", "3", "--qformer-steps", "3", "--language-steps", "3"]
    made = run_warm(command)
    assert made.returncode == 0, made.stderr
    return folder


def read(data: Path, name: str) -> list[dict]:
    return json.loads((data / name).read_text())


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def test_images_have_many_sizes(data):
    sizes = {Image.open(path).size for path in (data / "images").glob("*.jpg")}
    assert len(sizes) > 40
    ratios = [width / height for width, height in sizes]
    assert min(ratios) < 0.8 and max(ratios) > 1.25
    assert all(32 <= side <= 120 for size in sizes for side in size)


def test_drawing_depends_on_the_seed_alone(data, tmp_path):
    again, other = draw_to(tmp_path / "again", processes=1), draw_to(tmp_path / "other", seed=8)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) == 84 + 6
    assert all((data / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (data / "valid.json").read_bytes() != (other / "valid.json").read_bytes()


@pytest.mark.parametrize(("name", "twins"), [("pretrain.json", 1), ("contrastive.json", 2), ("valid.json", 1)])
def test_captions_are_true_and_twins_false(data, name, twins):
    """A caption states facts of its scene, its twin the same words but for the recorded wrong facts."""
    from draw import OPENINGS, holds, sentence, true_sentences

    scenes = {}
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        scenes[scene["image"]] = scene["facts"]
    samples = read(data, name)
    with_twin = [sample for sample in samples if "Hallucination caption" in sample]
    assert len(with_twin) >= 0.8 * len(samples)
    for sample in samples:
        facts = sample["facts"]
        assert holds(facts, scenes[sample["image"]])
        true = true_sentences(scenes[sample["image"]])
        assert sample["text"] in true and true.isdisjoint(as_list(sample.get("Hallucination caption", [])))
        (opening,) = (opening for opening in OPENINGS if sentence(facts, opening) == sample["text"])
        captions = as_list(sample.get("Hallucination caption", []))
        changes = as_list(sample.get("hallucinated facts", []))
        assert len(captions) == len(changes) == (twins if sample in with_twin else 0)
        for caption, wrong in zip(captions, changes, strict=True):
            assert 1 <= len(wrong) <= 4 and wrong.keys() <= facts.keys()
            assert all(facts[key] != value for key, value in wrong.items())
            assert not holds(facts | wrong, scenes[sample["image"]])
            assert sentence(facts | wrong, opening) == caption != sample["text"]


def test_a_relation_reads_the_same_from_both_sides():
    from draw import holds, sentence

    scene = {"colour": "red", "shape": "star", "relation": "left of", "other colour": "blue", "other shape": "ring"}
    swapped = {"colour": "blue", "shape": "ring", "relation": "right of", "other colour": "red", "other shape": "star"}
    assert sentence(scene) == "A red star left of a blue ring."
    assert holds(scene, scene) and holds(swapped, scene)
    assert not holds(swapped | {"relation": "left of"}, scene)
    assert not holds(scene | {"colour": "blue", "other colour": "red"}, scene)


def test_things_stand_where_the_facts_say(data):
    """The pixels at a thing's place have its colour: the captions speak of what was drawn."""
    from draw import COLOURS

    checked = 0
    for line in (data / "scenes.jsonl").read_text().splitlines():
        scene = json.loads(line)
        image = Image.open(data / "images" / scene["image"]).convert("RGB")
        assert image.size == (scene["width"], scene["height"])
        for thing in scene["things"]:
            if thing["shape"] == "ring":  # nothing in its middle
                continue
            left, top, right, bottom = thing["box"]
            pixel = image.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
            nearest = min(
                COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True))
            )
            assert nearest == thing["colour"], (scene["image"], thing, pixel)
            checked += 1
        if "relation" in scene["facts"]:
            first, second = (thing["box"] for thing in scene["things"])
            axis = 0 if scene["facts"]["relation"] in ("left of", "right of") else 1
            assert first[axis + 2] <= second[axis]
            main = scene["things"][0 if scene["facts"]["relation"] in ("left of", "above") else 1]
            assert (main["colour"], main["shape"]) == (scene["facts"]["colour"], scene["facts"]["shape"])
    assert checked > 60


def test_json_is_llava(data):
    """Keys, turns, one <image> in the first question; finetune.json has no pairs, and samples without an image."""
    for name in ("pretrain.json", "finetune.json", "contrastive.json", "valid.json"):
        samples = read(data, name)
        assert len({sample["id"] for sample in samples}) == len(samples)
        for sample in samples:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            counts = [turn["value"].count("<image>") for turn in turns]
            assert counts == [int("image" in sample)] + [0] * (len(turns) - 1)
            assert "image" not in sample or (data / "images" / sample["image"]).is_file()
    dialogues = read(data, "finetune.json")
    assert sum("image" not in sample for sample in dialogues) == 6
    assert not any("text" in sample or "Hallucination caption" in sample for sample in dialogues)
    assert max(len(sample["conversations"]) for sample in dialogues) >= 6
    assert any(sample.get("Hallucination caption") is None for sample in read(data, "pretrain.json"))


def test_yes_is_as_frequent_as_no_and_right():
    """Compared with the list of all true sentences about the scene."""
    from draw import draw_facts, seen_from_the_other, sentence, yes_no_question

    rng = random.Random(0)
    answers = []
    for _ in range(400):
        scene = draw_facts(rng, 100, 60)
        true = set()
        for view in (scene, seen_from_the_other(scene)):
            optional = [key for key in ("size", "other size", "place", "background") if key in view]
            for chosen in itertools.product((True, False), repeat=len(optional)):
                left_out = {key for key, keep in zip(optional, chosen, strict=True) if not keep}
                true.add(sentence({key: value for key, value in view.items() if key not in left_out})[1:-1])
        question, answer = yes_no_question(rng, scene)
        assert question.startswith(("Is there a", "Are there t")) and question.endswith("?")
        stated = question.removeprefix("Is there ").removeprefix("Are there ")[1:-1]
        assert answer == ("Yes." if stated in true else "No.")
        answers.append(answer)
    assert 160 < answers.count("Yes.") < 240


def test_model_loads_in_transformers_and_generates(data, model):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model)
    llava = LlavaForConditionalGeneration.from_pretrained(model).eval()
    tokenizer = processor.tokenizer
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids("<image>") == llava.config.image_token_index
    assert llava.config.text_config.vocab_size >= len(tokenizer)
    caption = read(data, "valid.json")[0]["text"]
    assert tokenizer(caption).input_ids[0] == 1
    assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True).strip() == caption
    assert tokenizer.tokenize("A red star.")[-3:] == ["▁red", "▁star", "."]  # words are tokens, signs apart
    unseen = "Zürich é 漢"  # byte fallback: nothing becomes <unk>
    assert 0 not in tokenizer(unseen).input_ids and unseen in tokenizer.decode(tokenizer(unseen).input_ids)

    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\nWhat is this? ASSISTANT:")
    image = Image.open(data / "images" / "valid-00000.jpg")
    inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=False)
    tokens = (llava.config.vision_config.image_size // llava.config.vision_config.patch_size) ** 2
    assert (inputs.input_ids == llava.config.image_token_index).sum() == tokens
    length = inputs.input_ids.shape[1]
    out = llava.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape[1] == length + 4


def test_finetune_keeps_its_labels(data, model):
    """LLaVA's v1 rule counts rounds on Vicuna's vocabulary, and drops all labels where the count is wrong."""
    from hacl_megatron.data.encoding import IGNORE, EncodingSettings, encode
    from hacl_megatron.data.manifest import Manifest
    from hacl_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    settings = EncodingSettings(version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=16))
    rounds = set()
    for sample in Manifest.read([str(data / "finetune.json")], version="v1"):
        encoded = encode(sample, tokenizer, settings)
        assert not encoded.tokenization_mismatch, sample.conversations
        answers = [value for role, value in sample.conversations if role == "gpt"]
        targets = encoded.labels[encoded.labels != IGNORE].tolist()
        assert tokenizer.decode(targets).split() == " ".join(answers).split()
        assert targets.count(tokenizer.eos_id) == len(answers)
        rounds.add((sample.image is not None, len(answers)))
    assert rounds >= {(True, 1), (True, 2), (True, 3), (False, 1)}


def test_told_scenes_say_in_words_what_the_picture_shows(data, model):
    """Captions and dialogues alike; a scene of two things twice, and what stands behind its relation weighs most."""
    from draw import REQUESTS
    from language_model import FACT_WEIGHT, LATER_WEIGHT, told_scenes
    from tiny_llava import DIALOGUE
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    scenes = {scene["image"]: scene for scene in map(json.loads, (data / "scenes.jsonl").read_text().splitlines())}
    for told, name in zip(told_scenes(data, tokenizer, DIALOGUE), ("pretrain.json", "finetune.json"), strict=True):
        samples = read(data, name)
        if name == "finetune.json":
            samples = [one for one in samples if one["conversations"][0]["value"].split("\n")[-1] in REQUESTS]
        samples = [sample for sample in samples for _ in range(1 + ("relation" in scenes[sample["image"]]["facts"]))]
        for sample, one in zip(samples, told, strict=True):
            scene = scenes[sample["image"]]
            words = {word.lstrip("▁") for word in tokenizer.convert_ids_to_tokens(one.notes[one.notes > 0].tolist())}
            shown = {thing[key] for thing in scene["things"] for key in ("colour", "shape", "size")}
            assert words >= shown | {scene["facts"]["background"]} and len(words - shown) <= 3  # background, and where
            assert abs(sum(one.recall.values()) - 1) < 1e-6 and len(one.weights) == len(one.text)
            if name == "pretrain.json":
                assert tokenizer.decode(one.text) == sample["text"] + "\n" and one.before == [1] and not one.asked
                weights = dict(zip(tokenizer.convert_ids_to_tokens(one.text), one.weights, strict=True))
                assert weights["."] == 1 and max(one.weights) >= FACT_WEIGHT
                if "relation" in sample["facts"]:
                    assert weights[f"▁{sample['facts']['other shape']}"] == LATER_WEIGHT
            else:
                question, answer = (turn["value"] for turn in sample["conversations"][:2])
                assert tokenizer.decode(one.text).split() == [*answer.split(" ")[:-1], answer.split(" ")[-1] + "</s>"]
                said = tokenizer.decode(one.before + one.asked, skip_special_tokens=True)
                assert said.startswith("A chat between") and question.split("\n")[-1] in said


def test_model_is_trained_and_keeps_its_random_connector(data, model):
    """Three steps move tower and language model away from where the seed puts them, and nothing else."""
    from tiny_llava import build
    from tokenizer import train_tokenizer
    from transformers import LlavaForConditionalGeneration

    tokenizer = train_tokenizer((data / "corpus.txt").read_text().splitlines())
    fresh = dict(build(tokenizer, 1234).named_parameters())
    kept = moved = 0
    for name, weight in LlavaForConditionalGeneration.from_pretrained(model).named_parameters():
        if "multi_modal_projector" in name or "encoder.layers.2." in name:
            assert torch.equal(weight, fresh[name]), name
            kept += 1
        elif "encoder.layers.0.mlp.fc1.weight" in name or "layers.1.mlp.up_proj" in name:
            assert not torch.equal(weight, fresh[name]), name
            moved += 1
    assert (kept, moved) == (4 + 16, 2)


def test_minigpt4_is_blip_2_whose_parts_have_learnt_except_its_projection(data, minigpt4):
    """Every weight moves, queries and Q-Former included, but the projection's, and a prompt with an image generates."""
    from tiny_minigpt4 import build
    from tokenizer import MINIGPT4_PROMPT, train_tokenizer
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    tokenizer = train_tokenizer((data / "corpus.txt").read_text().splitlines(), MINIGPT4_PROMPT, {})
    fresh = dict(build(tokenizer, 1234).named_parameters())
    blip2 = Blip2ForConditionalGeneration.from_pretrained(minigpt4).eval()
    kept = {name for name, weight in blip2.named_parameters() if torch.equal(weight, fresh[name])}
    assert kept == {"language_projection.weight", "language_projection.bias"}
    queries = blip2.query_tokens[0]
    assert torch.cdist(queries, queries).fill_diagonal_(1).min() > 0.5  # equal ones would all tell the same

    processor = AutoProcessor.from_pretrained(minigpt4)
    image = Image.open(data / "images" / "valid-00000.jpg")
    inputs = processor(images=image, text=MINIGPT4_PROMPT, return_tensors="pt")
    assert (inputs.input_ids == blip2.config.image_token_index).sum() == blip2.config.num_query_tokens == 16
    assert blip2.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None).shape[1] > 3
    assert processor.tokenizer("###Human: <Img>").input_ids.count(0) == 0


def test_square_pixels_equals_transformers_on_a_square_image(data):
    """Resizing and normalising as CLIP's own processor; padding is the only thing that it does not do."""
    from scenes import CLIP_MEAN, CLIP_STD, square_pixels
    from tiny_llava import CLIPImageProcessor

    image = Image.open(data / "images" / "valid-00000.jpg").convert("RGB").resize((90, 90))
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected = torch.as_tensor(processor(image, return_tensors="np")["pixel_values"][0])
    torch.testing.assert_close(square_pixels(image, 64), expected, atol=1e-5, rtol=1e-5)
    wide = square_pixels(image.crop((0, 0, 90, 30)), 63)
    grey = wide * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    border = torch.tensor([122, 116, 104]).view(3, 1, 1) / 255
    torch.testing.assert_close(grey[:, [0, 15, 47, 62]], border.expand(3, 4, 63), atol=1e-4, rtol=0)


def test_stretched_pixels_equal_transformers(data):
    """BLIP-2's own processor, on an image that is far from square."""
    from scenes import square_pixels
    from tiny_minigpt4 import BlipImageProcessor

    image = Image.open(data / "images" / "valid-00000.jpg").convert("RGB").resize((90, 40))
    expected = BlipImageProcessor(size={"height": 64, "width": 64})(image, return_tensors="np")["pixel_values"][0]
    torch.testing.assert_close(square_pixels(image, 64, "stretch"), torch.as_tensor(expected), atol=1e-5, rtol=1e-5)


def test_patch_labels_and_mirror(data):
    from scenes import ATTRIBUTES, mirror, patch_labels

    thing = {"colour": "red", "shape": "star", "size": "large", "box": [0, 0, 40, 40]}
    other = {"colour": "blue", "shape": "ring", "size": "small", "box": [40, 0, 80, 40]}
    scene = {"width": 80, "height": 40, "things": [thing, other]}
    scene["facts"] = {"relation": "left of", "background": "grey"}
    labels = patch_labels(scene, 4).view(len(ATTRIBUTES), 4, 4)  # padded: the drawing fills the two middle rows
    names = {name: ("none", *values) for name, values in ATTRIBUTES.items()}
    colour, where = labels[0], labels[list(names).index("where")]
    assert [[names["colour"][value] for value in row] for row in colour.tolist()] == [
        ["none"] * 4, ["red", "red", "blue", "blue"], ["red", "red", "blue", "blue"], ["none"] * 4,
    ]  # fmt: skip
    assert [names["where"][value] for value in where[1].tolist()] == ["left", "left", "right", "right"]
    stretched = patch_labels(scene, 4, "stretch").view(len(ATTRIBUTES), 4, 4)  # the drawing fills all rows
    assert (stretched[:, 0] == labels[:, 1]).all() and (stretched == stretched[:, :1]).all()
    pixels, mirrored = mirror(torch.arange(4.0).view(1, 1, 1, 4), labels.flatten(1)[None])
    assert pixels.flatten().tolist() == [3, 2, 1, 0]
    mirrored = mirrored.view(len(ATTRIBUTES), 4, 4)
    assert [names["colour"][value] for value in mirrored[0, 1].tolist()] == ["blue", "blue", "red", "red"]
    assert [names["where"][value] for value in mirrored[list(names).index("where"), 1].tolist()] == [
        "left", "left", "right", "right",
    ]  # fmt: skip
