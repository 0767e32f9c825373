"""Which tokens of a true answer and its twin are compared, and which rows of the twin are computed, by hand."""

import numpy as np
import pytest
import torch

from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import EncodingSettings, encode
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.preferences import CROP_AREA, NothingToCompare, RejectedAnswer, little_left, rejected_answer
from hacl_megatron.data.show import _segments
from hacl_megatron.data.templates.template import IGNORE, IMAGE
from hacl_megatron.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizer import write_tokenizer

BOS, EOS, A, RED, CAT, BLUE, BIG, Q = 1, 2, 10, 11, 12, 21, 22, 30


def compare(true: list[int], twin: list[int], prompt: int, *, limit: int = 100, whole: bool = False) -> RejectedAnswer:
    """Dialogues whose rows behind the first `prompt` are targets, but for `Q`, which is a question's."""
    rows = [np.array(ids, dtype=np.int64) for ids in (true, twin)]
    labels = [np.where((np.arange(len(ids)) < prompt) | (ids == Q), IGNORE, ids) for ids in rows]
    return rejected_answer(rows[0], labels[0], rows[1], labels[1], limit=limit, whole=whole)


def test_differing_tokens_are_compared_and_nothing_behind_them_is_computed():
    """`A red cat` / `a big blue cat`: the prompt and `a` are shared, `cat` and EOS are the same in both."""
    found = compare([BOS, IMAGE, IMAGE, A, RED, CAT, EOS], [BOS, IMAGE, IMAGE, A, BIG, BLUE, CAT, EOS], 3)
    assert found.chosen.tolist() == [4]
    assert found.rejected.tolist() == [4, 5] and found.rejected_ids.tolist() == [BIG, BLUE]
    assert found.rows.tolist() == [BOS, IMAGE, IMAGE, A, BIG] and found.shared == 4


def test_a_difference_at_the_first_token_and_one_more_behind():
    found = compare([BOS, IMAGE, RED, A, CAT, EOS], [BOS, IMAGE, BLUE, A, BIG, EOS], 2)
    assert found.chosen.tolist() == found.rejected.tolist() == [2, 4]
    assert found.rows.tolist() == [BOS, IMAGE, BLUE, A] and found.shared == 2


@pytest.mark.parametrize("swap", [False, True])
def test_words_that_one_of_the_two_lacks(swap: bool):
    """Its sum has no tokens then; where the twin lacks them, no row of its own is left."""
    more, less = [BOS, IMAGE, A, RED, CAT, EOS], [BOS, IMAGE, A, CAT, EOS]
    found = compare(*([less, more] if swap else [more, less]), 2)
    assert found.chosen.tolist() == ([] if swap else [3]) and found.rejected.tolist() == ([3] if swap else [])
    assert found.rows.tolist() == ([BOS, IMAGE, A] if swap else [BOS]) and found.shared == len(found.rows)


def test_the_answer_alone_is_compared_and_not_the_rounds_behind_it():
    """Later rounds stand at other positions behind a longer twin."""
    tail = [EOS, Q, A, EOS]
    found = compare([BOS, IMAGE, Q, A, RED, *tail], [BOS, IMAGE, Q, A, BIG, BLUE, *tail], 3)
    assert (found.chosen.tolist(), found.rejected.tolist()) == ([4], [4, 5])


def test_what_cannot_be_compared_says_why():
    true = [BOS, IMAGE, A, RED, EOS]
    with pytest.raises(NothingToCompare, match="the true answer's own"):
        compare(true, true, 2)
    for whole in (False, True):  # of whole answers the same beginnings would be left
        with pytest.raises(NothingToCompare, match="behind --model-max-length 3"):
            compare(true, [BOS, IMAGE, A, BLUE, EOS], 2, limit=3, whole=whole)
    with pytest.raises(NothingToCompare, match="trains on no token"):
        compare(true, [BOS, IMAGE, A, BLUE, EOS], 5)


def test_a_cut_answer_is_compared_up_to_the_cut():
    found = compare([BOS, IMAGE, A, RED, CAT, CAT, EOS], [BOS, IMAGE, A, BLUE, BIG, BIG, EOS], 2, limit=5)
    assert found.chosen.tolist() == found.rejected.tolist() == [3, 4] and len(found.rows) == 4


def test_words_that_only_the_cut_takes_from_a_longer_twin_are_no_difference():
    """The twin has a word more, so its end is cut off and the true answer's is not; cut before they were compared, the
    true answer's last `CAT` was taken for a word that the twin lacks."""
    true, twin = [BOS, IMAGE, A, RED, Q + 1, CAT, EOS], [BOS, IMAGE, A, BIG, BLUE, Q + 1, CAT, EOS]
    found = compare(true, twin, 2, limit=6)
    assert found.chosen.tolist() == [3] and found.rejected.tolist() == [3, 4]
    assert compare(twin, true, 2, limit=6).rejected.tolist() == [3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=False))


