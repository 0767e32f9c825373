"""Blocks of rows against open_clip's whole matrices: same loss, same gradients, a bounded share of the memory.

The mistakes these tests would catch: a block that keeps what the one before left in the shared buffer, positives
placed by the block's rows instead of the rank's, a gradient scaled by the other direction's factor or not at all,
gradients made where none are wanted, masks or copies of the size of the whole matrix.
"""

import pytest
import torch
from torch import Tensor

from hacl_megatron.objective.contrastive import contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings
from hacl_megatron.objective.row_blocks import BLOCK_BYTES, Columns, _blocks, _Plan, softmax_loss_sum
from tests.memory import peak_bytes
from tests.objective.open_clip_oracle import clip_loss

KINDS = ("image", "caption", "hallucinated")


def _pairs(num_pairs: int, num_hallucinated: int, width: int, seed: int, dtype: torch.dtype) -> PairEmbeddings:
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1)

    keys = 10_000 * seed + torch.arange(num_pairs)
    return PairEmbeddings(
        image=unit(num_pairs).requires_grad_(),
        caption=unit(num_pairs).requires_grad_(),
        hallucinated=unit(num_hallucinated).requires_grad_(),
        hallucinated_owner=torch.arange(num_hallucinated) * num_pairs // max(num_hallucinated, 1),
        image_keys=keys,
        caption_keys=keys,
        hallucinated_keys=-1 - 10_000 * seed - torch.arange(num_hallucinated),
    )


def _local(pool: PairEmbeddings, first_pair: int, count: int) -> PairEmbeddings:
    """Leaves equal to these pairs of the pool: their gradients are the rows' alone, the pool's the columns'."""
    pairs = slice(first_pair, first_pair + count)
    return PairEmbeddings(
        image=pool.image[pairs].detach().clone().requires_grad_(),
        caption=pool.caption[pairs].detach().clone().requires_grad_(),
        hallucinated=pool.hallucinated[:0].detach(),
        hallucinated_owner=pool.hallucinated_owner[:0],
        image_keys=pool.image_keys[pairs],
        caption_keys=pool.caption_keys[pairs],
        hallucinated_keys=pool.hallucinated_keys[:0],
    )


@pytest.mark.parametrize("block_bytes", (1, 2000, BLOCK_BYTES))
@pytest.mark.parametrize("first_pair", (0, 8, 16))
@pytest.mark.parametrize("weight", (1, 3))
def test_every_tensors_gradient_is_open_clips(weight: int, first_pair: int, block_bytes: int) -> None:
    """Rows and columns apart, hallucinated captions and an earlier step's pairs among the columns; with a weight of 3
    open_clip sees each hallucinated caption three times."""
    pool, queue = _pairs(24, 30, 12, 1, torch.float64), _pairs(9, 5, 12, 2, torch.float64)
    local = _local(pool, first_pair, 8)
    temperature = torch.tensor([0.07], dtype=torch.float64, requires_grad=True)
    names = [(record, kind) for record in (pool, queue) for kind in KINDS] + [(local, "image"), (local, "caption")]
    leaves = [getattr(record, kind) for record, kind in names] + [temperature]
    expected = clip_loss(
        local.image, local.caption, torch.cat([pool.image, queue.image]),
        torch.cat([pool.caption, queue.caption, *[pool.hallucinated, queue.hallucinated] * weight]), first_pair,
        temperature,
    )  # fmt: skip
    expected_gradients = torch.autograd.grad(3 * expected, leaves)

    terms = contrastive_loss(
        local, pool, first_pair, temperature, hallucination_negatives="all", hallucination_weight=weight,
        mask_duplicates=True, queue=queue, block_bytes=block_bytes,
    )  # fmt: skip
    loss = (terms.image_to_text_sum + terms.text_to_image_sum) / (2 * 8)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # `queue` asks for gradients here, so that all columns are seen; the queue of a training run does not.
    torch.testing.assert_close(torch.autograd.grad(3 * loss, leaves), expected_gradients, rtol=1e-11, atol=1e-12)


