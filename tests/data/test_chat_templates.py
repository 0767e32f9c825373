"""Templates of today's language models: rows by hand and by transformers' `apply_chat_template`; what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodingSettings, UnusableSample, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.prepare.token_lengths import count_tokens
from hacl_megatron.data.templates import check_template, find_template, template_names
from hacl_megatron.data.templates.chat import messages_of, own_template
from hacl_megatron.data.templates.template import Dialogue
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.test_encoding import check, sample, shown
from tests.data.tiny_bpe import LLAMA_3, QWEN, THINKING, marked, write_bpe
from tests.data.tiny_tokenizer import CHAT, write_tokenizer

SETTINGS = EncodingSettings(version="chat", model_max_length=512, image_layout=ImageLayout(visual_tokens=3))
KINDS = {
    "qwen": ("qwen", QWEN), "qwen, marked": ("qwen", marked(QWEN)), "llama_3": ("llama_3", LLAMA_3),
    "llama_3, marked": ("llama_3", marked(LLAMA_3)), "thinking": ("qwen", THINKING),
}  # fmt: skip
ROUNDS = ["<image>\nWhat is it?", "a red cat", "is it?", "yes"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("bpe")
    made = {
        name: write_bpe(folder / name.replace(", ", "_"), kind, chat_template=text)
        for name, (kind, text) in KINDS.items()
    }
    made["sentencepiece"] = write_tokenizer(folder / "sp", legacy=False, chat_template=CHAT)
    return {name: load_tokenizer(path) for name, path in made.items()}


def with_system(text: str, *turns: str, **more) -> Sample:
    said = sample(*turns, **more)
    return replace(said, conversations=(("system", text), *said.conversations))


# ------------------------------------------------------------------------------------------ LLaVA-NeXT's, rows by hand


def test_chatml_is_llava_next_qwen_1_5(tokenizers):
    """Its targets are every mark and newline, and the assistant's whole turns, their header too."""
    encoded = encode(sample(*ROUNDS), tokenizers["qwen"], replace(SETTINGS, version="chatml"))
    expected = [
        ("<|im_start|> system", "-"), ("Ċ", "target"), ("You Ġa re Ġa Ġhelpful Ġ assistant .", "-"),
        ("<|im_end|> Ċ <|im_start|>", "target"), ("user", "-"), ("Ċ", "target"), ("IMG IMG IMG", "-"),
        ("Ċ", "target"), ("What Ġis Ġit ?", "-"),
        ("<|im_end|> Ċ <|im_start|> assistant Ċ a Ġred Ġcat <|im_end|> Ċ <|im_start|>", "target"), ("user", "-"),
        ("Ċ", "target"), ("is Ġit ?", "-"), ("<|im_end|> Ċ <|im_start|> assistant Ċ yes <|im_end|> Ċ", "target"),
    ]  # fmt: skip
    check(tokenizers["qwen"], encoded, expected)


def test_llama_3_is_llava_next_llava_llama_3(tokenizers):
    """Marks are targets, the two newlines of a header only in the assistant's; blanks around a message are none."""
    said = with_system(" You are red. ", "<image>\nWhat is it?", " a red cat ")
    encoded = encode(said, tokenizers["llama_3"], replace(SETTINGS, version="llama_3"))
    expected = [
        ("<|begin_of_text|>", "-"), ("<|start_header_id|>", "target"), ("system", "-"), ("<|end_header_id|>", "target"),
        ("ĊĊ You Ġa re Ġred .", "-"), ("<|eot_id|> <|start_header_id|>", "target"), ("user", "-"),
        ("<|end_header_id|>", "target"), ("ĊĊ IMG IMG IMG Ċ What Ġis Ġit ?", "-"),
        ("<|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ a Ġred Ġcat <|eot_id|>", "target"),
    ]  # fmt: skip
    check(tokenizers["llama_3"], encoded, expected)
    without = encode(sample(*ROUNDS), tokenizers["llama_3"], replace(SETTINGS, version="llama_3"))
    text = "".join(shown(tokenizers["llama_3"], without.dialogue)).replace("Ġ", " ")
    assert "system<|end_header_id|>ĊĊYou are a helpful language and vision assistant. You are able to" in text


