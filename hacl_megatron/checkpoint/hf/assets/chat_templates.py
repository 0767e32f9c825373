"""Jinja chat templates of a folder: where transformers looks for them, and where an export puts them.

`processor_config.json` {chat_template}, then chat_template.json, chat_template.jinja with additional_chat_templates/,
and, for the tokenizer alone, `tokenizer_config.json` {chat_template}. An export has the last but one of these.
"""

from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from hacl_megatron.checkpoint.hf.json_files import one_line, read_json
from hacl_megatron.config.checks.foreign_files import LARGEST_CONFIG, own_file

IMAGE = "<image>"
"""How a template that knows images writes one."""
JINJA_FILE, OLD_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
TEXTS_AS_PARTS = """\
{%- set parted = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}
        {%- set content = [{'type': 'text', 'text': content}] -%}
    {%- endif -%}
    {%- set parted.messages = parted.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = parted.messages -%}"""
"""Jinja in front of a template that knows messages in parts alone, as those of transformers' LLaVA do. Of a message
that is a text, as lmms-eval and many programs have it, such a template shows nothing, and says nothing of it."""
Templates = dict[str, str]
"""Name -> Jinja text; the one that is used where none is named is `default`."""


def processor_templates(folder: Path) -> Templates:
    """Of the processor, as transformers 5 reads them; {} where there are none."""
    for name in ("processor_config.json", OLD_FILE):
        if own_file(folder / name, LARGEST_CONFIG):
            found = _templates(read_json(folder / name).get("chat_template"), folder / name)
            if found:
                return found
    found = {}
    if own_file(folder / JINJA_FILE, LARGEST_CONFIG):
        found["default"] = _text(folder / JINJA_FILE)
    for file in sorted((folder / FOLDER).glob("*.jinja")):
        if own_file(file, LARGEST_CONFIG):
            found[file.stem] = _text(file)
    return found


def tokenizer_templates(folder: Path) -> Templates:
    """What `tokenizer_config.json` says; {} where it says nothing."""
    path = folder / "tokenizer_config.json"
    return _templates(read_json(path).get("chat_template"), path) if own_file(path, LARGEST_CONFIG) else {}


def choose_templates(
    folder: Path,
    tokenizer: Path,
    *,
    of_whole_model: bool,
    own: str | None,
    own_name: str,
    notes: list[str],
    replaces: bool = False,
    is_tokenizers: bool = False,
    trained: bool = False,
) -> Templates:
    """The templates that an export gets.

    Args:
        folder: of the checkpoint's assets.
        tokenizer: of its tokenizer.
        of_whole_model: they came with a model that has images. Else they are a language model's, which knows none.
        own: of the `--version` that was trained with, None where nobody says.
        own_name: what notes call that.
        notes: get a line where a template gives way.
        replaces: whether `own` is another than the model came with, and so wins.
        is_tokenizers: whether the tokenizer's own was trained with, to which `own` makes texts of images' parts.
        trained: whether a run has trained by `own`, which then wins over one that asks in other words.

    Raises:
        ValueError: the tokenizer's own was trained with, and it has none.
    """
    found, beside = processor_templates(folder), tokenizer_templates(tokenizer)
    if is_tokenizers:
        has_file = own_file(tokenizer / JINJA_FILE, LARGEST_CONFIG)
        text = _text(tokenizer / JINJA_FILE) if has_file else beside.get("default")
        if text is None:
            raise ValueError(
                f"{tokenizer}: no chat template there, as {own_name} needs one; expected {JINJA_FILE}, or "
                "chat_template in tokenizer_config.json: add it, or give another --version"
            )
        return {"default": text if IMAGE in text else f"{own}{text}"}
    models = found or (beside if "image" in beside.get("default", "") else {})
    if of_whole_model and models and not replaces:
        if not trained or own is None or _asks_alike(models.get("default", ""), own):
            return _with_texts(models, notes)
        notes.append(
            f"the chat template is that of {own_name}, by which the run trained; the model's own asked otherwise"
        )
        return {"default": own}
    if own is None:
        return found or beside
    if any(text != own for text in (found | beside).values()):
        notes.append(f"the chat template is that of {own_name}, in place of the tokenizer's, which has no images")
    return {"default": own}


def _with_texts(templates: Templates, notes: list[str]) -> Templates:
    """The templates, such that all of them show messages that are texts."""
    found = {name: text if _shows_texts(text) else TEXTS_AS_PARTS + text for name, text in templates.items()}
    if found != templates:
        notes.append("the model's own chat template showed nothing of a message that is a text, not parts; now it does")
    return found


def _shows_texts(template: str) -> bool:
    """Whether it does, or shows nothing of a message in parts either."""

    def shows(content: str | list[dict[str, str]]) -> bool:
        return "probe" in (_rendered(template, [{"role": "user", "content": content}]) or "")

    return shows("probe") or not shows([{"type": "text", "text": "probe"}])


def _asks_alike(one: str, other: str) -> bool:
    """Whether two templates make the same of a dialogue about a picture."""
    parts = {name: [{"type": "text", "text": name}] for name in ("What?", "This.", "And?")}
    dialogue = [
        {"role": "user", "content": [{"type": "image"}, *parts["What?"]]},
        {"role": "assistant", "content": parts["This."]},
        {"role": "user", "content": parts["And?"]},
    ]
    return (text := _rendered(one, dialogue)) is not None and text == _rendered(other, dialogue)


def _rendered(template: str, messages: list[dict[str, Any]]) -> str | None:
    """In transformers' own sandbox, asking for an answer; None where that fails."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True,
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        )  # fmt: skip
    except Exception:  # whatever a stranger's template raises
        return None
    return rendered[0]


def write_templates(folder: Path, templates: Templates) -> None:
    """Write them for processor and tokenizer; ValueError for a name that is no file's."""
    for name, text in templates.items():
        if name == "default":
            (folder / JINJA_FILE).write_text(text, encoding="utf-8")
            continue
        if not name or Path(name).name != name:
            raise ValueError(f"a chat template is named {one_line(name)!r}; expected a name that a file can have")
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / f"{name}.jinja").write_text(text, encoding="utf-8")


def _templates(value: Any, where: Path) -> Templates:
    """A text, an object of them, or a list of {name, template}, as older files have it."""
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    found = {"default": value} if isinstance(value, str) else value
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise ValueError(
            f"{where}: chat_template is {one_line(repr(value))}; expected a Jinja text, or several by name"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; expected a Jinja template") from None
