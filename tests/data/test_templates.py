"""A template that no file of the package knows goes through everything that a run and its model go through.

It is registered here and nowhere else, so whatever needs a new template in a second place fails.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest

from hacl_megatron import train
from hacl_megatron.config.flags import DataFlags
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodingSettings, checked_dialogue, encode
from hacl_megatron.data.manifest import Manifest, Sample
from hacl_megatron.data.prepare.arrow_manifest import ArrowManifest
from hacl_megatron.data.prepare.preference_json import text_of_parts
from hacl_megatron.data.templates import find_template, register, template_names
from hacl_megatron.data.templates import template as registry
from hacl_megatron.data.templates.template import MESSAGE, Dialogue, Piece, Template
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.answers import answerer as answering
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question
from tests.data.test_encoding import check, sample
from tests.data.tiny_tokenizer import CHAT, write_tokenizer
from tests.distributed import run_distributed
from tests.evaluation.exports import speak, write_pope_questions
from tests.tool_runs import run_tool, to_hf
from tests.training.runs import layout_flags, make_inputs, metrics

NUM_SAMPLES = 12
NAMES = ("plain", "v1", "minigpt4", "chatml", "llama_3", "mistral", "chat")


def pieces(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Piece]:
    """What is it? image*\\n question yes: answer@STOP@, without BOS."""
    found = []
    for role, text in dialogue.rounds():
        if role == "human":
            found += [Piece("What is it?"), *dialogue.around_image(text), Piece("yes:")]
        elif text:
            found.append(Piece(f"{text}@STOP@", is_target=True))
    return found


MADE_UP = Template(name="made-up", title="Made up", pieces=pieces, end="@STOP@", first_answer_is_caption=True)
SETTINGS = EncodingSettings(version="made-up", model_max_length=512, image_layout=ImageLayout(visual_tokens=3))
STOP = "<0x40> S T <0x4F> <0x50> <0x40>"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The template known for one test."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_TEMPLATES", dict(registry._TEMPLATES))
        register(MADE_UP)
        yield
    assert template_names() == NAMES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=True, chat_template=CHAT))


def train_and_evaluate(command: list[str], evaluation: list[str]) -> None:
    """In a process of its own, which leaves with its registry."""
    register(MADE_UP)
    train.run(command)
    assert run_tool("evaluate", *evaluation) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, `save` of two iterations with `--version made-up`, `export`, and `yesno.json` of the checkpoint."""
    folder = make_inputs(tmp_path_factory.mktemp("made-up"), samples=NUM_SAMPLES)
    images, questions = folder / "data" / "images", folder / "questions.json"
    write_pope_questions(questions, sorted(path.name for path in images.glob("*.jpg")), 4)
    command = [*configured(folder), "--save", str(folder / "save"), "--train-iters", "2", *layout_flags("tp1")[1]]
    evaluation = [
        "--load", str(folder / "save"), "--tasks", "yesno", "--questions", str(questions), "--image-folder",
        str(images), "--output", str(folder / "yesno.json"), "--device", "cpu", "--image-backend", "pillow",
    ]  # fmt: skip
    run_distributed(train_and_evaluate, 1, command, evaluation)
    to_hf(folder / "save", folder / "export")
    return folder


def configured(folder: Path, version: str = "made-up") -> list[str]:
    return ["--config", str(folder / "finetune.yaml"), "--version", version]


# ----------------------------------------------------------------------------------------------------------------- rows


def test_rows_and_targets_are_the_pieces(made_up, tokenizer):
    """A template whose targets, image or missing BOS another file decides would get other rows."""
    encoded = encode(sample("is red? <image>", "a cat", "is it?", "yes"), tokenizer, SETTINGS)
    expected = [
        ("▁What ▁is ▁it ? IMG IMG IMG ▁ <0x0A> i s ▁red ? ▁yes :", "-"),
        (f"▁a ▁cat {STOP}", "target"),
        ("▁What ▁is ▁it ? ▁is ▁it ? ▁yes :", "-"),
        (f"▁yes {STOP}", "target"),
    ]
    check(tokenizer, encoded, expected)
    assert encoded.images and not encoded.tokenization_mismatch