def test_mistral_is_one_text_cut_at_its_image(tokenizers):
    """An answer's first token takes the blank before it; a text that is cut there gets another dummy space."""
    tokenizer = tokenizers["sentencepiece"]
    encoded = encode(sample(*ROUNDS), tokenizer, replace(SETTINGS, version="mistral"))
    open_, close = "<0x5B> I N S T <0x5D>", "▁ <0x5B> <0x2F> I N S T <0x5D>"
    expected = [
        (f"<s> ▁ {open_} ▁ IMG IMG IMG", "-"), (f"▁ <0x0A> What ▁is ▁it ? {close}", "-"),
        ("▁a ▁red ▁cat ▁ </s>", "target"),
        (f"{open_} ▁is ▁it ? {close}", "-"), ("▁yes ▁ </s>", "target"),
    ]  # fmt: skip
    check(tokenizer, encoded, expected)


# -------------------------------------------------------------------------------------------------- the tokenizer's own


@pytest.mark.parametrize("turns", [ROUNDS, ROUNDS[:2], ["is it?", " yes\n"], ["<image>", "\n\na", "b", " "]])
@pytest.mark.parametrize("name", [*KINDS, "sentencepiece"])
def test_chat_rows_are_those_of_apply_chat_template(tokenizers, name, turns):
    """Rows, and of a template with marks targets, as transformers has them; marks and prefixes give the same ones."""
    tokenizer = tokenizers[name]
    turns = [turn.replace("<image>", "(picture)") for turn in turns]
    said = with_system("You are red", *turns, image=None) if name != "thinking" else sample(*turns, image=None)
    encoded = encode(said, tokenizer, SETTINGS)
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[role], "content": text} for role, text in said.conversations]
    rendered = tokenizer.backend.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, date_string="26 Jul 2024"
    )
    assert encoded.dialogue.tolist() == rendered["input_ids"]
    mask = rendered["assistant_masks"]
    if "marked" in name:
        assert (encoded.labels != IGNORE).astype(int).tolist() == mask
        unmarked = encode(said, tokenizers[name.removesuffix(", marked")], SETTINGS)
        assert unmarked.labels.tolist() == encoded.labels.tolist()
    targets = tokenizer.backend.decode([label for label in encoded.labels.tolist() if label != IGNORE])
    end = {"llama_3": "<|eot_id|>", "sente": "</s>"}.get(name[:7] if name[0] == "l" else name[:5], "<|im_end|>")
    assert targets.count(end) == len(turns) // 2 and targets.endswith(end)


def test_an_answer_that_looks_otherwise_in_the_whole_is_found(tokenizers):
    """Thoughts of the last answer alone: prefixes of the dialogue are none of the whole, as Qwen3's."""
    encoded = encode(sample(*ROUNDS), tokenizers["thinking"], SETTINGS)
    thoughts = "< t h i n k > ĊĊ < / t h i n k > ĊĊ"
    expected = [
        ("<|im_start|> user Ċ IMG IMG IMG Ċ What Ġis Ġit ? <|im_end|> Ċ <|im_start|> assistant Ċ", "-"),
        ("a Ġred Ġcat <|im_end|>", "target"), ("Ċ <|im_start|> user Ċ is Ġit ? <|im_end|> Ċ", "-"),
        ("<|im_start|> assistant Ċ", "-"), (f"{thoughts} yes <|im_end|>", "target"), ("Ċ", "-"),
    ]  # fmt: skip
    check(tokenizers["thinking"], encoded, expected)


PARTS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""As llava-hf's: a content that is a string is passed over without a word."""


def test_a_template_of_parts_gets_parts(tokenizers, tmp_path):
    """Given strings, it shows empty turns."""
    tokenizer = load_tokenizer(write_bpe(tmp_path, "qwen", chat_template=PARTS))
    assert own_template(tokenizer).in_parts and not own_template(tokenizers["qwen"]).in_parts
    encoded = encode(sample(*ROUNDS), tokenizer, SETTINGS)
    expected = [
        ("<|im_start|> user Ċ IMG IMG IMG Ċ What Ġis Ġit ? <|im_end|> Ċ <|im_start|> assistant Ċ", "-"),
        ("a Ġred Ġcat <|im_end|>", "target"), ("Ċ <|im_start|> user Ċ is Ġit ? <|im_end|> Ċ", "-"),
        ("<|im_start|> assistant Ċ", "-"), ("yes <|im_end|>", "target"), ("Ċ", "-"),
    ]  # fmt: skip
    check(tokenizer, encoded, expected)


