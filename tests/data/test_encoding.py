"""Token rows worked out by hand for LLaVA-1.5's templates, on a tokenizer whose every piece is known."""

import dataclasses

import pytest

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodingSettings, UnusableSample, encode, rows_key
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer

V1 = EncodingSettings(version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=3))
MINIGPT4 = EncodingSettings(version="minigpt4", model_max_length=512, image_layout=ImageLayout(visual_tokens=3))
PLAIN = EncodingSettings(version="plain", model_max_length=512, image_layout=ImageLayout(visual_tokens=3))

SYSTEM_ROWS = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant ▁gives "
    "▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user ' s ▁questions ."
)
SYSTEM = SYSTEM_ROWS.split()


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "non-legacy"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=request.param))


def sample(*turns: str, image: str | None = "7.jpg", caption: str | None = None, hallucinated=(), first="human"):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return Sample(
        sample_id=0,
        name="7",
        images=() if image is None else (image,),
        conversations=tuple((roles[n % 2], turn) for n, turn in enumerate(turns)),
        caption=caption,
        hallucinated_captions=tuple(hallucinated),
        source="data.json",
    )


def shown(tokenizer: Tokenizer, ids) -> list[str]:
    """Rows as pieces: `IMG` for an image row, `-` for an ignored label."""
    special = {IMAGE: "IMG", IGNORE: "-"}
    return [special[i] if i in special else tokenizer.backend.convert_ids_to_tokens(i) for i in ids.tolist()]


def check(tokenizer, encoded, expected: list[tuple[str, str]]) -> None:
    """`expected`: stretches of (pieces, "-" or "target"), written out by hand."""
    rows = [piece for stretch, _ in expected for piece in stretch.split()]
    labels = [piece if kind == "target" else "-" for stretch, kind in expected for piece in stretch.split()]
    assert shown(tokenizer, encoded.dialogue) == rows
    assert shown(tokenizer, encoded.labels) == labels


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "  What is it? <image>"])
def test_v1_moves_the_image_to_the_front_of_its_message(tokenizer, question):
    encoded = encode(sample(question, "a red cat."), tokenizer, V1)
    expected = [
        (SYSTEM_ROWS, "-"),
        # "USER: " ends in a space, a piece of its own in front of the image; the text behind the image starts with
        # SentencePiece's dummy space.
        ("▁US ER : ▁ IMG IMG IMG ▁ <0x0A> What ▁is ▁it ? ▁ASSISTANT :", "-"),
        ("▁a ▁red ▁cat . </s>", "target"),
    ]
    check(tokenizer, encoded, expected)
    assert not encoded.truncated and not encoded.tokenization_mismatch


def test_v1_trains_every_answer_of_several_rounds(tokenizer):
    encoded = encode(sample("<image>\nWhat is it?", "a cat.", "is it red?", "yes"), tokenizer, V1)
    user = "▁US ER" if tokenizer.legacy else "USER"
    expected = [
        (SYSTEM_ROWS, "-"),
        ("▁US ER : ▁ IMG IMG IMG ▁ <0x0A> What ▁is ▁it ? ▁ASSISTANT :", "-"),
        ("▁a ▁cat . </s>", "target"),
        (f"{user} : ▁is ▁it ▁red ? ▁ASSISTANT :", "-"),
        ("▁yes </s>", "target"),
    ]
    check(tokenizer, encoded, expected)


def test_v1_text_only_and_a_literal_image_tag(tokenizer):
    encoded = encode(sample("is <image> red?", "yes", image=None), tokenizer, V1)
    tag = "▁ <0x3C> i m a g e <0x3E>"
    expected = [(SYSTEM_ROWS, "-"), (f"▁US ER : ▁is {tag} ▁red ? ▁ASSISTANT :", "-"), ("▁yes </s>", "target")]
    check(tokenizer, encoded, expected)
    assert not encoded.images and not encoded.pairs


def test_v1_image_in_the_second_round(tokenizer):
    encoded = encode(sample("is it?", "yes", "is it red?\n<image>", "yes"), tokenizer, V1)
    user = "▁US ER" if tokenizer.legacy else "USER"
    expected = [
        (SYSTEM_ROWS, "-"),
        ("▁US ER : ▁is ▁it ? ▁ASSISTANT :", "-"),
        ("▁yes </s>", "target"),
        # Behind "</s>" the space of "USER: " is still a piece of its own in front of the image.
        (f"{user} : ▁ IMG IMG IMG ▁ <0x0A> i s ▁it ▁red ? ▁ASSISTANT :", "-"),
        ("▁yes </s>", "target"),
    ]
    check(tokenizer, encoded, expected)