def test_what_precedes_an_image_is_read_off_the_pieces(made_up, tokenizer):
    """The segment of an image that its conversation does not mention begins as one that does."""
    settings = replace(SETTINGS, image_context="prompt")
    named, unnamed = (
        encode(sample(question, "yes", caption="a cat"), tokenizer, settings)
        for question in ("<image>\nis it?", "is it?")
    )
    before = tokenizer.encode("What is it?", bos=False)
    assert unnamed.pairs[0].image_segment.tolist() == [*before, IMAGE, IMAGE, IMAGE, tokenizer.eos_id]
    assert (
        unnamed.pairs[0].image_segment.tolist() == named.pairs[0].image_segment.tolist()
        and IMAGE not in unnamed.dialogue
    )


@pytest.mark.parametrize("labels", [[7] * 4, None])
def test_labels_that_a_template_finds_itself(made_up, tokenizer, labels):
    """Labels of the pieces must not win over `find_labels`, nor a None of it pass for labels."""
    given = []

    def find_labels(ids, dialogue, *arguments):
        given.append((ids, dialogue.turns, *arguments))
        return labels

    register(replace(MADE_UP, name="finding", pieces=lambda *_: [Piece("a cat is it", True)], find_labels=find_labels))
    encoded = encode(sample("a", "b", image=None), tokenizer, replace(SETTINGS, version="finding"))
    assert given == [(encoded.dialogue.tolist(), (("human", "a"), ("gpt", "b")), tokenizer, 512)]
    assert encoded.labels.tolist() == ([IGNORE] * 4 if labels is None else labels)
    assert encoded.tokenization_mismatch == (labels is None)


# ---------------------------------------------------------------------------------------------------------- preparation


def test_prepared_data_has_its_captions_and_lengths(made_up, trained, tmp_path):
    """Bulk counts that do not follow the template's pieces, or captions by another template's rule."""
    source, tokenizer = trained / "data" / "finetune.json", load_tokenizer(str(trained / "llava"))
    assert run_tool("prepare_data", "--input", source, "--output", tmp_path / "out", "--tokenizer", trained / "llava",
                    "--version", "made-up") == 0  # fmt: skip
    prepared = ArrowManifest(str(tmp_path / "out" / "manifest.arrow"))
    columns = [prepared.column(f"{name}_tokens").to_pylist() for name in ("dialogue", "caption")]
    settings, captions = replace(SETTINGS, image_layout=ImageLayout(visual_tokens=1)), 0
    for item, record, *found in zip(
        Manifest.read([str(tmp_path / "out")], version="made-up"), json.loads(source.read_text()), *columns, strict=True
    ):
        encoded = encode(item, tokenizer, settings)
        assert item.caption == record.get("text", record["conversations"][1]["value"])
        pair = encoded.pairs[0].caption_segment if encoded.pairs else None
        assert found == [len(encoded.dialogue), None if pair is None else len(pair)]
        captions += "text" not in record and pair is not None
    assert captions >= 3


def test_a_page_of_samples_shows_it(made_up, trained, tmp_path):
    assert run_tool("inspect_data", "--data-path", trained / "data" / "finetune.json", "--image-folder",
                    trained / "data" / "images", "--tokenizer", trained / "llava", "--version", "made-up", "--ids",
                    "finetune-0", "--image-backend", "pillow", "--output", tmp_path / "page.html") == 0  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    assert "made-up" in page and "0 unusable" in page


# -------------------------------------------------------------------------------------- training, plans, the checkpoint


def test_a_run_trains_on_it_and_its_checkpoint_is_evaluated_with_it(trained):
    steps = metrics(trained / "save")
    assert len(steps) == 2 and all(np.isfinite(step["lm loss"]) and step["lm loss"] > 0 for step in steps)
    assert steps[0]["contrastive loss i2t"] > 0
    results = json.loads((trained / "yesno.json").read_text())
    assert results["settings"]["version"] == "made-up"
    assert "unusable items" not in results["tasks"]["yesno"]["counts"]


def test_a_run_is_planned_with_it(made_up, trained, capsys):
    machine = ["--nodes", "1", "--gpus-per-node", "1", *layout_flags("tp1")[1]]
    assert run_tool("plan_run", *configured(trained), *machine) == 0
    assert "fits" in capsys.readouterr().out