def sample(*turns: tuple[str, str], twins: tuple[str, ...], caption: str | None = "A red cat.") -> Sample:
    return Sample(
        sample_id=0, name="0", images=("0.jpg",), conversations=turns, caption=caption, hallucinated_captions=twins,
        source="data.json",
    )  # fmt: skip


@pytest.mark.parametrize("version", ["plain", "v1", "minigpt4"])
def test_a_twin_takes_the_captions_place_in_every_template(version: str, tokenizer: Tokenizer):
    """The compared tokens, decoded, are the words that differ; blanks around the caption are no difference."""
    settings = EncodingSettings(
        version=version, model_max_length=512, image_layout=ImageLayout(visual_tokens=3), preference_loss="phrase"
    )
    turns = (("human", "<image>\nWhat is it?"), ("gpt", " A red cat. "))
    found = encode(sample(*turns, twins=("A dog cat.", "A red cat.")), tokenizer, settings)
    (answer,) = found.rejected
    assert tokenizer.backend.decode(answer.rejected_ids).strip() == "dog"
    assert tokenizer.backend.decode(found.dialogue[answer.chosen]).strip() == "red"
    assert answer.shared == answer.rejected[0] == answer.chosen[0]
    assert found.uncompared == ("its tokens are the true answer's own",)


def test_a_twin_of_a_caption_that_no_answer_is_gets_listed_and_costs_nothing_else(tokenizer: Tokenizer):
    settings = EncodingSettings(
        version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=3), preference_loss="phrase"
    )
    turns = (("human", "<image>\nIs it a dog?"), ("gpt", "No."))
    found = encode(sample(*turns, twins=("A dog cat.",)), tokenizer, settings)
    assert found.rejected == () and found.uncompared == (
        "no answer of the dialogue is the caption that it is a twin of",
    )
    assert (found.labels != IGNORE).any() and len(found.pairs[0].hallucinated_segments) == 1


def test_a_leading_turn_that_templates_leave_out_is_not_the_answer(tokenizer: Tokenizer):
    """A twin was put into it, changed no row, and was said to be the true answer's own."""
    settings = EncodingSettings(
        version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=3), preference_loss="phrase"
    )
    turns = (("gpt", "A red cat."), ("human", "<image>\nWhat is it?"), ("gpt", "A red cat."))
    (answer,) = encode(sample(*turns, twins=("A dog cat.",)), tokenizer, settings).rejected
    assert tokenizer.backend.decode(answer.rejected_ids).strip() == "dog"


def test_a_page_shows_no_more_than_the_difference_of_a_twin_that_lacks_words(tokenizer: Tokenizer):
    """It showed the whole prompt in front of it, of which such a twin shares all that counts."""
    settings = EncodingSettings(
        version="v1", model_max_length=512, image_layout=ImageLayout(visual_tokens=3), preference_loss="phrase"
    )
    turns = (("human", "<image>\nWhat is it?"), ("gpt", "A red cat."))
    encoded = encode(sample(*turns, twins=("A cat.",)), tokenizer, settings)
    shown = {segment.title: segment for segment in _segments(encoded, tokenizer)}
    assert [token.text for token in shown["true answer against rejected answer 1: compared tokens"].tokens] == ["▁red"]
    assert shown["rejected answer 1: compared tokens"].tokens == []


def test_a_crop_shows_little_of_its_image_and_is_the_same_every_time() -> None:
    """Drawn by the image's key alone; it is a piece of the image, enlarged, and no other image's."""
    ramp = torch.linspace(0, 1, 64)
    pixels = torch.stack([ramp[None, :].expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    shares = []
    for key in range(-20, 20):
        crop = little_left(pixels, key)
        assert crop.shape == pixels.shape and torch.equal(crop, little_left(pixels, key))
        rises = [crop[axis].diff(dim=1 - axis) > -1e-6 for axis in (0, 1)]
        assert rises[0].all() and rises[1].all() and not crop[2].any()
        step = 1 / 63  # from the first column's value to the last one's, both included
        width, height = ((crop[axis].max() - crop[axis].min()) / step + 1 for axis in (0, 1))
        shares.append(float(width * height) / 64**2)
    assert 0.005 < min(shares) < 0.06 and 0.12 < max(shares) < 0.22, (min(shares), max(shares))
    assert CROP_AREA == (0.01, 0.2), "of Wang et al. 2024; another range is another objective"