def test_v1_image_in_an_answer_is_no_target(tokenizer):
    encoded = encode(sample("is it?", "yes <image>"), tokenizer, V1)
    expected = [
        (SYSTEM_ROWS, "-"),
        ("▁US ER : ▁is ▁it ? ▁ASSISTANT :", "-"),
        ("▁", "target"),  # the space of "ASSISTANT: " counts as the answer's, as ever
        ("IMG IMG IMG", "-"),
        ("▁ <0x0A> y e s </s>", "target"),
    ]
    check(tokenizer, encoded, expected)


def test_v1_leaves_out_a_leading_gpt_turn(tokenizer):
    with_greeting = encode(sample("a cat", "is it?", "yes", image=None, first="gpt"), tokenizer, V1)
    without = encode(sample("is it?", "yes", image=None), tokenizer, V1)
    assert with_greeting.dialogue.tolist() == without.dialogue.tolist()
    assert with_greeting.labels.tolist() == without.labels.tolist()


def test_plain_is_image_answer_newline(tokenizer):
    encoded = encode(sample("What is it?\n<image>", "a red cat"), tokenizer, PLAIN)
    check(tokenizer, encoded, [("<s> IMG IMG IMG", "-"), ("▁a ▁red ▁cat <0x0A>", "target")])


def test_plain_keeps_the_answers_own_blanks(tokenizer):
    encoded = encode(sample("<image>", " a cat "), tokenizer, PLAIN)
    check(tokenizer, encoded, [("<s> IMG IMG IMG", "-"), ("▁ ▁a ▁cat ▁ <0x0A>", "target")])


# ------------------------------------------------------------------------------------------------- mismatch, truncation


@pytest.mark.parametrize(
    "turns",
    [
        ("<image>\nis ASSISTANT: red?", "yes"),  # three parts around the answer mark
        ("<image>\nis it?", "yes", "is it red?"),  # the last question has no answer
        ("<image>\nis it?", ""),  # an empty answer loses its EOS
    ],
)
def test_mismatch_ignores_all_labels(tokenizer, turns):
    encoded = encode(sample(*turns), tokenizer, V1)
    assert encoded.tokenization_mismatch
    assert set(encoded.labels.tolist()) == {IGNORE}
    assert shown(tokenizer, encoded.dialogue)[: len(SYSTEM)] == SYSTEM


@pytest.mark.parametrize(
    ("turns", "limit", "why"),
    [
        (("<image>\nis it?",), 512, "no answer with words"),
        (("<image>\nis it?", ""), 512, "no answer with words"),
        (("<image>\nis it?", "yes", "is it red?"), 512, "ends with a question"),
        (("<image>\nis ASSISTANT: red?", "yes"), 512, "do not tokenize to the length"),
        (("<image>\nis it? is it?", "yes"), 40, "cut at --model-max-length 40, before any answer"),
        (("<image>\nis it?", "yes"), 512, None),
    ],
)
def test_a_sample_that_trains_nothing_says_of_which_kind(tokenizer, turns, limit, why):
    settings = dataclasses.replace(V1, model_max_length=limit)
    encoded = encode(sample(*turns), tokenizer, settings)
    assert encoded.untrained is None if why is None else why in encoded.untrained
    # Its pair trains, whatever its dialogue does.
    assert encode(sample(*turns, caption="a cat"), tokenizer, settings).untrained is None


OTHER_VOCABULARIES = {
    "▁USER whole": {"spaced_user_piece": True},
    "▁USER whole, USER not": {"spaced_user_piece": True, "user_piece": False},
    "USER not": {"user_piece": False},
}
"""Where a later round is as long on its own as behind EOS, or shorter: LLaVA's correction by one is then wrong."""


@pytest.fixture(scope="module", params=OTHER_VOCABULARIES)
def other_tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(write_tokenizer(folder, legacy=False, **OTHER_VOCABULARIES[request.param]))


def test_several_rounds_keep_their_labels_under_other_vocabularies(other_tokenizer):
    """LLaVA#1166, FastChat#1290: every dialogue of two rounds or more lost all its labels."""
    encoded = encode(
        sample("<image>\nWhat is it?", "a cat.", "is it red?", "yes", "is it?", "it is"), other_tokenizer, V1
    )
    assert not encoded.tokenization_mismatch
    targets = [piece for piece in shown(other_tokenizer, encoded.labels) if piece != "-"]
    assert targets == ["▁a", "▁cat", ".", "</s>", "▁yes", "</s>", "▁it", "▁is", "</s>"]
    at = [row for row, label in enumerate(encoded.labels.tolist()) if label != IGNORE]
    assert encoded.labels[at].tolist() == encoded.dialogue[at].tolist()