def test_owned_columns_are_their_rows_alone() -> None:
    """Row by row over the candidates written out here: columns that only one row sees, equal keys, unsorted owners."""
    generator = torch.Generator().manual_seed(3)

    def leaf(rows: int) -> Tensor:
        return torch.randn(rows, 3, generator=generator, dtype=torch.float64).requires_grad_()

    rows, everyones, owned, temperature = leaf(4), leaf(6), leaf(5), torch.tensor([0.8], dtype=torch.float64)
    owner, keys = torch.tensor([3, 0, -1, 4, 0]), torch.tensor([1, 2, 3, 4])

    def loss(rows: Tensor, everyones: Tensor, owned: Tensor, temperature: Tensor, block_bytes: int) -> Tensor:
        columns = [
            Columns(embeddings=everyones, equal_keys=((keys, torch.tensor([1, 1, 1, 2, 4, 4])),)),
            Columns(embeddings=owned, owner=owner, equal_keys=((keys, torch.tensor([4, 9, 1, 9, 9])),)),
        ]
        return softmax_loss_sum(rows, columns, 1, temperature, block_bytes=block_bytes)[0]

    inputs = [rows, everyones, owned, temperature.requires_grad_()]
    # Row i's own column is i + 1; keys take out columns 0 and 2 of row 0 (but column 1 is its own), 3 of row 1, 4 and 5
    # of row 3 (but 4 is its own), and the owned column 0, which would be row 3's.
    everyones_of_row, owned_of_row = (
        ([1, 3, 4, 5], [0, 1, 2, 4, 5], list(range(6)), [0, 1, 2, 3, 4]),
        ([1, 4], [], [], []),
    )
    expected = torch.zeros((), dtype=torch.float64)
    for i, (some, few) in enumerate(zip(everyones_of_row, owned_of_row, strict=True)):
        similarities = torch.cat([everyones[some], owned[few]]) @ rows[i] / temperature
        expected = expected + similarities.logsumexp(0) - everyones[i + 1].dot(rows[i]) / temperature[0]
    for block_bytes in (1, 150, BLOCK_BYTES):
        actual = loss(*inputs, block_bytes)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(actual, inputs)
        expected_gradients = torch.autograd.grad(expected, inputs, retain_graph=True)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_the_two_sums_have_gradients_of_their_own() -> None:
    pool = _pairs(6, 6, 5, 1, torch.float64)
    local, temperature = _local(pool, 2, 3), torch.tensor([0.07], dtype=torch.float64)

    def gradients(image_to_text: float, text_to_image: float) -> list[Tensor]:
        terms = contrastive_loss(
            local, pool, 2, temperature.requires_grad_(), hallucination_negatives="all", mask_duplicates=False
        )
        loss = image_to_text * terms.image_to_text_sum + text_to_image * terms.text_to_image_sum
        leaves = [pool.image, pool.caption, pool.hallucinated, local.image, local.caption, temperature]
        return list(torch.autograd.grad(loss, leaves))

    apart = [2 * a - 5 * b for a, b in zip(gradients(1, 0), gradients(0, 1), strict=True)]
    torch.testing.assert_close(gradients(2, -5), apart, rtol=1e-12, atol=1e-12)


def test_backward_runs_once() -> None:
    pool = _pairs(4, 4, 5, 1, torch.float32)
    terms = contrastive_loss(
        pool, pool, 0, torch.tensor([0.07]), hallucination_negatives="own", mask_duplicates=True
    )  # fmt: skip
    terms.image_to_text_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        terms.image_to_text_sum.backward()


