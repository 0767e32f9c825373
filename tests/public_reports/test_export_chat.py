"""Chat templates of exports: ours say exactly what training saw, and a model's own is not lost."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GenerationConfig

from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.checkpoint.hf.assets.write import ChatTemplate
from hacl_megatron.checkpoint.hf.config_read import data_flags, read_model_config
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, locate_checkpoint
from hacl_megatron.data.encoding import checked_dialogue
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.templates import find_template, template_names
from hacl_megatron.data.templates.template import IMAGE, with_blank_behind_images
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hacl_megatron.evaluation.answers.answerer import Answerer, GenerationSettings, Question
from tests.data.tiny_bpe import LLAMA_3, QWEN, Kind, write_bpe
from tests.public_reports.export_cases import hf, original
from tests.tiny import write_tiny_original_llava
from tests.tool_runs import to_hf, to_megatron

DIALOGUES = {
    "a question": [("human", "<image>\nWhat is it?"), ("gpt", "")],
    "an answer": [("human", "<image>\nWhat is it?"), ("gpt", "It's a red circle.")],
    "two rounds": [("human", "What is it?\n<image>"), ("gpt", "A circle."), ("human", " And where? "), ("gpt", "")],
    "two rounds, whole": [("human", "<image>\n Where?"), ("gpt", "A"), ("human", "Why?"), ("gpt", "B's {{ x }}")],
    "no words": [("human", "<image>"), ("gpt", "A circle.")],
    "no words, no answer": [("human", "<image>"), ("gpt", "")],
    "text alone": [("human", " Who are you? "), ("gpt", "")],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return to_megatron(original(folder), folder / "save")


BYTE_LEVEL: dict[str, tuple[Kind, str]] = {
    "chatml": ("qwen", QWEN), "chat": ("qwen", QWEN), "llama_3": ("llama_3", LLAMA_3)
}  # fmt: skip
"""Versions that are tried with tokenizers of these kinds, and chat templates of their own."""


@pytest.fixture(scope="module")
def saves(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's folder by `--version`."""
    found = dict.fromkeys(template_names(), saved)
    for kind, template in dict(BYTE_LEVEL.values()).items():
        folder = tmp_path_factory.mktemp(kind)
        save = to_megatron(with_bpe(folder, kind, template), folder / "save")
        found |= {version: save for version, of in BYTE_LEVEL.items() if of[0] == kind}
    return found


def with_bpe(folder: Path, kind: Kind, template: str | None) -> Path:
    """A LLaVA in the original layout whose tokenizer is byte-level."""
    source, _ = write_tiny_original_llava(folder / "original", layers=1, vision_layers=2, vocab=336)
    for path in [*source.glob("*token*"), *source.glob("chat_template*")]:
        path.unlink()
    write_bpe(source, kind, chat_template=template)
    return source


def export(save: Path, version: str, out: Path) -> Path:
    """The export of what `--version` would have trained; exports are otherwise alike."""
    path = locate_checkpoint(save) / RUN_CONFIG_FILE
    text = path.read_text()
    assert "version: v1" in text
    path.write_text(text.replace("version: v1", f"version: {version}"))
    try:
        return to_hf(save, out)
    finally:
        path.write_text(text)