def test_a_legacy_vocabulary_with_the_spaced_piece(tmp_path):
    legacy = load_tokenizer(write_tokenizer(tmp_path, legacy=True, spaced_user_piece=True))
    assert legacy.round_surplus == 0
    assert not encode(sample("<image>\nis it?", "yes", "is it red?", "yes"), legacy, V1).tokenization_mismatch


@pytest.mark.parametrize(
    ("turns", "targets"),
    [
        (("<image>\nis it?", "yes", "is it red?"), "▁yes </s>"),  # the last question has no answer
        (("<image>\nis it?", "yes", "is ASSISTANT: red?", "a", "is it?", "it is"), "▁yes </s> ▁it ▁is </s>"),
        (("<image>\nis it?", ""), ""),
        (("<image>\nis it?", "yes</s>", "is it red?", "a cat"), "▁yes </s> ▁a ▁cat </s>"),
    ],
)
def test_one_bad_round_costs_itself_where_llavas_rule_holds_for_none(other_tokenizer, turns, targets):
    """The rows' own EOS tell where the others are; under Vicuna's vocabulary LLaVA's rule stands, as the test above."""
    encoded = encode(sample(*turns), other_tokenizer, V1)
    assert [piece for piece in shown(other_tokenizer, encoded.labels) if piece != "-"] == targets.split()
    assert encoded.tokenization_mismatch == (not targets)


def test_truncation_counts_the_expanded_image(tokenizer):
    turns = ("<image>\nWhat is it?", "a red cat.")
    whole = encode(sample(*turns), tokenizer, V1)
    assert len(whole.dialogue) == 29 + 15 + 1 + 5
    cut = encode(sample(*turns), tokenizer, dataclasses.replace(V1, model_max_length=47))
    assert cut.truncated
    assert cut.dialogue.tolist() == whole.dialogue[:47].tolist()
    assert shown(tokenizer, cut.labels)[-3:] == ["-", "▁a", "▁red"]
    exact = encode(sample(*turns), tokenizer, dataclasses.replace(V1, model_max_length=50))
    assert not exact.truncated and len(exact.dialogue) == 50


def test_truncation_never_cuts_the_image(tokenizer):
    turns = ("<image>\nWhat is it?", "a red cat.")
    end = 30 + 4 + 3
    encoded = encode(sample(*turns), tokenizer, dataclasses.replace(V1, model_max_length=end))
    assert shown(tokenizer, encoded.dialogue)[-4:] == ["▁", "IMG", "IMG", "IMG"]
    with pytest.raises(UnusableSample, match="raise --model-max-length"):
        encode(sample(*turns), tokenizer, dataclasses.replace(V1, model_max_length=end - 1))


def test_a_mismatch_behind_the_longest_length_is_forgiven(tokenizer):
    """LLaVA asks only when its count stays below the longest length."""
    turns = ("is it?", "a cat. " * 40, "is it red?")  # the last question has no answer: a mismatch
    settings = dataclasses.replace(V1, model_max_length=100)
    assert encode(sample(*turns, image=None), tokenizer, V1).tokenization_mismatch
    cut = encode(sample(*turns, image=None), tokenizer, settings)
    assert not cut.tokenization_mismatch and cut.truncated
    assert shown(tokenizer, cut.labels)[-4:] == ["▁cat", ".", "▁a", "▁cat"]


def test_a_written_unk_is_padding_to_llava(tokenizer):
    encoded = encode(sample("<image>", "a<unk> cat"), tokenizer, PLAIN)
    assert "<unk>" not in shown(tokenizer, encoded.dialogue)
    assert len(encoded.dialogue) == len(encoded.labels)


# ------------------------------------------------------------------------------------------------- contrastive segments