def test_the_day_is_the_same_every_day(tokenizers):
    """Llama 3.1's template writes today's date, so that a resumed run would see other rows."""
    encoded = encode(sample(*ROUNDS), tokenizers["llama_3"], SETTINGS)
    assert "Today Date: 26 Jul 2024" in tokenizers["llama_3"].backend.decode(
        [row for row in encoded.dialogue.tolist() if row != IMAGE]
    )


# ----------------------------------------------------------------------------------------------------- all of the names


@pytest.mark.parametrize("version", ["chatml", "llama_3", "mistral", "chat", "v1", "minigpt4"])
def test_a_prompt_is_how_a_dialogue_begins(tokenizers, version):
    """Generation starts where the answer's tokens do."""
    tokenizer = tokenizers["llama_3" if version == "llama_3" else "qwen"]
    settings = replace(SETTINGS, version=version)
    whole, prompt = (encode(sample(ROUNDS[0], answer), tokenizer, settings) for answer in ("a red cat", ""))
    number = len(prompt.dialogue)
    assert whole.dialogue[:number].tolist() == prompt.dialogue.tolist()
    behind = tokenizer.backend.decode(whole.dialogue[number:].tolist())
    assert behind.strip().startswith("a red cat") and (whole.labels[number:][:3] != IGNORE).all()


@pytest.mark.parametrize("version", template_names())
def test_without_bos_nothing_stands_in_its_place(tokenizers, version):
    """Qwen has none: a `None` among token ids, or EOS in its place, before dialogues, captions and image."""
    tokenizer = tokenizers["llama_3" if version == "llama_3" else "qwen"]
    settings = replace(SETTINGS, version=version, image_context="prompt")
    said = sample(ROUNDS[0], "a cat", caption="a red cat", hallucinated=["a cat"])
    encoded = encode(said, tokenizer, settings)
    caption = [tokenizer.token_id(piece) for piece in ("a", "Ġred", "Ġcat")]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert encoded.pairs[0].caption_segment.tolist() == [*begin, *caption, tokenizer.eos_id]
    first = int((encoded.dialogue == IMAGE).argmax())
    assert encoded.pairs[0].image_segment.tolist() == [*encoded.dialogue[:first], IMAGE, IMAGE, IMAGE, tokenizer.eos_id]
    assert (first == 0) == (version == "plain") and (encoded.dialogue[:first] >= 0).all()
    assert encoded.labels[0] == IGNORE and (encoded.labels != IGNORE).any() and not encoded.tokenization_mismatch
    length = len(encoded.dialogue) - 2  # an image counts as one
    lengths = length, len(encoded.pairs[0].caption_segment), len(encoded.pairs[0].hallucinated_segments[0])
    assert count_tokens([said], tokenizer, version) == [lengths]


def test_v1_without_bos_has_the_targets_that_it_has_with_one(tokenizers):
    """LLaVA's count begins behind BOS: one off, and all labels are gone."""
    encoded = encode(sample(*ROUNDS), tokenizers["qwen"], replace(SETTINGS, version="v1"))
    targets = [label for label in encoded.labels.tolist() if label != IGNORE]
    assert tokenizers["qwen"].backend.decode(targets) == " a red cat<|im_end|> yes<|im_end|>"


@pytest.mark.parametrize("image_at", [0, 5, 200])
def test_an_image_token_may_lie_anywhere(tmp_path, image_at):
    """The image's rows are no token of any id, and `<image>` in a text beside none is text, as ever."""
    tokenizer = load_tokenizer(write_bpe(tmp_path, "qwen", chat_template=QWEN, image_at=image_at))
    assert tokenizer.token_id("<image>") == image_at
    for version in ("chat", "chatml", "plain", "v1"):
        rows = encode(sample(*ROUNDS[:2]), tokenizer, replace(SETTINGS, version=version)).dialogue.tolist()
        assert rows.count(IMAGE) == 3 and image_at not in rows


STOPS = {
    ("qwen", "chatml"): ["<|im_end|>"], ("qwen", "chat"): ["<|im_end|>"], ("qwen", "plain"): ["<|im_end|>"],
    ("llama_3", "llama_3"): ["<|end_of_text|>", "<|eot_id|>"], ("llama_3", "v1"): ["<|end_of_text|>"],
    ("llama_3", "chat"): ["<|end_of_text|>", "<|eot_id|>"], ("sentencepiece", "chat"): ["</s>"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "version"), STOPS)
