"""`--contrastive-negatives queue`: pairs of earlier steps as further negatives, first in, first out.

    step k    contrastive_loss(local, pool, ..., queue=queue.pairs)      pool: this step's pairs of all ranks
              queue.push(pool)                                           after the step's last use of `pairs`

The queue holds what `gather_pairs` returned, without gradients, so that it is the same on every data-parallel rank and
needs no communication. It holds pairs that were seen and nothing else: empty at first, never random, never padded. A
pair brings its hallucinated captions and its keys, and takes them along when it leaves.
"""

from dataclasses import fields

import torch
from torch import Tensor

from hacl_megatron.objective.negatives import PairEmbeddings, concatenate_pairs


class NegativeQueue:
    """The newest `size` pairs, oldest first."""

    def __init__(
        self, size: int, width: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            size: most pairs to hold; their hallucinated captions, however many, come on top.
            width: d of the embeddings.
        """
        assert size > 0, size
        self.size = size
        embeddings = torch.zeros(0, width, device=device, dtype=dtype)
        integers = torch.zeros(0, dtype=torch.int64)
        # Nothing is written in place: an empty queue's fields may share a tensor.
        self._pairs = PairEmbeddings(
            image=embeddings, caption=embeddings, hallucinated=embeddings, hallucinated_owner=integers,
            image_keys=integers, caption_keys=integers, hallucinated_keys=integers,
        )  # fmt: skip

    @property
    def pairs(self) -> PairEmbeddings:
        """What the queue holds, oldest pair first, without gradients. No copy; a later `push` leaves it as it is."""
        return self._pairs

    @torch.no_grad()
    def push(self, pool: PairEmbeddings) -> None:
        """Take all pairs of a step, the same ones on every rank; the oldest beyond `size` leave.

        Of more than `size` pairs the last ones stay.
        """
        new = _newest(pool.detach(), self.size)
        self._pairs = concatenate_pairs([_newest(self._pairs, self.size - new.num_pairs), new])

    def state_dict(self) -> dict[str, Tensor]:
        """The held pairs, by the fields of `PairEmbeddings`; filled slots only, so shapes vary."""
        return {item.name: getattr(self._pairs, item.name) for item in fields(PairEmbeddings)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what `state_dict` gave, bit for bit; the newest of it where this queue is shorter than that one.

        Raises:
            ValueError: a tensor is missing or unknown, or has another width or dtype than this queue.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"queue of negatives: found {sorted(state)}, expected {sorted(expected)}; "
                "the checkpoint comes from another version, start without its queue"
            )
        for name, tensor in expected.items():
            if state[name].shape[1:] != tensor.shape[1:] or state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"queue of negatives: {name} is {state[name].dtype} {list(state[name].shape)}, expected "
                    f"{tensor.dtype} [.., {', '.join(str(n) for n in tensor.shape[1:])}]; "
                    "the checkpoint belongs to a model of another width, start without its queue"
                )
        device = self._pairs.image.device
        places = {name: device if tensor.dim() == 2 else "cpu" for name, tensor in expected.items()}
        loaded = PairEmbeddings(**{name: tensor.detach().to(places[name]) for name, tensor in state.items()})
        self._pairs = concatenate_pairs([_newest(loaded, self.size)])


def _newest(pairs: PairEmbeddings, count: int) -> PairEmbeddings:
    """The last `count` pairs, or all if there are fewer, with their hallucinated captions."""
    dropped = max(pairs.num_pairs - count, 0)
    if dropped == 0:
        return pairs
    owner = pairs.hallucinated_owner - dropped
    return pairs.select(slice(dropped, None), (owner >= 0).nonzero().flatten(), owner)