def test_an_answer_ends_at_its_mark(made_up, trained, monkeypatch):
    """Words put into the mouth of a model whose files tell the template: the mark is neither said nor passed over."""
    monkeypatch.setattr(answering, "data_flags", lambda config: DataFlags(version="made-up"))
    images = trained / "data" / "images"
    answerer = Answerer(trained / "export", images, device="cpu")
    lengths = speak(answerer, ["A@STOP@BCDEFGHIJ", "AB@S@@STOP@CDEFG"], monkeypatch)
    questions = [Question(image=path.name, prompt="What?") for path in sorted(images.glob("*.jpg"))[:2]]
    answers = list(answerer.answer(questions, GenerationSettings(max_new_tokens=15, batch_size=2)))
    answerer.close()
    assert [answer.text for answer in answers] == ["A", "AB@S@"] and lengths == [11]
    prompt = answerer.tokenizer.decode([row for row in answerer.rows("Who?").tolist() if row != image_token(answerer)])
    assert prompt.split() == ["What", "is", "it?", "Who?", "yes:"]


def image_token(answerer: Answerer) -> int:
    return answerer.config.extra["image_token_index"]


# ---------------------------------------------------------------------------------------------------------- wrong names


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--print-config"]], ids=["run", "dry run", "print"])
def test_a_run_with_an_unknown_template_ends_in_one_line(trained, capsys, more):
    """Before any work: no traceback, and the names that there are."""
    with pytest.raises(SystemExit) as leave:
        train.main([*configured(trained, "minigtp4"), *layout_flags("tp1")[1], *more])
    assert leave.value.code == 2
    assert_refused(capsys, "--version minigtp4", f"expected {', '.join(NAMES)}", "did you mean minigpt4?")


def test_a_plan_and_an_evaluation_with_an_unknown_template_end_in_one_line(trained, tmp_path, capsys):
    assert run_tool("plan_run", *configured(trained, "llama_4"), *layout_flags("tp1")[1]) == 2
    assert_refused(capsys, "--version llama_4", f"expected {', '.join(NAMES)}", "did you mean llama_3?")
    # The checkpoint of a run whose template is not here any more.
    assert run_tool("evaluate", "--load", trained / "save", "--tasks", "yesno", "--questions",
                    trained / "questions.json", "--image-folder", trained / "data" / "images", "--output",
                    tmp_path / "out.json") == 2  # fmt: skip
    assert_refused(capsys, "--version made-up", f"expected {', '.join(NAMES)}", "hacl_megatron/data/templates")


def assert_refused(capsys, *words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("hacl_megatron: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("tool", ["inspect_data", "prepare_data", "evaluate", "plot_representations", "benchmark_data"])
def test_tools_name_the_templates(tool, capsys):
    assert run_tool(tool, "--version", "v2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--version" in error and "v2" in error and all(name in error for name in template_names())


def test_the_names_are_had_without_heavy_libraries():
    """torch and transformers take seconds that a tool's `--help` should not cost."""
    heavy = "{'torch', 'transformers', 'numpy', 'pyarrow'}"
    program = f"import sys, hacl_megatron.data.templates; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "set()\n"


def test_a_question_template_is_one_that_asks(tokenizer):
    """`plain` leaves the question out: a template that does must name one that is there and does not."""
    dialogue = Dialogue(turns=(("human", "<image>\nis it red?"), ("gpt", "yes")), has_image=True)
    for name in template_names():
        asked = find_template(find_template(name).question_template or name)
        texts = [piece.content for piece in asked.pieces(dialogue, tokenizer)]
        assert any("is it red?" in text for text in texts if isinstance(text, str)), name


def test_a_message_in_parts_reads_in_an_export_as_its_record_does() -> None:
    """Catches images that exports move to the front, where training leaves several in their places."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    words = environment.from_string(MESSAGE + "{{ words(message) }}")
    image = {"type": "image"}
    for length, number in itertools.product(range(1, 5), range(16)):
        parts = [image if number >> at & 1 else {"type": "text", "text": f" t{at} "} for at in range(length)]
        if image not in parts:
            continue
        text = text_of_parts(parts, "", lambda *_: ValueError())
        said = ("human", text or "x")
        sample = Sample(
            sample_id=0, name="", images=("a",) * parts.count(image), conversations=(said, ("gpt", "y")), caption=None,
            hallucinated_captions=(), source="",
        )  # fmt: skip
        expected = checked_dialogue(sample).turns[0][1]
        assert words.render(message={"content": parts}) == expected, parts