@pytest.fixture(scope="module")
def exports(saves: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {version: export(save, version, folder / version) for version, save in saves.items()}


@pytest.fixture(scope="module")
def processors(exports: dict[str, Path]) -> dict[str, Any]:
    """By `--version`."""
    return {version: AutoProcessor.from_pretrained(path) for version, path in exports.items()}


def prompt_of(version: str, turns: list[tuple[str, str]], tokenizer: Tokenizer) -> str:
    """What training tokenizes, but for the BOS at its beginning; no target where the answer is empty."""
    has_image = any("<image>" in text for _, text in turns)
    sample = Sample(
        sample_id=0, name="", images=("x.png",) * has_image, conversations=tuple(turns), caption=None,
        hallucinated_captions=(), source="",
    )  # fmt: skip
    others = find_template(version).pieces(checked_dialogue(sample), tokenizer)
    if tokenizer.bos_id is not None:
        first, *others = others
        assert first.content == tokenizer.bos_id
    if turns[-1][1] == "":
        others = [piece for piece in others if not (piece is others[-1] and piece.is_target)]
    names = {IMAGE: "<image>", tokenizer.bos_id: tokenizer.backend.bos_token}
    return "".join(names.get(piece.content, piece.content) for piece in others)


def messages(turns: list[tuple[str, str]], *, in_parts: bool) -> list[dict[str, Any]]:
    """As transformers has them, without the empty answer that asks for one."""
    found = []
    for role, text in turns:
        content: Any = text
        if in_parts:
            content = [{"type": "text", "text": text.replace("<image>", "")}]
            content = [{"type": "image"}, *content] if "<image>" in text else content
        found += [{"role": {"human": "user", "gpt": "assistant"}[role], "content": content}] if text else []
    return found


@pytest.mark.parametrize("in_parts", [False, True], ids=["tagged", "in parts"])
@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("version", template_names())
def test_rendered_by_transformers_it_is_our_prompt(processors, saves, version, name, in_parts):
    """Catches an export without a template, and one that is a blank, a line or a `</s>` off what training saw; also in
    the tokens behind an image, which training tokenizes on their own."""
    turns, processor = DIALOGUES[name], processors[version]
    if version == "plain" and name in ("text alone", "two rounds", "two rounds, whole"):
        with pytest.raises(Exception, match="plain template"):
            processor.apply_chat_template(messages(turns, in_parts=in_parts))
        return
    tokenizer = load_tokenizer(str(locate_checkpoint(saves[version]) / "hf_assets"))
    found = processor.apply_chat_template(
        messages(turns, in_parts=in_parts), add_generation_prompt=turns[-1][1] == "", tokenize=False
    )
    expected = prompt_of(version, turns, tokenizer)
    blank = tokenizer.eats_dummy_space
    assert blank is (version not in BYTE_LEVEL), "Vicuna's, and those of byte-level BPE"
    assert found == re.sub("<image>(?=.)", "<image> ", expected, flags=re.DOTALL) if blank else found == expected
    bos = [] if version in BYTE_LEVEL else [1]  # their tokenizers put none there of themselves
    rows = [*bos]
    for number, text in enumerate(expected.split("<image>")):
        rows += [processor.image_token_id] * (number > 0) + tokenizer.encode(text, bos=False)
    assert processor.tokenizer(found)["input_ids"] == rows


@pytest.mark.parametrize("version", template_names())
def test_generation_by_transformers_and_by_us_ends_where_a_turn_does(exports, version):
    """An export that stops at EOS alone goes on to speak for the user."""
    stops = GenerationConfig.from_pretrained(exports[version]).eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    tokenizer = load_tokenizer(str(exports[version]))
    ends = {"chatml": ["<|im_end|>"], "chat": ["<|im_end|>"], "llama_3": ["<|eot_id|>"]}.get(version, ["</s>"])
    assert {tokenizer.token_id(end) for end in ends} <= {*stops}
    assert data_flags(read_model_config(exports[version])).version == {"plain": "v1"}.get(version, version)
    assert {tokenizer.token_id(end) for end in ends} <= {*find_template(version).stop_ids(tokenizer)}


@pytest.mark.parametrize("version", ["chatml", "chat", "llama_3"])
def test_our_answers_are_asked_for_as_in_training_and_stop_at_a_turns_end(exports, version, tmp_path, monkeypatch):
    """By `v1`, which LLaVA's exports otherwise mean, the model would see a prompt that it was never shown."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    answerer = Answerer(exports[version], tmp_path, device="cpu")
    prompt = answerer.tokenizer.backend.decode(answerer.rows("Where?").tolist())
    assert prompt.endswith({"llama_3": "assistant<|end_header_id|>\n\n"}.get(version, "<|im_start|>assistant\n"))
    assert "USER" not in prompt
    end = answerer.tokenizer.token_id("<|eot_id|>" if version == "llama_3" else "<|im_end|>")
    said = [*answerer.tokenizer.encode("red cat", bos=False), end, *answerer.tokenizer.encode("user", bos=False)]
    generate, lengths = answerer.model.generate, []

    def speaking(logits_processor=(), **inputs):
        start = inputs["input_ids"].shape[1]

        def force(ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([said[ids.shape[1] - start]]), 0.0)

        output = generate(**inputs, logits_processor=[*logits_processor, force])
        lengths.append(output.shape[1] - start)
        return output

    monkeypatch.setattr(answerer.model, "generate", speaking)
    settings = GenerationSettings(max_new_tokens=len(said))
    answers = list(answerer.answer([Question(image="a.png", prompt="Where?")], settings))
    assert [answer.text for answer in answers] == ["red cat"] and lengths == [said.index(end) + 1]
    answerer.close()


def test_an_export_goes_in_again_as_it_came_out(exports, tmp_path):
    """With the template it was trained with: a second stage by another would be silent."""
    again = to_megatron(exports["chatml"], tmp_path / "again")
    assert "version: chatml" in (locate_checkpoint(again) / RUN_CONFIG_FILE).read_text()
    out = to_hf(again, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == find_template("chatml").chat_template
    other = (locate_checkpoint(again) / RUN_CONFIG_FILE).read_text().replace("version: chatml", "version: v1")
    (locate_checkpoint(again) / RUN_CONFIG_FILE).write_text(other)
    out = to_hf(again, tmp_path / "as v1")
    assert (out / "chat_template.jinja").read_text() == find_template("v1").chat_template
    assert data_flags(read_model_config(out)).version == "v1"


def test_an_export_whose_tokenizer_has_no_template_is_refused_by_name(tmp_path, capsys):
    save = to_megatron(with_bpe(tmp_path, "qwen", None), tmp_path / "save")
    with pytest.raises(AssertionError):
        export(save, "chat", tmp_path / "out")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: --version chat" in error and "found none; expected chat_template.jinja" in error


def test_a_system_prompt_of_ones_own(processors):
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processors["v1"].apply_chat_template(own, tokenize=False) == "Be brief. USER: Hi "
    with pytest.raises(Exception, match="no system prompt"):
        processors["minigpt4"].apply_chat_template(own, tokenize=False)


OWN = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"


@pytest.mark.parametrize("where", ["processor_config.json", "chat_template.json", "chat_template.jinja", "by name"])
def test_a_models_own_template_comes_through(tmp_path, where):
    """Catches one that the export loses since it stands in the processor's settings, which are written anew."""
    source = hf(tmp_path)
    for path in source.glob("chat_template*"):
        path.unlink()
    settings = json.loads((source / "processor_config.json").read_text())
    settings.pop("chat_template", None)
    if where == "processor_config.json":
        settings["chat_template"] = OWN
    elif where == "chat_template.json":
        (source / where).write_text(json.dumps({"chat_template": OWN}))
    else:
        (source / "chat_template.jinja").write_text(OWN)
    if where == "by name":
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "short.jinja").write_text("short")
    (source / "processor_config.json").write_text(json.dumps(settings))
    expected = AutoProcessor.from_pretrained(source).chat_template
    processor = AutoProcessor.from_pretrained(to_hf(to_megatron(source, tmp_path / "save"), tmp_path / "out"))
    assert processor.chat_template == expected
    assert processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a|"


PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""What llava-hf/llava-1.5-7b-hf has."""


def test_a_models_own_template_shows_messages_that_are_texts(tmp_path, capsys):
    """Of such a message, as lmms-eval makes them, it showed nothing: every question was answered unseen."""
    source = hf(tmp_path)
    for path in source.glob("chat_template*"):
        path.unlink()
    (source / "chat_template.jinja").write_text(PARTS)
    save = to_megatron(source, tmp_path / "save")
    before, after = AutoProcessor.from_pretrained(source), AutoProcessor.from_pretrained(to_hf(save, tmp_path / "out"))
    assert "showed nothing of a message that is a text" in capsys.readouterr().out
    told, asked = ({"role": "user", "content": text} for text in ("Be kind.", "<image>\nWhat is it?"))
    for processor, expected in ((before, "USER: ASSISTANT:"), (after, "USER: <image>\nWhat is it? ASSISTANT:")):
        assert processor.tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True) == expected
    parts = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
    for messages in ([parts], [told, parts], [parts, told, parts]):
        found = after.apply_chat_template(messages, add_generation_prompt=True)
        assert found.count("What is it?") == found.count("<image>\n") == messages.count(parts)
        assert found.count("Be kind.") == messages.count(told)
    assert after.apply_chat_template([parts]) == before.apply_chat_template([parts])
    again = to_hf(to_megatron(tmp_path / "out", tmp_path / "again"), tmp_path / "twice")
    assert (again / "chat_template.jinja").read_bytes() == (tmp_path / "out" / "chat_template.jinja").read_bytes()


def test_a_model_that_a_run_has_trained_is_asked_as_it_was_trained(tmp_path, capsys):
    """Of a LLaVA of transformers the export kept the template that says no system prompt, and every other program asked
    otherwise than training; one that says the very same stays, with what it knows besides."""
    source = hf(tmp_path)
    for path in source.glob("chat_template*"):
        path.unlink()

    def exported(template: str, name: str, *, trained: bool) -> str:
        (source / "chat_template.jinja").write_text(template)
        save = to_megatron(source, tmp_path / f"save-{name}")
        if trained:
            (save / "iter_0000000").rename(save / "iter_0000007")
            (save / "latest_checkpointed_iteration.txt").write_text("7")
        capsys.readouterr()
        return AutoProcessor.from_pretrained(to_hf(save, tmp_path / name)).chat_template

    assert PARTS in exported(PARTS, "converted", trained=False)
    assert "by which the run trained" not in capsys.readouterr().out
    own = with_blank_behind_images(find_template("v1").chat_template)
    assert exported(PARTS, "run", trained=True) == own
    assert "that of --version v1, by which the run trained; the model's own asked otherwise" in capsys.readouterr().out
    assert exported("{# videos, too #}" + own, "alike", trained=True) == "{# videos, too #}" + own


def test_a_language_models_template_gives_way_and_that_is_said(saved, tmp_path, capsys):
    """It knows no images, so answers would be made without seeing any."""
    source = original(tmp_path)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": OWN}))
    save = to_megatron(source, tmp_path / "save")
    processor = AutoProcessor.from_pretrained(to_hf(save, tmp_path / "out"))
    own = with_blank_behind_images(find_template("v1").chat_template)
    assert processor.chat_template == processor.tokenizer.chat_template == own
    assert "note: the chat template is that of --version v1, in place of the tokenizer's" in capsys.readouterr().out


def test_without_a_version_there_is_no_template(saved, tmp_path):
    report = export_checkpoint(locate_checkpoint(saved), tmp_path / "out")
    assert AutoProcessor.from_pretrained(report.folder).chat_template is None
    own = ChatTemplate(version="mine", jinja=OWN)
    report = export_checkpoint(locate_checkpoint(saved), tmp_path / "with", chat_template=own)
    assert AutoProcessor.from_pretrained(report.folder).chat_template == OWN
