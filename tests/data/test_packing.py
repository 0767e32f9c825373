"""Packing: the worked example of batch.py, mixed batches row by row, and properties over random batches."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hacl_megatron.batch import Parts
from hacl_megatron.config.tiles import ImageLayout
from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodedPair, EncodedSample, rows_key
from hacl_megatron.data.packing import PackSlot, num_packed_rows, pack
from hacl_megatron.data.preferences import RejectedAnswer

BOS, EOS, CAT, DOG, RED, ASK = 1, 2, 7, 8, 9, 5


def rows(*ids: int) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def encoded(dialogue, targets=(), *, image=None, caption=None, hallucinated=()) -> EncodedSample:
    """`targets`: positions of the dialogue that are trained on; the segments as id lists."""
    dialogue = rows(*dialogue)
    labels = np.full(len(dialogue), IGNORE)
    labels[list(targets)] = dialogue[list(targets)]
    pair = None
    if image is not None:
        segments = tuple(rows(*segment) for segment in hallucinated)
        pair = EncodedPair(
            image=0, image_segment=rows(*image), caption_segment=rows(*caption), hallucinated_segments=segments
        )
    visual = max((dialogue == IMAGE).sum(), 0 if image is None else image.count(IMAGE))
    return EncodedSample(
        dialogue=dialogue,
        labels=labels,
        images=(ImageLayout(visual_tokens=int(visual)).rows(None, alone=True),) if visual else (),
        pairs=() if pair is None else (pair,),
        truncated=False,
        tokenization_mismatch=False,
    )


def slot(sample_id: int, sample: EncodedSample | None) -> PackSlot:
    keys = (1000 + sample_id,) if sample is not None and sample.images else ()
    return PackSlot(sample_id=sample_id, encoded=sample, image_keys=keys)


def pixels(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 4, 4)


PAIR = encoded(
    [BOS, IMAGE, IMAGE, CAT, EOS], [3, 4], image=[IMAGE, IMAGE, EOS], caption=[BOS, CAT, EOS]
)  # the pair of batch.py's docstring


def test_the_worked_example_of_the_contract():
    batch = pack([slot(11, PAIR)], pixels(1), visual_tokens=2, pad_multiple=4)
    assert batch.sample_ids.tolist() == [11]
    assert batch.token_ids.tolist() == [BOS, 0, 0, CAT, EOS, 0, 0, EOS, BOS, CAT, EOS, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 11, 12]
    assert batch.max_seqlen == 5
    assert batch.image_rows.tolist() == [1, 2, 5, 6]
    assert batch.feature_rows.tolist() == [0, 1, 0, 1]
    assert batch.target_rows.tolist() == [2, 3]
    assert batch.target_ids.tolist() == [CAT, EOS]
    assert batch.image_eos_rows.tolist() == [7]
    assert batch.caption_eos_rows.tolist() == [10]
    assert batch.hallucinated_eos_rows.tolist() == [] and batch.hallucinated_owner.tolist() == []
    assert batch.image_keys.tolist() == [1011]
    assert batch.caption_keys.tolist() == [rows_key(rows(BOS, CAT, EOS))]
    assert batch.num_padding_rows == 1 and batch.num_text_rows == 3
    assert batch.read_rows.tolist() == [2, 3, 4, 7, 10] and batch.read_lengths.tolist() == [3, 1, 1, 0]
    assert batch.branch_rows.tolist() == batch.branch_context_rows.tolist() == []
    assert (batch.num_pairs, batch.num_targets, batch.num_images, batch.num_rows) == (1, 2, 1, 12)


PROMPTED = encoded(
    [BOS, IMAGE, IMAGE, CAT, EOS], [3, 4], image=[BOS, IMAGE, IMAGE, EOS], caption=[BOS, CAT, EOS]
)  # the same with the prompt as the image's context


def test_the_contracts_example_of_a_shared_prefix():
    batch = pack([slot(11, PROMPTED)], pixels(1), visual_tokens=2, pad_multiple=4, parts=Parts(images="branch"))
    assert batch.token_ids.tolist()[:10] == [BOS, 0, 0, CAT, EOS, EOS, BOS, CAT, EOS, 0]
    assert batch.position_ids.tolist()[:10] == [0, 1, 2, 3, 4, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist()[:4] == [0, 5, 6, 9]
    assert batch.branch_rows.tolist() == batch.image_eos_rows.tolist() == [5]
    assert batch.branch_lengths.tolist() == [4] and batch.branch_context_rows.tolist() == [0, 1, 2, 5]
    assert batch.image_rows.tolist() == [1, 2] and batch.read_lengths.tolist()[:3] == [3, 1, 1]


def test_rejected_answers_as_branches_and_as_segments():
    """`A cat.` with the twins `A red dog.` and `A dog.`: what a row predicts, and which tokens are compared."""
    A, DOT = 20, 21
    dialogue = [BOS, IMAGE, IMAGE, A, CAT, DOT]
    prompt = rows(BOS, IMAGE, IMAGE, A)
    longer = RejectedAnswer(
        rows=np.append(prompt, RED), shared=4, chosen=rows(4), rejected=rows(4, 5), rejected_ids=rows(RED, DOG)
    )
    as_long = RejectedAnswer(rows=prompt, shared=4, chosen=rows(3, 4), rejected=rows(3, 4), rejected_ids=rows(A, DOG))
    sample = replace(encoded(dialogue, [3, 4, 5]), rejected=(longer, as_long))
    common = dict(visual_tokens=2, pad_multiple=1)
    batch = pack([slot(0, sample)], pixels(1), **common, parts=Parts(preferences="branch"))
    assert batch.token_ids.tolist() == [BOS, 0, 0, A, CAT, DOT, RED]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4] and batch.cu_seqlens.tolist() == [0, 6, 7]
    assert batch.branch_rows.tolist() == [6] and batch.branch_context_rows.tolist() == [0, 1, 2, 3, 6]
    assert batch.branch_sizes.tolist() == [1] and batch.branch_lengths.tolist() == [5]
    # The row of `A` predicts what the twins have instead of CAT; A itself is the second twin's and the answer's own.
    assert batch.rejected_rows.tolist() == [3, 6, 3] and batch.rejected_ids.tolist() == [RED, DOG, DOG]
    assert batch.target_ids.tolist() == [A, CAT, DOT]
    assert batch.preference_tokens.tolist() == [1, 3, 4, 0, 1, 0, 5]
    assert batch.preference_lengths.tolist() == [1, 2, 2, 2] and batch.num_preferences == 2
    assert batch.num_rows == num_packed_rows(sample, Parts(preferences="branch"))

    batch = pack([slot(0, sample)], pixels(1), **common, parts=Parts(preferences="segment"))
    assert batch.token_ids.tolist() == [BOS, 0, 0, A, CAT, DOT, BOS, 0, 0, A, RED, BOS, 0, 0, A]
    assert batch.image_rows.tolist() == [1, 2, 7, 8, 12, 13] and batch.feature_rows.tolist() == [0, 1] * 3
    assert batch.branch_rows.tolist() == []
    assert batch.rejected_rows.tolist() == [9, 10, 13, 14] and batch.rejected_ids.tolist() == [RED, DOG, A, DOG]
    assert batch.preference_tokens.tolist() == [1, 3, 4, 0, 1, 5, 6]
    assert batch.num_rows == num_packed_rows(sample, Parts(preferences="segment"))

    batch = pack([slot(0, sample)], pixels(1), **common)
    assert batch.num_rows == len(dialogue) == num_packed_rows(sample) and batch.num_preferences == 0


def test_a_dialogue_that_does_not_start_with_the_images_context_shares_nothing():
    """The dialogue has no image, or the prefix was cut, or the pack leaves dialogues out: a segment of its own."""
    elsewhere = encoded([BOS, CAT, EOS], [1], image=[BOS, IMAGE, IMAGE, EOS], caption=[BOS, CAT, EOS])
    slots = [slot(0, elsewhere), slot(1, PROMPTED), slot(2, PAIR)]
    batch = pack(slots, pixels(3), visual_tokens=2, pad_multiple=1, parts=Parts(images="branch"))
    assert batch.branch_rows.tolist() == [12] and batch.branch_context_rows.tolist() == [7, 8, 9, 12]
    assert batch.image_eos_rows.tolist() == [6, 12, 20]
    ahead = pack(slots, pixels(3), visual_tokens=2, pad_multiple=1, parts=Parts(dialogues=False, images="branch"))
    assert ahead.branch_rows.tolist() == [] and ahead.feature_rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_parts_leave_kinds_of_segments_out_and_keep_what_pairs_are_known_by():
    slots = [slot(0, PAIR), slot(1, encoded([BOS, ASK, CAT, EOS], [2, 3]))]
    texts = pack(slots, pixels(0), visual_tokens=2, pad_multiple=1, parts=Parts(dialogues=False, images="none"))
    assert texts.token_ids.tolist() == [BOS, CAT, EOS] and texts.caption_eos_rows.tolist() == [2]
    assert texts.image_eos_rows.tolist() == texts.target_rows.tolist() == texts.image_rows.tolist() == []
    assert (texts.num_pairs, texts.num_text_rows, texts.read_rows.tolist()) == (1, 3, [2])
    rest = pack(slots, pixels(1), visual_tokens=2, pad_multiple=1, parts=Parts(texts=False))
    assert rest.token_ids.tolist() == [BOS, 0, 0, CAT, EOS, 0, 0, EOS, BOS, ASK, CAT, EOS]
    assert rest.caption_eos_rows.tolist() == [] and rest.num_text_rows == 0
    assert rest.image_keys.tolist() == texts.image_keys.tolist() == [1000]
    assert rest.caption_keys.tolist() == texts.caption_keys.tolist() == [rows_key(rows(BOS, CAT, EOS))]
    dialogues = pack(slots, pixels(1), visual_tokens=2, pad_multiple=1, parts=Parts(images="none", texts=False))
    assert dialogues.num_pairs == 0 and dialogues.hallucinated_owner.tolist() == [] and dialogues.num_targets == 4
    no_parts = Parts(dialogues=False, images="none", texts=False)
    nothing = pack(slots, pixels(0), visual_tokens=2, pad_multiple=4, parts=no_parts)
    assert nothing.num_rows == nothing.num_padding_rows == 4 and nothing.read_rows.tolist() == [3]


def test_a_mixed_batch_row_by_row():
    """Text only; a pair with two hallucinations; a bad sample; an image without a pair; a pair whose dialogue has no
    image but a prompt in front of its image segment."""
    text_only = encoded([BOS, ASK, CAT, EOS], [2, 3])
    pair = encoded(
        [BOS, ASK, IMAGE, IMAGE, CAT],
        [4],
        image=[BOS, ASK, IMAGE, IMAGE, EOS],
        caption=[BOS, CAT, EOS],
        hallucinated=[[BOS, DOG, EOS], [BOS, RED, DOG, EOS]],
    )
    image_only = encoded([BOS, IMAGE, IMAGE, DOG], [3])
    other = encoded([BOS, ASK], [1], image=[IMAGE, IMAGE, EOS], caption=[BOS, DOG, EOS], hallucinated=[[BOS, CAT, EOS]])
    slots = [slot(3, text_only), slot(1, pair), slot(9, None), slot(4, image_only), slot(0, other)]
    batch = pack(slots, pixels(3), visual_tokens=2, pad_multiple=8)

    # fmt: off
    expected = [
        # (segment's token ids, first row)
        ([BOS, ASK, CAT, EOS], 0), ([BOS, ASK, 0, 0, CAT], 4), ([BOS, ASK, 0, 0, EOS], 9), ([BOS, 0, 0, DOG], 14),
        ([BOS, ASK], 18), ([0, 0, EOS], 20), ([BOS, CAT, EOS], 23), ([BOS, DOG, EOS], 26),
        ([BOS, DOG, EOS], 29), ([BOS, RED, DOG, EOS], 32), ([BOS, CAT, EOS], 36), ([0], 39),
    ]
    # fmt: on
    assert batch.token_ids.tolist() == [token for segment, _ in expected for token in segment]
    assert batch.cu_seqlens.tolist() == [*(begin for _, begin in expected), 40]
    assert batch.position_ids.tolist() == [n for segment, _ in expected for n in range(len(segment))]
    assert batch.sample_ids.tolist() == [3, 1, 9, 4, 0]
    assert batch.target_rows.tolist() == [1, 2, 7, 16, 18]
    assert batch.target_ids.tolist() == [CAT, EOS, CAT, DOG, ASK]
    assert batch.image_rows.tolist() == [6, 7, 11, 12, 15, 16, 20, 21]
    assert batch.feature_rows.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert batch.image_eos_rows.tolist() == [13, 22]
    assert batch.caption_eos_rows.tolist() == [25, 28]
    assert batch.hallucinated_eos_rows.tolist() == [31, 35, 38]
    assert batch.hallucinated_owner.tolist() == [0, 0, 1]
    assert batch.image_keys.tolist() == [1001, 1000]
    # Keys tell equal captions apart from different ones across captions and hallucinated captions.
    assert batch.hallucinated_keys[0] == batch.caption_keys[1] and batch.hallucinated_keys[2] == batch.caption_keys[0]
    assert batch.num_padding_rows == 1 and batch.max_seqlen == 5


def test_a_batch_of_bad_samples_is_padding_alone():
    batch = pack([slot(5, None), slot(6, None)], pixels(0), visual_tokens=2, pad_multiple=4)
    assert batch.sample_ids.tolist() == [5, 6]
    assert batch.token_ids.tolist() == [0] * 4 and batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4] and batch.max_seqlen == 4 and batch.num_padding_rows == 4
    assert batch.num_pairs == batch.num_targets == batch.num_images == 0
    assert batch.pixel_values.shape == (0, 3, 4, 4)


def test_no_padding_segment_where_nothing_is_padded():
    batch = pack([slot(0, encoded([BOS, ASK, CAT, EOS], [2, 3]))], pixels(0), visual_tokens=2, pad_multiple=4)
    assert batch.cu_seqlens.tolist() == [0, 4] and batch.num_padding_rows == 0


def test_a_target_on_the_first_token_is_dropped():
    """Nothing stands in front of it: on the second segment the row before belongs to the other sample."""
    sample = encoded([CAT, DOG], [0, 1])
    batch = pack([slot(0, sample), slot(1, sample)], pixels(0), visual_tokens=2, pad_multiple=1)
    assert batch.target_rows.tolist() == [0, 2] and batch.target_ids.tolist() == [DOG, DOG]


def test_dtypes_are_those_of_the_contract():
    for slots, count in (([slot(0, PAIR)], 1), ([slot(0, None)], 0)):
        batch = pack(slots, pixels(count), visual_tokens=2, pad_multiple=4)
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                int32 = dict.fromkeys(("cu_seqlens", "read_lengths", "branch_lengths", "branch_sizes"), torch.int32)
                floats = dict.fromkeys(("pixel_values", "pooled_weights"), torch.float32)
                floats["reference_likelihoods"] = torch.float64
                expected = {**int32, **floats}.get(name, torch.int64)
                assert value.dtype == expected and value.is_contiguous(), name


def test_a_rank_without_vision_tower_packs_the_same_rows():
    slots = [slot(0, PAIR), slot(1, PAIR)]
    with_pixels = pack(slots, pixels(2), visual_tokens=2, pad_multiple=4)
    without = pack(slots, pixels(0), visual_tokens=2, pad_multiple=4)
    assert without.num_images == 0
    assert without.feature_rows.tolist() == with_pixels.feature_rows.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    with pytest.raises(AssertionError, match="1 views of 2"):
        pack(slots, pixels(1), visual_tokens=2, pad_multiple=4)


@st.composite
def samples(draw) -> EncodedSample | None:
    token = st.integers(3, 50)
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    image = [IMAGE] * 3 if draw(st.booleans()) else []
    dialogue = [BOS, *draw(st.lists(token, max_size=3)), *image, *draw(st.lists(token, max_size=5))]
    text = [n for n, token_id in enumerate(dialogue) if token_id != IMAGE]
    targets = draw(st.lists(st.sampled_from(text), unique=True))
    if not image or draw(st.booleans()):
        return encoded(dialogue, targets)
    caption = [BOS, *draw(st.lists(token, max_size=4)), EOS]
    hallucinated = [[BOS, *words, EOS] for words in draw(st.lists(st.lists(token, max_size=3), max_size=3))]
    return encoded(dialogue, targets, image=[*image, EOS], caption=caption, hallucinated=hallucinated)


@given(drawn=st.lists(samples(), min_size=1, max_size=5), pad_multiple=st.sampled_from([1, 2, 8, 64]))
@settings(max_examples=150, deadline=None)
def test_every_segment_can_be_read_back(drawn, pad_multiple):
    slots = [slot(n, sample) for n, sample in enumerate(drawn)]
    good = [sample for sample in drawn if sample is not None]
    with_image = [sample for sample in good if sample.images]
    pairs = [pair for sample in good for pair in sample.pairs]
    batch = pack(slots, pixels(len(with_image)), visual_tokens=3, pad_multiple=pad_multiple)

    assert sum(map(num_packed_rows, drawn)) == batch.num_rows - batch.num_padding_rows
    _check_read_rows(batch)
    assert batch.num_rows % pad_multiple == 0 and batch.num_rows >= pad_multiple
    borders = batch.cu_seqlens.tolist()
    assert borders[-1] == batch.num_rows and batch.max_seqlen == max(np.diff(borders))
    # Put the images' numbers back where the features go, then read the segments off.
    filled = batch.token_ids.clone()
    filled[batch.image_rows] = -1 - batch.feature_rows
    segments = [filled[begin:end].tolist() for begin, end in itertools.pairwise(borders)]
    if batch.num_padding_rows:
        assert segments.pop() == [0] * batch.num_padding_rows

    def with_features(segment, sample):
        first = next(n for n, other in enumerate(with_image) if other is sample) * 3 if sample.images else 0
        features = iter(range(first, first + 3))
        return [-1 - next(features) if token == IMAGE else token for token in segment.tolist()]

    expected = []
    for sample in good:
        expected.append(with_features(sample.dialogue, sample))
        expected += [with_features(pair.image_segment, sample) for pair in sample.pairs]
    expected += [pair.caption_segment.tolist() for pair in pairs]
    expected += [segment.tolist() for pair in pairs for segment in pair.hallucinated_segments]
    assert segments == expected

    # Shifted as a language model shifts them, the dialogue's labels are the targets.
    labels = {}
    for segment, begin in zip(expected, borders, strict=False):
        for sample in good:
            if segment is expected[_dialogue_index(good, sample)]:
                shifted = sample.labels[1:].tolist()
                labels |= {begin + n: token for n, token in enumerate(shifted) if token != IGNORE}
    assert dict(zip(batch.target_rows.tolist(), batch.target_ids.tolist(), strict=True)) == labels
    assert batch.target_rows.tolist() == sorted(labels)

    eos = torch.cat([batch.image_eos_rows, batch.caption_eos_rows, batch.hallucinated_eos_rows])
    assert (batch.token_ids[eos] == EOS).all() and all(row + 1 in borders for row in eos.tolist())
    assert batch.hallucinated_owner.tolist() == [n for n, pair in enumerate(pairs) for _ in pair.hallucinated_segments]


def test_a_dialogue_that_lacks_the_context_by_its_last_row_shares_nothing() -> None:
    """An image of one row, and a dialogue that does not mention it: they begin with the same BOS alone."""
    sample = encoded([BOS, CAT, EOS], [1], image=[BOS, IMAGE, EOS], caption=[BOS, CAT, EOS])
    parts = Parts(images="branch")
    batch = pack([slot(0, sample)], pixels(1), visual_tokens=1, pad_multiple=1, parts=parts)
    assert batch.branch_rows.tolist() == [] and num_packed_rows(sample, parts) == batch.num_rows == 9


@pytest.mark.parametrize(
    "parts",
    [
        Parts(dialogues=dialogues, images=images, texts=texts)
        for dialogues in (True, False) for images in ("segment", "branch", "none") for texts in (True, False)
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_counted_as_they_are_packed(parts: Parts) -> None:
    """Budgets of rows and even micro-batches rest on the count: a branch is one row, another image a segment."""
    elsewhere = encoded([BOS, CAT, EOS], [1], image=[BOS, IMAGE, IMAGE, EOS], caption=[BOS, CAT, EOS])
    twins = encoded([BOS, IMAGE, IMAGE, CAT], [3], image=[BOS, IMAGE, IMAGE, EOS], caption=[BOS, CAT, EOS],
                    hallucinated=[[BOS, DOG, EOS], [BOS, RED, DOG, EOS]])  # fmt: skip
    for sample in (PAIR, PROMPTED, elsewhere, twins, encoded([BOS, ASK, CAT], [2]), None):
        images = int(sample is not None and len(sample.images))
        batch = pack([slot(0, sample)], pixels(images), visual_tokens=2, pad_multiple=1, parts=parts)
        rows_alone = batch.num_rows if sample is not None and num_packed_rows(sample, parts) else 0
        assert num_packed_rows(sample, parts) == rows_alone
        assert rows_alone or batch.num_rows == batch.num_padding_rows


def _check_read_rows(batch) -> None:
    """Of each segment, the rows from its first target or EOS row on; one row at least."""
    wanted = {*batch.target_rows.tolist(), *batch.image_eos_rows.tolist()}
    wanted |= {*batch.caption_eos_rows.tolist(), *batch.hallucinated_eos_rows.tolist()}
    expected, lengths = [], []
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        first = min([row for row in wanted if begin <= row < end], default=end)
        expected += range(first, end)
        lengths.append(end - first)
    if not wanted:
        expected, lengths = [batch.num_rows - 1], [0] * (len(lengths) - 1) + [1]
    assert batch.read_rows.tolist() == expected and batch.read_lengths.tolist() == lengths


def _dialogue_index(good, sample) -> int:
    before = good[: next(n for n, other in enumerate(good) if other is sample)]
    return sum(1 + len(other.pairs) for other in before)
