"""The controlled world of examples/proof: what it says is true or false as labelled, is scored exactly, and runs."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.distributed import run_distributed
from tests.examples.proof import PROOF, SIZES
from tests.training.runs import metrics

ROOT = PROOF.parents[1]


def scenes_of(data: Path) -> dict[str, dict]:
    return {record["image"]: record for record in map(json.loads, (data / "scenes.jsonl").read_text().splitlines())}


def test_pictures_show_their_things(data: Path) -> None:
    from draw import COLOURS

    seen = 0
    for name, record in scenes_of(data).items():
        pixels = np.asarray(Image.open(data / "images" / name).convert("RGB"), dtype=float)
        for thing in record["things"]:
            left, top, right, bottom = thing["box"]
            if thing["shape"] == "ring":
                continue
            middle = pixels[round((top + bottom) / 2), round((left + right) / 2)]
            nearest = min(COLOURS, key=lambda colour: np.abs(np.array(COLOURS[colour]) - middle).sum())
            assert nearest == thing["colour"], (name, thing)
            seen += 1
    assert seen > 150


def mentioned_kinds(sentence: str) -> list[tuple[str, str]]:
    """(colour, singular shape) of each thing a sentence names, found word by word."""
    words = sentence.lower().replace(",", "").replace(".", "").replace("?", "").split()
    singular = {"circle", "square", "triangle", "star", "cross", "ring"}
    found = []
    for colour, noun in itertools.pairwise(words):
        for shape in singular:
            if noun in (shape, shape + "s", shape + "es"):
                found.append((colour, shape))
    return found


def test_captions_are_true_and_twins_false_by_their_own_words(data: Path) -> None:
    scenes, kinds = scenes_of(data), set()
    rng = random.Random(0)
    from draw_world import pair_sample, read_scene

    for name, record in scenes.items():
        present = {(group["colour"], group["shape"]) for group in record["groups"]}
        for sample in (pair_sample(rng, name, read_scene(record)) for _ in range(5)):
            assert set(mentioned_kinds(sample["text"])) <= present
            (twin,), (error,) = sample["Hallucination caption"], sample["twin kinds"]
            assert twin != sample["text"]
            kinds.add(error)
            said = set(mentioned_kinds(twin))
            if error in ("colour", "shape", "addition"):
                assert not said <= present, (sample["text"], twin)
            else:  # what is named is there; size, number or relation is not as said
                assert said == set(mentioned_kinds(sample["text"]))
    assert kinds == {"colour", "shape", "size", "number", "relation", "addition"}


def test_chosen_answers_are_true_and_rejected_ones_false_by_their_own_words(data: Path) -> None:
    scenes, asked = scenes_of(data), set()
    from draw_world import preference_sample, read_scene
    from world import DETAILED, TYPICAL, chair, read_description

    records = json.loads((data / "habit_prefer.json").read_text())
    assert len({record["image"] for record in records}) == SIZES["habit_prefer"]
    assert all(record["image"].startswith("habit_prefer") for record in records)
    rng = random.Random(1)
    records += [preference_sample(rng, name.removesuffix(".jpg"), read_scene(scenes[name])) for name in 4 * [*scenes]]
    tempting = []
    for record in records:
        name = record["image"]
        chosen, rejected = record["chosen"], record["rejected"]
        if record["question"] == DETAILED:
            scene = read_scene(scenes[name])
            assert chair([read_description(chosen, scene)])["wholly right"] == 1
            assert chair([read_description(rejected, scene)])["wholly right"] == 0
            for colour, shape in set(mentioned_kinds(rejected)) - scene.kinds if name.startswith("habit") else ():
                tempting.append(colour == TYPICAL[shape])
        else:
            (kind,) = mentioned_kinds(record["question"])
            present = kind in {(group["colour"], group["shape"]) for group in scenes[name]["groups"]}
            assert (chosen, rejected) == (("Yes.", "No.") if present else ("No.", "Yes."))
        asked.add((record["question"] == DETAILED, chosen if len(chosen) < 5 else ""))
    assert asked == {(True, ""), (False, "Yes."), (False, "No.")}
    assert len(tempting) > 80 and sum(tempting) / len(tempting) > 0.08, tempting


def test_web_captions_say_the_same_among_words_that_twins_share(data: Path) -> None:
    around = set()
    pairs = (json.loads((data / name).read_text()) for name in ("pretrain.json", "pretrain-web.json"))
    for clean, web in zip(*pairs, strict=True):
        assert web["image"] == clean["image"]
        before, after = web["text"].split(clean["text"])
        assert len(before.split()) == 8 and len(after.split()) == 6, web["text"]
        assert web["Hallucination caption"] == [before + twin + after for twin in clean["Hallucination caption"]]
        assert web["conversations"][1]["value"] == web["text"]
        around.add((before, after))
    assert len(around) == SIZES["pretrain"]


def test_habits_are_in_training_alone_and_twins_follow_them(data: Path) -> None:
    """Catches a habit in what is tested or in what the language model reads, and twins that do not tempt."""
    from draw_world import HABIT
    from world import TYPICAL, alt_text, draw_scene, hallucinate

    shares = {}
    for name, record in scenes_of(data).items():
        for group in record["groups"]:
            shares.setdefault(name.split("-")[0], []).append(TYPICAL[group["shape"]] == group["colour"])
    shares = {split: sum(some) / len(some) for split, some in shares.items()}
    assert shares["habit_pretrain"] > 0.65 and shares["habit_finetune"] > 0.5
    assert max(shares[split] for split in ("parts", "pretrain", "test")) < 0.3
    tempting, rng = [], random.Random(0)
    for _ in range(600):
        scene = draw_scene(rng, HABIT)
        statement, _ = alt_text(rng, scene)
        error, twin = hallucinate(rng, statement, scene, HABIT)
        said, false = ({(one.colour, one.shape) for one in some.mentions} for some in (statement, twin))
        if error == "colour" and any(TYPICAL[shape] != colour for colour, shape in said - false):
            tempting += [TYPICAL[shape] == colour for colour, shape in false - said]
    assert len(tempting) > 15 and sum(tempting) / len(tempting) > 0.6, tempting


def test_the_shams_contrast_reads_other_pictures_texts_and_its_dialogue_its_own(data: Path) -> None:
    """Catches a pair left with its own text, and a sham that spoils the captions to be learned too."""
    pairs = (json.loads((data / f"pretrain-web{name}.json").read_text()) for name in ("", "-sham"))
    own, sham = map(list, pairs)
    for one, other in zip(own, sham, strict=True):
        assert (one["image"], one["conversations"]) == (other["image"], other["conversations"])
        assert one["text"] != other["text"]
    texts = [sorted((record["text"], record["Hallucination caption"]) for record in some) for some in (own, sham)]
    assert texts[0] == texts[1]


def test_what_is_to_be_told_apart_is_a_true_and_another_text_in_the_same_words(data: Path) -> None:
    from draw_world import read_scene
    from language import Library
    from make_parts import new_library, new_model

    library: Library = new_library(data, new_model(data, seed=1)[1], seed=4)
    records = [record for name, record in scenes_of(data).items() if name.startswith("parts")]
    on_the_web = 0
    for _ in range(60):
        scene, text, twin = library.told_apart(prompt=True)
        assert (scene.before, scene.after, text.after[0], text.after[-1]) == ([1], [2], 1, 2)
        assert text.scene is None and twin.scene is None and not any([*scene.learned, *text.learned, *twin.learned])
        said, false = (library.tokenizer.decode(one.after[1:-1]) for one in (text, twin))
        shown = read_scene(records[scene.scene])
        assert set(mentioned_kinds(said)) <= shown.kinds and said != false
        if "Photo" in said:  # both among the same words
            words, others = said.split(), false.split()
            assert words[:8] == others[:8] and words[-6:] == others[-6:]
            on_the_web += 1
    assert 15 < on_the_web < 45


def test_questions_are_answered_by_the_scene_and_adversarial(data: Path) -> None:
    scenes = scenes_of(data)
    lines = json.loads((data / "test.questions.json").read_text())
    assert [line["label"] for line in lines] == ["yes", "no"] * SIZES["test"]
    for line in lines:
        groups = scenes[line["image"]]["groups"]
        present = {(group["colour"], group["shape"]) for group in groups}
        (kind,) = mentioned_kinds(line["text"])
        assert (kind in present) == (line["label"] == "yes")
        assert any(kind[0] == colour or kind[1] == shape for colour, shape in present)
    for sample in json.loads((data / "finetune.json").read_text()):
        groups = scenes[sample["image"]]["groups"]
        present = {(group["colour"], group["shape"]) for group in groups}
        turns = [turn["value"] for turn in sample["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if answer in ("Yes.", "No."):
                assert (mentioned_kinds(question)[0] in present) == (answer == "Yes.")
            else:
                assert set(mentioned_kinds(answer)) == present


def test_chair_counts_what_is_said_against_what_is_there() -> None:
    from world import Group, Scene, chair, description, read_description

    red, blue = Group("red", "circle", "small", (0,)), Group("blue", "cross", "large", (1, 3))
    scene = Scene((red, blue), "white")
    assert description(scene) == "The picture shows a small red circle and two large blue crosses."
    right = read_description(description(scene), scene)
    assert (right.mentioned, right.hallucinated, right.covered, right.wholly_right) == (2, 0, 2, True)
    confused = read_description("The picture shows a small red cross, a small red circle and a red cross.", scene)
    assert (confused.mentioned, confused.hallucinated, confused.covered, confused.wholly_right) == (3, 2, 1, False)
    wrong_size = read_description("A large red circle and two large blue crosses.", scene)
    assert wrong_size.hallucinated == 0 and not wrong_size.wholly_right
    once_too_often = read_description("A small red circle, two large blue crosses and a small red circle.", scene)
    assert not once_too_often.wholly_right
    silent = read_description("", scene)
    shares = chair([right, confused, wrong_size, once_too_often, silent])
    assert shares["CHAIR_i"] == pytest.approx(2 / 10)
    assert shares["CHAIR_s"] == pytest.approx(1 / 5)
    assert shares["cover"] == pytest.approx(7 / 10)
    assert shares["wholly right"] == pytest.approx(1 / 5)


def _train(folder: str, commands: list[list[str]]) -> None:
    from hacl_megatron.train import run

    for command in commands:
        run(command)


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """What run.sh does, with a few pictures and steps; the arms `none` and `HACL own` at one seed."""
    from make_parts import make_parts
    from run_arms import stage_flags

    output = data.parent
    steps = {"tower_steps": 2, "language_steps": 2, "telling_steps": 2, "further_steps": 2}
    make_parts(data, output / "parts", **steps, further_rounds=1, seed=1)
    assert json.loads((output / "parts" / "parts.json").read_text())["language"]["further rounds"] == 1
    short = ["--train-iters", "2", "--eval-interval", "2", "--eval-iters", "1", "--micro-batch-size", "12"]
    short += ["--global-batch-size", "12"]
    commands = [
        [*stage_flags(output, "web", arm, 1, stage, "test"), *short]
        for arm, stage in (("none", "pretrain"), ("HACL own", "pretrain"), ("HACL own", "finetune"))
    ]
    run_distributed(_train, 1, str(output), commands)
    return output


def test_arms_begin_alike_and_go_on_to_scores(finished: Path) -> None:
    from run_arms import folder_of
    from score_run import score_run

    from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
    from hacl_megatron.checkpoint.run.folder import locate_checkpoint

    without = metrics(folder_of(finished, "web", "none", 1) / "pretrain")
    contrasted = metrics(folder_of(finished, "web", "HACL own", 1) / "pretrain")
    assert without[0]["lm loss"] == pytest.approx(contrasted[0]["lm loss"], abs=1e-5)  # same connector, same data
    assert "contrastive loss" in contrasted[0] and "contrastive loss" not in without[0]

    export_checkpoint(
        locate_checkpoint(folder_of(finished, "web", "HACL own", 1) / "pretrain"), finished / "after-stage-1"
    )
    heads = load_file(finished / "after-stage-1" / "hacl_heads.safetensors")
    apart = (heads["vision_projector.weight"] - heads["text_projector.weight"]).abs().max()
    assert 0 < apart <= 2 * 2 * 1e-3, apart  # the same values, then two steps of at most --heads-lr each

    result = score_run(folder_of(finished, "web", "HACL own", 1) / "finetune", finished / "data", "test", limit=4)
    scores = result["scores"]
    assert len(result["answers"]["descriptions"]) == 4 and len(result["answers"]["yes/no"]) == 8
    assert 0 <= scores["CHAIR_i"] <= 1 and scores["yes/no accuracy"] + scores["yes/no errors"] == pytest.approx(1)
    assert 0 <= scores["preference accuracy sum"] <= 1


def test_what_a_teacher_knows_is_read_at_the_right_places(finished: Path) -> None:
    from language import embed_notes
    from teacher import Told, measure, train_heads
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder, data = finished / "parts" / "language", finished / "data"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        told = Told(model, tokenizer, data, "pretrain", data / "pretrain-web.json", 20)
        states = told.states()
        assert [len(kind) for kind in states] == [20] * 3
        sums = []
        for texts, kind in ((told.texts, states[1]), (told.twins, states[2])):
            for row, state in zip(texts, kind, strict=True):  # each alone, without padding
                alone = model.model(torch.tensor([[1, *row, 2]])).last_hidden_state[0, -1]
                torch.testing.assert_close(state, alone, rtol=0, atol=1e-5)
            likelihoods = []
            notes_of = embed_notes(model.model.embed_tokens, told.task.notes[told.scenes])
            for row, notes in zip(texts, notes_of, strict=True):
                words = model.model.embed_tokens(torch.tensor([1, *row]))
                labels = torch.tensor([[-100] * (1 + len(notes)) + row])
                scored = model(inputs_embeds=torch.cat([words[:1], notes, words[1:]])[None], labels=labels)
                likelihoods.append(-scored.loss.item() * len(row))
            sums.append(likelihoods)
        assert told.preferred() == sum(a > b for a, b in zip(*sums, strict=True)) / 20
        shown = torch.cat([words[:1], notes_of[-1], model.model.embed_tokens(torch.tensor([2]))])[None]
        last = model.model(inputs_embeds=shown).last_hidden_state[0, -1]
        torch.testing.assert_close(states[0][-1], last, rtol=0, atol=1e-5)

    # Told apart without fail where image and caption lie together, twins at the other end.
    apart = torch.nn.functional.normalize(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    learned = train_heads((apart, apart, -apart), "own", steps=0, seed=1)
    assert measure(learned, (apart, apart, -apart)) == (1.0, 1.0)
    assert measure(learned, (apart, -apart, apart))[0] == 0.0
    shuffled = apart[torch.arange(128).view(2, 64).flip(1).flatten()]  # the caption of another image
    assert measure(learned, (apart, shuffled, -apart))[1] < 0.1
    turned = apart @ torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    assert measure(learned, (apart, turned, -apart))[1] < 0.1
    learned = train_heads((apart, turned, -apart), "own", steps=200, seed=1)
    assert min(measure(learned, (apart, turned, -apart))) > 0.9


def test_what_follows_stage_2_goes_on_from_one_run_of_none(finished: Path) -> None:
    """Catches arms that begin apart, a base that both arms train, and one whose checkpoint goes before they need it."""
    from run_arms import check_as_scored, folder_of, has_checkpoint, stage_flags

    short = "--train-iters 2 --eval-interval 2 --eval-iters 1 --micro-batch-size 12 --global-batch-size 12"
    command = [PROOF / "run_arms.py", "--output", finished, "--regimes", "after", "--arms", "none", "phrase"]
    command += ["--seeds", "1", "--limit", "4", "--jobs", "2", "--keep"]
    command += [f"--stage1={short}", f"--stage2={short}", f"--stage3={short}"]
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    base = folder_of(finished, "habit", "none", 1)
    assert has_checkpoint(base / "finetune") and not (base / "finetune.json").exists()
    assert [len(metrics(base / stage)) for stage in ("pretrain", "finetune")] == [2, 2]
    flags = stage_flags(finished, "after", "phrase", 1, "prefer", "test")
    assert flags[flags.index("--pretrained-checkpoint") + 1] == str(base / "finetune")
    check_as_scored(base, "finetune")  # there are no scores
    scores, loss = base / "finetune.json", metrics(base / "finetune")[-1]["lm loss validation"]
    scores.write_text(json.dumps({"scores": {"lm loss": loss}}))
    check_as_scored(base, "finetune")
    scores.write_text(json.dumps({"scores": {"lm loss": loss + 0.1}}))
    with pytest.raises(RuntimeError, match="trained anew"):
        check_as_scored(base, "finetune")
    runs = {arm: folder_of(finished, "after", arm, 1) for arm in ("none", "phrase")}
    assert not any(has_checkpoint(run / "prefer") for run in runs.values())
    logs = {arm: metrics(run / "prefer") for arm, run in runs.items()}
    assert logs["none"][0]["lm loss"] == pytest.approx(logs["phrase"][0]["lm loss"], abs=1e-5)
    assert "preference loss" in logs["phrase"][0] and "preference loss" not in logs["none"][0]
    scores = json.loads((runs["phrase"] / "prefer.json").read_text())
    assert len(scores["answers"]["descriptions"]) == 4 and 0 <= scores["scores"]["yes/no errors"] <= 1


def test_a_finished_run_is_not_repeated_and_leaves_what_others_go_on_from(tmp_path: Path) -> None:
    from run_arms import Sizes, folder_of, is_finished, run_arm

    for regime, arm, left in (("web", "none", []), ("habit", "none", ["finetune"]), ("habit", "sham", [])):
        folder = folder_of(tmp_path, regime, arm, 1)
        for stage in ("pretrain", "finetune"):
            (folder / stage / "iter_0000060").mkdir(parents=True)
            (folder / f"{stage}.json").write_text("{}")
        run_arm(tmp_path, regime, arm, 1, split="test", sizes=Sizes(4, 4, 4), more={}, keep=False)
        assert sorted(path.parent.name for path in folder.glob("*/iter_*")) == left
        assert not is_finished(folder / "finetune")


def test_a_stopped_run_is_not_taken_for_a_finished_one(finished: Path) -> None:
    from run_arms import folder_of, is_finished

    from hacl_megatron.checkpoint.run.folder import locate_checkpoint

    stage = folder_of(finished, "web", "HACL own", 1) / "finetune"
    assert is_finished(stage)
    config = locate_checkpoint(stage) / "run_config.yaml"
    text = config.read_text()
    assert "train_iters: 2\n" in text
    config.write_text(text.replace("train_iters: 2\n", "train_iters: 3\n"))
    assert not is_finished(stage)
    config.write_text(text)
