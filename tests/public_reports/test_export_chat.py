"""Chat templates of exports: ours say exactly what training saw, and a model's own is not lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from hacl_megatron.checkpoint.convert.megatron_to_hf import export_checkpoint
from hacl_megatron.checkpoint.hf.assets.write import ChatTemplate
from hacl_megatron.checkpoint.run.folder import RUN_CONFIG_FILE, locate_checkpoint
from hacl_megatron.data.encoding import checked_dialogue
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.templates import find_template, template_names
from hacl_megatron.data.templates.template import IMAGE
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.public_reports.export_cases import hf, original
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


@pytest.fixture(scope="module")
def processors(saved: Path) -> dict[str, Any]:
    """By `--version`, of which exports are otherwise alike."""
    found = {}
    checkpoint = locate_checkpoint(saved)
    path, text = checkpoint / RUN_CONFIG_FILE, (checkpoint / RUN_CONFIG_FILE).read_text()
    for version in template_names():
        assert "version: v1" in text
        path.write_text(text.replace("version: v1", f"version: {version}"))
        found[version] = AutoProcessor.from_pretrained(to_hf(saved, saved.parent / version))
    path.write_text(text)
    return found


def prompt_of(version: str, turns: list[tuple[str, str]], tokenizer: Tokenizer) -> str:
    """What training tokenizes, but for the BOS at its beginning; no target where the answer is empty."""
    has_image = any("<image>" in text for _, text in turns)
    sample = Sample(
        sample_id=0, name="", image="x.png" if has_image else None, conversations=tuple(turns), caption=None,
        hallucinated_captions=(), source="",
    )  # fmt: skip
    first, *others = find_template(version).pieces(checked_dialogue(sample), tokenizer)
    assert first.content == tokenizer.bos_id
    if turns[-1][1] == "":
        others = [piece for piece in others if not (piece is others[-1] and piece.is_target)]
    names = {IMAGE: "<image>", tokenizer.bos_id: "<s>"}
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
def test_rendered_by_transformers_it_is_our_prompt(processors, saved, version, name, in_parts):
    """Catches an export without a template, and one that is a blank, a line or a `</s>` off what training saw."""
    turns, processor = DIALOGUES[name], processors[version]
    if version == "plain" and name in ("text alone", "two rounds", "two rounds, whole"):
        with pytest.raises(Exception, match="plain template"):
            processor.apply_chat_template(messages(turns, in_parts=in_parts))
        return
    tokenizer = load_tokenizer(str(locate_checkpoint(saved) / "hf_assets"))
    found = processor.apply_chat_template(
        messages(turns, in_parts=in_parts), add_generation_prompt=turns[-1][1] == "", tokenize=False
    )
    assert found == prompt_of(version, turns, tokenizer)
    if "<image>" not in found:
        assert processor.tokenizer(found)["input_ids"] == [1, *tokenizer.encode(found, bos=False)]


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


def test_a_language_models_template_gives_way_and_that_is_said(saved, tmp_path, capsys):
    """It knows no images, so answers would be made without seeing any."""
    source = original(tmp_path)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": OWN}))
    save = to_megatron(source, tmp_path / "save")
    processor = AutoProcessor.from_pretrained(to_hf(save, tmp_path / "out"))
    assert processor.chat_template == processor.tokenizer.chat_template == find_template("v1").chat_template
    assert "note: the chat template is that of --version v1, in place of the tokenizer's" in capsys.readouterr().out


def test_without_a_version_there_is_no_template(saved, tmp_path):
    report = export_checkpoint(locate_checkpoint(saved), tmp_path / "out")
    assert AutoProcessor.from_pretrained(report.folder).chat_template is None
    own = ChatTemplate(version="mine", jinja=OWN)
    report = export_checkpoint(locate_checkpoint(saved), tmp_path / "with", chat_template=own)
    assert AutoProcessor.from_pretrained(report.folder).chat_template == OWN