def test_memory_is_a_twentieth_of_the_plain_forms() -> None:
    """512 rows, 8,192 pairs, 8,192 hallucinated captions; blocks of 2 MiB, as the whole would be no burden here.

    Input gradients aside, which both give. Measured: 111 MiB for the plain form; 1.3, and 1.3 without gradients.
    """
    width, first_pair, block_bytes = 16, 1024, 2**21
    pool = _pairs(8192, 8192, width, 1, torch.float32)
    local, temperature = _local(pool, first_pair, 512), torch.tensor([0.07], requires_grad=True)
    leaves = [pool.image, pool.caption, pool.hallucinated, local.image, local.caption, temperature]
    gradient_bytes = sum(leaf.nbytes for leaf in leaves)

    def plain() -> None:
        columns = torch.cat([pool.caption, pool.hallucinated])
        clip_loss(local.image, local.caption, pool.image, columns, first_pair, temperature).backward()

    def blocks(mode: str = "all") -> Tensor:
        terms = contrastive_loss(
            local, pool, first_pair, temperature, hallucination_negatives=mode, mask_duplicates=True,
            block_bytes=block_bytes,
        )  # fmt: skip
        return terms.image_to_text_sum + terms.text_to_image_sum

    def discard() -> None:
        for leaf in leaves:
            leaf.grad = None

    plain_peak = peak_bytes(plain) - gradient_bytes
    assert plain_peak > 512 * 16384 * 4 * 2  # similarities and softmax at least: the count sees them
    for mode in ("own", "all", "none"):
        discard()
        peak = peak_bytes(lambda mode=mode: blocks(mode).backward())
        # A mask of the whole matrix would be 4 MiB.
        assert peak - gradient_bytes <= block_bytes <= 0.05 * plain_peak, (mode, peak, gradient_bytes, plain_peak)
    discard()
    with torch.no_grad():
        assert peak_bytes(blocks) <= block_bytes
        assert not blocks().requires_grad


def test_blocks_fit_their_bytes() -> None:
    """Sizes alone, on the meta device: nothing of this is allocated."""

    def block_rows(num_rows: int, *num_columns: int) -> set[int]:
        rows = torch.empty(num_rows, 1024, device="meta")
        columns = tuple(Columns(embeddings=torch.empty(n, 1024, device="meta")) for n in num_columns)
        plan = _Plan(
            columns=columns, first_positive=0, num_ranked=0, block_bytes=BLOCK_BYTES, with_gradients=True
        )  # fmt: skip
        blocks = list(_blocks(rows, plan))
        covered = [row for block in blocks for row in range(block.rows.start, block.rows.stop)]
        assert covered == list(range(num_rows))
        assert all(block.similarities.shape[1] == sum(num_columns) for block in blocks)
        assert all(block.similarities.nbytes < BLOCK_BYTES for block in blocks) or len(blocks) == num_rows
        return {block.rows.stop - block.rows.start for block in blocks}

    assert block_rows(4096, 65536, 65536) == {256}
    assert block_rows(4096, 65536) == {512}
    assert block_rows(1000, 65536) == {500}
    assert block_rows(300, 1000) == {300}  # all in one
    assert block_rows(3, 2**26, 2**26) == {1}  # never less than a row
    assert block_rows(0, 1000) == set()


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_blocks_are_no_smaller_than_their_bytes_allow(blocks: int) -> None:
    """Columns with an owner are fewer in a block of fewer rows: catches a count that takes all, or more, for each."""
    num_rows, shared, owned_each = 64, 48, 6
    rows = torch.empty(num_rows, 2, device="meta")
    owner = torch.arange(num_rows).repeat_interleave(owned_each)
    columns = (
        Columns(embeddings=torch.empty(shared, 2, device="meta")),
        Columns(embeddings=torch.empty(len(owner), 2, device="meta"), owner=owner),
    )
    size = num_rows // blocks
    needed = size * (shared + owned_each * size) * (4 + 1)  # fp32 and a mask
    for block_bytes, expected in ((needed, blocks), (needed - 1, 2 * blocks)):
        plan = _Plan(columns=columns, first_positive=0, num_ranked=0, block_bytes=block_bytes, with_gradients=True)
        found = list(_blocks(rows, plan))
        assert len(found) == expected
        for block in found:
            height = block.rows.stop - block.rows.start
            assert block.similarities.shape == (height, shared + owned_each * height)
            assert block.owners[0] is None and block.indices[1].device.type == "meta"