def test_pair_segments(tokenizer):
    pair = sample("<image>\nis it?", "yes", caption="a red cat", hallucinated=["a red dog", "a cat"])
    encoded = encode(pair, tokenizer, V1)
    assert shown(tokenizer, encoded.pairs[0].image_segment) == ["IMG", "IMG", "IMG", "</s>"]
    assert shown(tokenizer, encoded.pairs[0].caption_segment) == ["<s>", "▁a", "▁red", "▁cat", "</s>"]
    assert [shown(tokenizer, segment) for segment in encoded.pairs[0].hallucinated_segments] == [
        ["<s>", "▁a", "▁red", "▁dog", "</s>"],
        ["<s>", "▁a", "▁cat", "</s>"],
    ]


def test_prompt_context_is_the_dialogues_prefix(tokenizer):
    settings = dataclasses.replace(V1, image_context="prompt")
    encoded = encode(sample("<image>\nis it?", "yes", caption="a cat"), tokenizer, settings)
    expected = [*SYSTEM, "▁US", "ER", ":", "▁", "IMG", "IMG", "IMG", "</s>"]
    assert shown(tokenizer, encoded.pairs[0].image_segment) == expected
    assert encoded.pairs[0].image_segment[:-1].tolist() == encoded.dialogue[: len(expected) - 1].tolist()
    # A conversation that never mentions its image: the same prefix.
    unmentioned = encode(sample("is it?", "yes", caption="a cat"), tokenizer, settings)
    assert shown(tokenizer, unmentioned.pairs[0].image_segment) == expected
    assert IMAGE not in unmentioned.dialogue
    plain = dataclasses.replace(PLAIN, image_context="prompt")
    encoded = encode(sample("<image>", "a cat", caption="a cat"), tokenizer, plain)
    assert shown(tokenizer, encoded.pairs[0].image_segment) == ["<s>", "IMG", "IMG", "IMG", "</s>"]


def test_captions_are_cut_between_bos_and_eos(tokenizer):
    settings = dataclasses.replace(PLAIN, model_max_length=5)
    encoded = encode(sample("<image>", "a", caption="a " * 9, hallucinated=["a cat " * 9]), tokenizer, settings)
    assert shown(tokenizer, encoded.pairs[0].caption_segment) == ["<s>", "▁a", "▁a", "▁a", "</s>"]
    assert shown(tokenizer, encoded.pairs[0].hallucinated_segments[0]) == ["<s>", "▁a", "▁cat", "▁a", "</s>"]
    assert encoded.truncated


def test_equal_token_ids_have_equal_keys(tokenizer):
    first = encode(sample("<image>", "x", caption="a cat", hallucinated=["a dog", "a cat"]), tokenizer, PLAIN)
    second = encode(sample("<image>", "a dog", caption="a dog"), tokenizer, PLAIN)
    assert first.pairs[0].hallucinated_keys == (second.pairs[0].caption_key, first.pairs[0].caption_key)
    assert first.pairs[0].caption_key != second.pairs[0].caption_key
    assert first.pairs[0].caption_key == rows_key(first.pairs[0].caption_segment)
    assert all(-(2**63) <= key < 2**63 for key in (*first.pairs[0].hallucinated_keys, first.pairs[0].caption_key))


@pytest.mark.parametrize(
    "kwargs", [{"image": None, "caption": "a cat", "hallucinated": ["a dog"]}, {"hallucinated": ["a dog"]}]
)
def test_without_image_or_caption_there_is_no_pair(tokenizer, kwargs):
    encoded = encode(sample("is it?", "yes", **kwargs), tokenizer, V1)
    assert not encoded.pairs
    assert len(encoded.dialogue) > 0


# ----------------------------------------------------------------------------------------------------------- MiniGPT-4


def released_rows(
    tokenizer: Tokenizer, prompts: list[str], answers: list[str], end: str
) -> tuple[list[int], list[int]]:
    """Ids and labels as MiniGPT-4's `prompt_wrap` and `tokenize_conversation` put them together, one image, V = 3."""

    def tokenize(text: str) -> list[int]:
        return tokenizer.backend(text, add_special_tokens=False).input_ids if text else []

    *before, behind = prompts[0].split("<ImageHere>")
    ids = [tokenizer.bos_id]
    for text in before:
        ids += [*tokenize(text), IMAGE, IMAGE, IMAGE]
    ids += tokenize(behind)
    labels = [IGNORE] * len(ids)
    for number, answer in enumerate(answers):
        if number:
            question = [tokenizer.bos_id, *tokenize(prompts[number])]
            ids, labels = ids + question, labels + [IGNORE] * len(question)
        target = tokenize(answer + end)
        ids, labels = ids + target, labels + target
    return ids, labels


ASKED = "###Human: <Img><ImageHere></Img> What is it? ###Assistant: "