def test_generation_stops_at_eos_and_at_a_turns_end(tokenizers, name, version):
    """An instruct model's EOS may be another token than the one that ends its turns."""
    ids = find_template(version).stop_ids(tokenizers[name])
    assert tokenizers[name].backend.convert_ids_to_tokens(ids) == STOPS[name, version]


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "found none"),
        ("{{ raise_exception('no') }}", r"refuses it \(TemplateError: no\)"),
        ("{% for m in messages %}{{ m.rol", "TemplateSyntaxError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses it|makes"),
        ("hello<|im_end|>", "makes 'hello"),
        ("{{ messages[0].content + messages[1].content }}\n", "no special token"),
        (QWEN + "{{ strftime_now('%d %b %Y') }}", "the day on which it is rendered"),
    ],
)
def test_a_tokenizer_whose_template_is_of_no_use_is_refused(tmp_path, template, reason):
    """Before any sample is read, in one line; a sandboxed template reaches nothing."""
    tokenizer = load_tokenizer(write_bpe(tmp_path, "qwen", chat_template=template))
    with pytest.raises(ValueError, match=reason) as caught:
        check_template("chat", tokenizer)
    assert "\n" not in str(caught.value) and "give another --version" in str(caught.value)


@pytest.mark.parametrize(("version", "missing"), [("chatml", "<|im_start|> <|im_end|>"), ("llama_3", "<|eot_id|>")])
def test_a_tokenizer_without_the_tokens_is_refused(tokenizers, version, missing):
    """Spelled out in pieces, a turn's end would be learnt as text, and generation would not stop there."""
    with pytest.raises(ValueError, match=f"--version {version} writes") as caught:
        check_template(version, tokenizers["sentencepiece"])
    assert missing in str(caught.value) and "\n" not in str(caught.value)


def test_a_dialogue_that_the_template_refuses_costs_itself(tmp_path):
    alone = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + QWEN
    tokenizer = load_tokenizer(write_bpe(tmp_path, "qwen", chat_template=alone))
    encode(sample(*ROUNDS[:2]), tokenizer, SETTINGS)
    with pytest.raises(UnusableSample, match=r"chat template refuses it .*one question"):
        encode(sample(*ROUNDS), tokenizer, SETTINGS)


@pytest.mark.parametrize("version", template_names())
def test_system_prompts(tokenizers, version):
    """A system prompt takes the place of the template's own, or is refused; never is it dropped."""
    tokenizer = tokenizers["llama_3" if version == "llama_3" else "qwen"]
    said = with_system("You is red", *ROUNDS[:2])
    if version in ("plain", "minigpt4"):
        with pytest.raises(UnusableSample, match=rf"--version {version} has no place"):
            encode(said, tokenizer, replace(SETTINGS, version=version))
        return
    found = encode(said, tokenizer, replace(SETTINGS, version=version))
    text = tokenizer.backend.decode([row for row in found.dialogue.tolist() if row != IMAGE])
    assert text.count("You is red") == 1 and "helpful" not in text
    assert text.index("You is red") < text.index("What is it?")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((("human", "a"), ("system", "b"), ("gpt", "c")), "turn 1 is from 'system', which may only be the first"),
        ((("system", "<image> b"), ("human", "a"), ("gpt", "c")), "in the system prompt"),
        ((("system", "b"),), "no turns but a system prompt"),
    ],
)
def test_system_turns_elsewhere_are_refused(tokenizers, turns, reason):
    with pytest.raises(UnusableSample, match=reason):
        encode(replace(sample(), conversations=turns), tokenizers["qwen"], SETTINGS)


def test_messages_in_parts_have_images_in_front():
    dialogue = Dialogue(turns=(("human", "<image>"), ("gpt", "<image>\na")), has_image=True, system="s")
    assert messages_of(dialogue, in_parts=True) == [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    ]


def test_a_token_that_stands_for_everything_is_no_padding(tmp_path: Path):
    """GPT-2's kind has one token for BOS, EOS and unknown: taken for padding, every turn would lose its end."""
    folder = Path(write_bpe(tmp_path, "qwen"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token"', '"unk_token": "<|im_end|>", "eos_token"'))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.unk_id is None and tokenizer.pad_id == tokenizer.eos_id
    encoded = encode(sample(*ROUNDS[:2]), tokenizer, replace(SETTINGS, version="v1"))
    assert encoded.dialogue[-1] == tokenizer.eos_id
