"""A file's captions through the rules, in this process or in several, in the file's order and in bounded memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from hacl_megatron.hallucinate.rules import Hallucination, hallucinate

Item = TypeVar("Item")
_PER_TASK = 256
_Answers = list[list[Hallucination]]


def hallucinate_all(
    items: Iterable[tuple[Item, str, str | None]], *, seed: int, count: int, workers: int
) -> Iterator[tuple[Item, list[Hallucination]]]:
    """Yields (item, hallucinated captions) for each (item, name, caption or None), in order.

    `workers` 0 or 1 works in this process. At most a few thousand items are held: the input is read as results leave.
    """
    chunks = _chunks(iter(items))
    if workers <= 1:
        for chunk in chunks:
            yield from zip((item for item, _, _ in chunk), _run(seed, count, _captions(chunk)), strict=True)
        return
    waiting: deque[tuple[list, Future[_Answers]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_run, seed, count, _captions(chunk))))
            if len(waiting) > 2 * workers:
                done, answers = waiting.popleft()
                yield from zip((item for item, _, _ in done), answers.result(), strict=True)
        for done, answers in waiting:
            yield from zip((item for item, _, _ in done), answers.result(), strict=True)


def _chunks(items: Iterator) -> Iterator[list]:
    while chunk := list(islice(items, _PER_TASK)):
        yield chunk


def _captions(chunk: list) -> list[tuple[str, str | None]]:
    return [(name, caption) for _, name, caption in chunk]


def _run(seed: int, count: int, captions: list[tuple[str, str | None]]) -> _Answers:
    return [hallucinate(caption, seed=seed, name=name, count=count) if caption else [] for name, caption in captions]