@pytest.mark.parametrize(
    ("turns", "prompts", "answers", "end"),
    [
        (["<image>\nWhat is it?", "a red cat."], [ASKED], ["a red cat."], "###"),
        (["What is it? <image>", "a cat"], [ASKED], ["a cat"], "###"),
        (["<image>", "a red cat"], ["<ImageHere>"], ["a red cat"], "\n"),  # the first stage
        (
            ["<image>\nWhat is it?", "a cat", "is it red?", "yes"],
            [ASKED, "###Human: is it red? ###Assistant: "],
            ["a cat", "yes"],
            "###",
        ),
    ],
    ids=["one round", "tag behind", "first stage", "two rounds"],
)
def test_minigpt4_is_the_released_codes_pieces(tokenizer, turns, prompts, answers, end):
    encoded = encode(sample(*turns), tokenizer, MINIGPT4)
    ids, labels = released_rows(tokenizer, prompts, answers, end)
    assert encoded.dialogue.tolist() == ids and encoded.labels.tolist() == labels
    assert not encoded.tokenization_mismatch


def test_minigpt4s_first_stage_is_plain(tokenizer):
    pair = sample("<image>", "a red cat", caption="a red cat", hallucinated=["a dog"])
    first, plain = encode(pair, tokenizer, MINIGPT4), encode(pair, tokenizer, PLAIN)
    assert first.dialogue.tolist() == plain.dialogue.tolist() and first.labels.tolist() == plain.labels.tolist()
    assert first.pairs[0].image_segment.tolist() == plain.pairs[0].image_segment.tolist()


def test_minigpt4_without_an_image_and_without_an_answer(tokenizer):
    text = encode(sample("is <image> red?", "yes", image=None), tokenizer, MINIGPT4)
    assert IMAGE not in text.dialogue and (text.labels != IGNORE).sum() == len(tokenizer.encode("yes###", bos=False))
    prompt = encode(sample("<image>\nWhat is it?", ""), tokenizer, MINIGPT4)  # what an answer is generated for
    assert prompt.dialogue.tolist() == released_rows(tokenizer, [ASKED], [], "")[0]
    assert (prompt.labels == IGNORE).all()


def test_minigpt4_image_context_is_its_prompts_beginning(tokenizer):
    settings = dataclasses.replace(MINIGPT4, image_context="prompt")
    for turns in (["<image>\nis it?", "yes"], ["is it?", "yes"]):  # the second does not mention its image
        rows = encode(sample(*turns, caption="a cat"), tokenizer, settings).pairs[0].image_segment
        beginning = tokenizer.encode("###Human: <Img>", bos=True)
        assert rows.tolist() == [*beginning, IMAGE, IMAGE, IMAGE, tokenizer.eos_id]


# ----------------------------------------------------------------------------------------------------- unusable samples


@pytest.mark.parametrize(
    ("broken", "settings", "reason"),
    [
        (sample(), V1, "no turns"),
        (sample("<image>", 3), V1, "turn 1 is no string but int"),
        (sample("<image>", None), PLAIN, "turn 1 is no string but NoneType"),
        (sample("<image>", "\ud83d"), V1, "does not tokenize"),
        (sample("<image>", "a", caption="\ud83d"), V1, "does not tokenize"),
        (sample("<image> <image>", "a"), V1, "2 <image> tags"),
        (sample("<image>", "a", "<image>", "b"), V1, "2 <image> tags"),
        (sample("yes", first="gpt", image=None), V1, "no human turn"),
        (sample("<image>", "a", image=None), PLAIN, "needs an image"),
        (sample("<image>", "a", "b", "c"), PLAIN, "found 4 turns"),
        (sample("is it?", "a <image>"), PLAIN, "in the answer"),
        (sample("is it?", "a <image>"), MINIGPT4, "in an answer"),
        (sample("yes", first="gpt", image=None), MINIGPT4, "no human turn"),
        (dataclasses.replace(sample(), conversations=(("human", "a"), ("human", "b"))), V1, "do not take turns"),
        (dataclasses.replace(sample(), conversations=(("tool", "a"),)), V1, "from 'tool'"),
        (dataclasses.replace(sample(), conversations=((["human"], "a"),)), V1, "expected 'human' or 'gpt'"),
    ],
)
def test_unusable_samples_say_why(tokenizer, broken, settings, reason):
    with pytest.raises(UnusableSample, match=reason) as caught:
        encode(broken, tokenizer, settings)
    assert "\n" not in str(caught.value)
